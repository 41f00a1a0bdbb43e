package isolation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// withKey are a cluster whose key comes by SDS, and another one that holds the
// same in itself.
func withKey(t *testing.T) (resources map[string]proto.Message, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	inline := func(data []byte) *core.DataSource {
		return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: data}}
	}
	pair := &tls.TlsCertificate{PrivateKey: inline(keyPEM), CertificateChain: inline(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))}
	ads := &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3, ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}}}
	with := func(name string, context *tls.CommonTlsContext) *cluster.Cluster {
		packed, err := anypb.New(&tls.UpstreamTlsContext{CommonTlsContext: context})
		if err != nil {
			t.Fatal(err)
		}
		return &cluster.Cluster{Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}, TransportSocket: &core.TransportSocket{
			Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed},
		}}
	}
	return map[string]proto.Message{
		"by-sds":     with("by-sds", &tls.CommonTlsContext{TlsCertificateSdsSecretConfigs: []*tls.SdsSecretConfig{{Name: "the-secret", SdsConfig: ads}}}),
		"inline":     with("inline", &tls.CommonTlsContext{TlsCertificates: []*tls.TlsCertificate{pair}}),
		"the-secret": &tls.Secret{Name: "the-secret", Type: &tls.Secret_TlsCertificate{TlsCertificate: pair}},
	}, keyPEM
}

// What an owner may see of a proxy, and what nobody may.
func TestDebug(t *testing.T) {
	n := newNode(t)
	m := n.open()
	resources, key := withKey(t)
	n.serveXDS(m, tenantA, 1, resources)
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, dist.Default}}}); err != nil {
		t.Fatal(err)
	}
	before := n.waitLive(m, tenantA, 0)

	t.Run("keys are redacted", func(t *testing.T) {
		// Asked for without the guard, to see what Envoy itself does.
		dump, err := m.ask(t.Context(), tenantA, 1, http.MethodGet, "/config_dump?include_eds")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"the-secret", "by-sds", "inline", base64.StdEncoding.EncodeToString([]byte("[redacted]"))} {
			if !bytes.Contains(dump, []byte(want)) {
				t.Errorf("the dump lacks %s:\n%s", want, dump)
			}
		}
		secret := strings.Split(string(key), "\n")[1]
		for _, never := range []string{secret, base64.StdEncoding.EncodeToString(key)[:40], "PRIVATE KEY"} {
			if bytes.Contains(dump, []byte(never)) {
				t.Errorf("the dump holds a key: %s", never)
			}
		}
		if guarded, err := m.ConfigDump(t.Context(), tenantA, 1, ""); err != nil || !bytes.Contains(guarded, []byte("by-sds")) {
			t.Errorf("%v: %.200s", err, guarded)
		}
		// The guard itself knows both ways in which a key can be written.
		for _, text := range []string{string(key), base64.StdEncoding.EncodeToString(key)} {
			if !holdsKey([]byte("{\"private_key\": \"" + text + "\"}")) {
				t.Errorf("not taken for a key: %s", text)
			}
		}
	})
	t.Run("part of the configuration", func(t *testing.T) {
		part, err := m.ConfigDump(t.Context(), tenantA, 1, "dynamic_active_clusters")
		if err != nil || !bytes.Contains(part, []byte("by-sds")) || bytes.Contains(part, []byte("BootstrapConfigDump")) {
			t.Errorf("%v: %.300s", err, part)
		}
	})
	t.Run("stats", func(t *testing.T) {
		stats, err := m.Stats(t.Context(), tenantA, 1, "^server.live$")
		if err != nil || string(stats) != "server.live: 1\n" {
			t.Errorf("%v: %.200q", err, stats)
		}
	})
	t.Run("heap profile", func(t *testing.T) {
		heap, err := m.HeapProfile(t.Context(), tenantA, 1)
		if err != nil || len(heap) == 0 {
			t.Errorf("%v: %d bytes", err, len(heap))
		}
		t.Logf("%d bytes: %.60q", len(heap), heap)
	})
	t.Run("log level", func(t *testing.T) {
		levels, err := m.SetLogLevel(t.Context(), tenantA, 1, "", "debug")
		if err != nil || !strings.Contains(string(levels), "upstream: debug") {
			t.Errorf("%v: %.300s", err, levels)
		}
		if levels, err = m.SetLogLevel(t.Context(), tenantA, 1, "upstream", "error"); err != nil || !strings.Contains(string(levels), "upstream: error") {
			t.Errorf("%v: %.300s", err, levels)
		}
		if levels, err = m.LogLevel(t.Context(), tenantA, 1); err != nil || !strings.Contains(string(levels), "admin: debug") || !strings.Contains(string(levels), "upstream: error") {
			t.Errorf("%v: %.300s", err, levels)
		}
		n.await(m, tenantA, "logs nothing at debug", func(State) bool { return strings.Contains(n.logs(m, tenantA), "[debug]") })
		for _, bad := range [][2]string{{"", "loud"}, {"a&level", "debug"}, {"level", "debug"}, {"paths", "debug"}, {"x y", "debug"}} {
			if _, err := m.SetLogLevel(t.Context(), tenantA, 1, bad[0], bad[1]); err == nil {
				t.Errorf("taken: %q", bad)
			}
		}
	})
	t.Run("all paths", func(t *testing.T) {
		for _, path := range adminPaths {
			if _, err := m.Admin(t.Context(), tenantA, 1, path); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	})
	t.Run("nothing else", func(t *testing.T) {
		for _, path := range []string{
			"/quitquitquit", "/drain_listeners", "/healthcheck/fail", "/reset_counters", "/runtime_modify?a=b", "/logging?level=off",
			"/tap", "/cpuprofiler?enable=y", "/heapprofiler?enable=y", "/reopen_logs", "/", "", "/help",
			"/stats/../quitquitquit", "//quitquitquit", "http://x/stats", "/stats%2f..%2fquitquitquit", "/stats\r\nPOST /quitquitquit",
		} {
			if body, err := m.Admin(t.Context(), tenantA, 1, path); !errors.Is(err, ErrAdminPath) {
				t.Errorf("%q: %v %.100s", path, err, body)
			}
		}
		if _, err := m.Admin(t.Context(), tenantA, 2, "/stats"); !errors.Is(err, ErrNoProcess) {
			t.Errorf("a generation that isn't there: %v", err)
		}
	})
	t.Run("bounded", func(t *testing.T) {
		if _, err := adminAsk(t.Context(), m.o.netnsPath(tenantA), 1, http.MethodGet, "/stats", debugTimeout, 1000); !errors.Is(err, ErrTooLarge) {
			t.Errorf("more than 1000 bytes: %v", err)
		}
	})
	if now := n.waitLive(m, tenantA, 0); now != before {
		t.Errorf("the process is %+v, was %+v", now, before)
	}
}
