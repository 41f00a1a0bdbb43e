// Package sidecar runs what the mesh is compared with: an Envoy in a pod's own network
// namespace, to which iptables redirects.
package sidecar

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// user is whose connections aren't redirected.
const user = 1337

// rules are what istio-init makes of iptables' nat table, as iptables-nft
// would write them.
const rules = `
table ip sidecar {
	chain out_redirect {
		meta l4proto tcp redirect to :15001
	}
	chain in_redirect {
		meta l4proto tcp redirect to :15006
	}
	chain inbound {
		tcp dport 15008 return
		tcp dport 15090 return
		tcp dport 15021 return
		tcp dport 15020 return
		meta l4proto tcp jump in_redirect
	}
	chain outbound {
		oifname "lo" ip saddr 127.0.0.6 return
		oifname "lo" ip daddr != 127.0.0.1 tcp dport != 15008 meta skuid 1337 jump in_redirect
		oifname "lo" meta skuid != 1337 return
		meta skuid 1337 return
		oifname "lo" ip daddr != 127.0.0.1 meta skgid 1337 jump in_redirect
		oifname "lo" meta skgid != 1337 return
		meta skgid 1337 return
		ip daddr 127.0.0.1 return
		jump out_redirect
	}
	chain prerouting {
		type nat hook prerouting priority -100
		meta l4proto tcp jump inbound
	}
	chain output {
		type nat hook output priority -100
		meta l4proto tcp jump outbound
	}
}
`

// Options of a sidecar. The zero value is one that forwards TCP as it comes, with the
// listener and the cluster by which a tenant's Envoy forwards to hosts outside of the
// mesh; only where the destination comes from differs.
type Options struct {
	// Name of the container, default "sidecar", and its container.Limits.Group.
	Name, Group string
	// Authority has all connections from and to the pod be mutual TLS with other such
	// sidecars, by a certificate of its own for Identity.
	Authority *identity.Authority
	Identity  model.Identity
	// Services that it knows, with Authority: a cluster and a filter chain each.
	Services []netip.Addr
	// Workers are its threads. Default 2.
	Workers int
}

// Start runs an Envoy in a pod's network namespace, to which the pod's connections
// are redirected, and returns its PID.
func Start(b testing.TB, h *lab.Host, o Options) int {
	b.Helper()
	envoy, err := dist.Fetch(b.Context(), dist.Default)
	lab.Check(b, err)
	dir := b.TempDir()
	// The test's folder is root's alone, and so is the cache.
	lab.Check(b, os.Chmod(dir, 0o755))
	lab.Check(b, os.Chmod(filepath.Dir(dir), 0o755))
	content, ports := plainConfig(b, h), []int{xds.PortOutbound}
	if o.Authority != nil {
		content, ports = o.mutualConfig(b, dir), []int{xds.PortOutbound, inboundPort}
	}
	config := filepath.Join(dir, "envoy.json")
	lab.Check(b, os.WriteFile(config, content, 0o644))
	log, err := os.Create(filepath.Join(dir, "log"))
	lab.Check(b, err)
	defer log.Close()
	cmd := exec.Command(binary(b, envoy.Binary), "--config-path", config, "--disable-hot-restart", "--concurrency", fmt.Sprint(cmp.Or(o.Workers, 2)), "--log-level", "warning")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Credential: &syscall.Credential{Uid: user, Gid: user}}
	h.Do(b, func() {
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader(rules)
		if out, err := nft.CombinedOutput(); err != nil {
			b.Fatalf("nft: %v: %s", err, out)
		}
		lab.Check(b, cmd.Start())
	})
	container.Put(b, cmp.Or(o.Name, "sidecar"), cmd.Process.Pid, container.Limits{Group: o.Group, Memory: container.Pod.Memory})
	b.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lab.Eventually(b, "the sidecar's listeners", func() error {
		var listening []byte
		h.Do(b, func() { listening, _ = os.ReadFile("/proc/thread-self/net/tcp") })
		for _, port := range ports {
			if !strings.Contains(string(listening), fmt.Sprintf("00000000:%04X 00000000:0000 0A", port)) {
				text, _ := os.ReadFile(log.Name())
				return fmt.Errorf("it doesn't listen on port %d: %s", port, text)
			}
		}
		return nil
	})
	return cmd.Process.Pid
}

// binary is one copy of Envoy for all sidecars of a benchmark, so that they share its
// text.
func binary(b testing.TB, original string) string {
	b.Helper()
	file := filepath.Join(os.TempDir(), fmt.Sprintf("bulkhead-sidecar-%d", os.Getpid()), "envoy")
	if _, err := os.Stat(file); err == nil {
		return file
	}
	dir := filepath.Dir(file)
	lab.Check(b, os.MkdirAll(dir, 0o755))
	b.Cleanup(func() { lab.Check(b, os.RemoveAll(dir)) })
	if out, err := exec.Command("cp", original, file).CombinedOutput(); err != nil {
		b.Fatalf("copy Envoy: %v: %s", err, out)
	}
	return file
}

func plainConfig(b testing.TB, h *lab.Host) []byte {
	b.Helper()
	self := model.Identity{TrustDomain: lab.TrustDomain, Namespace: "side", ServiceAccount: "side"}
	w := model.Workload{UID: h.Name, Namespace: "side", Name: h.Name, Node: h.Node.Name, Identity: self, Tenant: model.NamespaceTenant("side"), IPs: h.Both()}
	ls, err := xds.Listeners(model.Network{TrustDomain: lab.TrustDomain}, model.Proxy{Node: h.Node.Name, Tenant: w.Tenant, Workloads: []model.Workload{w}})
	lab.Check(b, err)
	cs, err := xds.StaticClusters()
	lab.Check(b, err)
	outbound := ls[slices.IndexFunc(ls, func(l *listenerv3.Listener) bool { return l.Name == "outbound" })]
	restored, err := anypb.New(&originaldstv3.OriginalDst{})
	lab.Check(b, err)
	// SO_ORIGINAL_DST isn't to be had of an IPv6 socket with an IPv4 connection.
	address := outbound.Address.GetSocketAddress()
	address.Address, address.Ipv4Compat = "0.0.0.0", false
	outbound.ListenerFilters = []*listenerv3.ListenerFilter{{
		Name: "envoy.filters.listener.original_dst", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: restored},
	}}
	outbound.FilterChainMatcher = nil
	outbound.FilterChains = slices.DeleteFunc(outbound.FilterChains, func(c *listenerv3.FilterChain) bool { return c.Name != "pass" })
	passthrough := slices.DeleteFunc(cs, func(c *clusterv3.Cluster) bool { return c.Name != "passthrough" })
	text, err := protojson.Marshal(&bootstrapv3.Bootstrap{StaticResources: &bootstrapv3.Bootstrap_StaticResources{
		Listeners: []*listenerv3.Listener{outbound}, Clusters: passthrough,
	}})
	lab.Check(b, err)
	var config map[string]any
	lab.Check(b, json.Unmarshal(text, &config))
	config["node"] = map[string]any{"id": "sidecar", "cluster": "sidecar"}
	text, err = json.Marshal(config)
	lab.Check(b, err)
	return text
}
