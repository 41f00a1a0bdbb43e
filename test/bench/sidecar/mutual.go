package sidecar

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// inboundPort is where rules lead what comes to the pod.
const inboundPort = 15006

// object is one of JSON.
type object map[string]any

// mutualConfig has each connection be one of mutual TLS between two sidecars, as
// sidecars are used: to a service by its own chain and cluster, else to wherever the
// connection was led to before. The server's name isn't checked, only who signed it.
func (o Options) mutualConfig(b testing.TB, dir string) []byte {
	b.Helper()
	tls := o.tls(b, dir)
	clusters := []object{
		originalCluster("outbound", object{"transport_socket": tls("UpstreamTlsContext", nil)}),
		// From that address rules let it go on to the application.
		originalCluster("inbound", object{"upstream_bind_config": object{"source_address": object{"address": "127.0.0.6", "port_value": 0}}}),
	}
	outbound := []object{forward("outbound", nil)}
	for i, ip := range o.Services {
		name := fmt.Sprint("service-", i)
		clusters = append(clusters, object{
			"name": name, "type": "STATIC", "connect_timeout": "5s", "transport_socket": tls("UpstreamTlsContext", nil),
			"load_assignment": object{"cluster_name": name, "endpoints": []object{{"lb_endpoints": []object{{"endpoint": object{"address": socket(ip.String(), load.RequestPort)}}}}}},
		})
		outbound = append(outbound, forward(name, object{"prefix_ranges": []object{{"address_prefix": ip.String(), "prefix_len": ip.BitLen()}}}))
	}
	inbound := forward("inbound", nil)
	inbound["transport_socket"] = tls("DownstreamTlsContext", object{"require_client_certificate": true})
	text, err := json.Marshal(object{
		"node": object{"id": "sidecar", "cluster": "sidecar"},
		"static_resources": object{
			"listeners": []object{listener("outbound", xds.PortOutbound, outbound), listener("inbound", inboundPort, []object{inbound})},
			"clusters":  clusters,
		},
		// As tenants' proxies have it.
		"stats_config": object{"stats_matcher": object{"reject_all": true}},
	})
	lab.Check(b, err)
	return text
}

// tls makes transport sockets with a certificate of the sidecar.
func (o Options) tls(b testing.TB, dir string) func(kind string, more object) object {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	lab.Check(b, err)
	csr, err := identity.NewCSR(key, o.Identity)
	lab.Check(b, err)
	chain, err := o.Authority.Sign(csr, o.Identity, time.Hour, time.Now())
	lab.Check(b, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	lab.Check(b, err)
	files := map[string][]byte{"key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), "chain": certificates(chain), "roots": certificates(o.Authority.Roots())}
	source := object{}
	for name, content := range files {
		file := filepath.Join(dir, name)
		lab.Check(b, os.WriteFile(file, content, 0o644))
		source[name] = object{"filename": file}
	}
	return func(kind string, more object) object {
		config := object{
			"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3." + kind,
			"common_tls_context": object{
				"tls_certificates":   []object{{"certificate_chain": source["chain"], "private_key": source["key"]}},
				"validation_context": object{"trusted_ca": source["roots"]},
			},
		}
		for k, v := range more {
			config[k] = v
		}
		return object{"name": "envoy.transport_sockets.tls", "typed_config": config}
	}
}

func certificates(all [][]byte) []byte {
	var out bytes.Buffer
	for _, der := range all {
		pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	return out.Bytes()
}

func socket(ip string, port int) object {
	return object{"socket_address": object{"address": ip, "port_value": port}}
}

func listener(name string, port int, chains []object) object {
	return object{"name": name, "address": socket(netip.IPv4Unspecified().String(), port), "filter_chains": chains,
		"listener_filters": []object{{"name": "envoy.filters.listener.original_dst", "typed_config": object{"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}}}
}

// forward is a filter chain.
func forward(cluster string, match object) object {
	c := object{"name": cluster, "filters": []object{{"name": "envoy.filters.network.tcp_proxy", "typed_config": object{
		"@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": cluster, "cluster": cluster}}}}
	if match != nil {
		c["filter_chain_match"] = match
	}
	return c
}

func originalCluster(name string, more object) object {
	c := object{"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s"}
	for k, v := range more {
		c[k] = v
	}
	return c
}
