package xds

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

// Two service accounts with dual-stack pods, of which two share one.
var (
	testNetwork = model.Network{
		TrustDomain:  "cluster.local",
		PodCIDRs:     prefixes("10.1.0.0/16", "fd00:1::/32"),
		ServiceCIDRs: prefixes("10.96.0.0/16", "fd00:96::/108"),
	}
	testProxy = model.Proxy{
		Node: "node-1", Tenant: model.NamespaceTenant("team-a"), AccessLog: true,
		Workloads: []model.Workload{
			workload("web-0", "web", "10.1.0.2", "fd00:1::2"),
			workload("api-0", "api", "10.1.0.3", "fd00:1::3"),
			workload("web-1", "web", "10.1.0.130", "fd00:1::82"),
		},
	}
	testService = model.Service{
		Namespace: "team-a", Name: "api", VIPs: addrs("10.96.0.10", "fd00:96::10"),
		Ports: []model.ServicePort{{Name: "http", Port: 80, Endpoints: []model.Endpoint{
			{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")},
			{Addr: netip.MustParseAddrPort("10.1.0.4:8080"), Identity: identity("api"), Draining: true},
			{Addr: netip.MustParseAddrPort("10.1.0.9:8080")}, // outside of the mesh
			{Addr: netip.MustParseAddrPort("[fd00:1::3]:8080"), Identity: identity("api")},
		}}},
	}
)

// testRouting has one of everything.
var testRouting = model.Routing{Port: 80, Rules: []model.Rule{
	{
		Match: model.RequestMatch{
			Path: model.PathMatch{Kind: model.PathExact, Value: "/a"}, Method: "GET",
			Headers: []model.ValueMatch{{Name: "x-a", Value: "1"}, {Name: "x-b", Value: ".+", Regex: true}},
			Query:   []model.ValueMatch{{Name: "q", Value: "1"}, {Name: "r", Value: ".+", Regex: true}},
		},
		Action: &model.Action{
			Origin:          model.Origin{Kind: "HTTPRoute", Namespace: "team-a", Name: "api", Rule: "first"},
			RequestHeaders:  model.HeaderChange{Set: []model.Header{{Name: "x-set", Value: "50%"}}, Add: []model.Header{{Name: "x-add", Value: "a"}}, Remove: []string{"x-gone"}},
			ResponseHeaders: model.HeaderChange{Add: []model.Header{{Name: "x-seen", Value: "b"}}},
			Backends: []model.Backend{
				{To: toService("api", 80), Weight: 9, RequestHeaders: model.HeaderChange{Set: []model.Header{{Name: "x-backend", Value: "api"}}}},
				{Weight: 1}, {To: toService("unused", 80)},
			},
			Host: "inner.example.com", Path: &model.PathChange{Value: "/b"},
			Mirrors: []model.Mirror{{To: toService("copy", 80), Numerator: 1, Denominator: 10_000}},
			Timeout: 10 * time.Second, TryTimeout: time.Second, Retry: &model.Retry{Attempts: 2, Codes: []uint32{503}, Backoff: 100 * time.Millisecond},
		},
	},
	{Match: model.RequestMatch{Path: model.PathMatch{Kind: model.PathRegex, Value: "/x[0-9]+"}}, Action: &model.Action{Redirect: &model.Redirect{Code: 301, Scheme: "https", Path: &model.PathChange{Value: "/y"}}}},
	{Match: model.RequestMatch{Path: model.PathMatch{Value: "/c/"}}, Action: &model.Action{Redirect: &model.Redirect{Code: 307, Host: "example.com", Port: 8443, Path: &model.PathChange{Prefix: true, Value: "/d"}}}},
	{Match: model.RequestMatch{Path: model.PathMatch{Value: "/e"}}, Action: &model.Action{Backends: []model.Backend{{To: toService("api", 80), Weight: 1}}, Path: &model.PathChange{Prefix: true, Value: "/"}}},
	{Match: model.RequestMatch{Path: model.PathMatch{Value: "/"}}, Action: &model.Action{}},
}}

func toService(name string, port uint16) model.ServicePortKey {
	return model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: "team-a", Name: name}, Port: port}
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func identity(account string) model.Identity {
	return model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: account}
}

func workload(name, account string, ips ...string) model.Workload {
	return model.Workload{
		UID: "uid-" + name, Namespace: "team-a", Name: name, Node: "node-1",
		Identity: identity(account), Tenant: model.NamespaceTenant("team-a"), IPs: addrs(ips...),
	}
}

func plainWorkload(name string, ips ...string) model.Workload {
	return model.Workload{UID: "uid-" + name, Namespace: "other", Name: name, Node: "node-2", IPs: addrs(ips...)}
}

func TestGolden(t *testing.T) {
	vip4, vip6 := netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("[fd00:96::10]:80")
	pod4, pod6 := netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("fd00:1::3")
	one := func(m proto.Message, err error) ([]proto.Message, error) { return []proto.Message{m}, err }
	backend := Backend{ServicePortKey: model.ServicePortKey{ServiceKey: model.ServiceKey{Namespace: "team-a", Name: "api"}, Port: 80}}
	routes := func(r model.Routing) func() ([]proto.Message, error) {
		return func() ([]proto.Message, error) {
			m, _, err := Routes(vip4, backend.ServiceKey, r)
			return one(m, err)
		}
	}
	draining := model.Service{Namespace: "team-a", Name: "api", Ports: []model.ServicePort{{Port: 80, Endpoints: testService.Ports[0].Endpoints[1:2]}}}
	files := map[string]func() ([]proto.Message, error){
		"clusters-static":        func() ([]proto.Message, error) { return messages(StaticClusters()) },
		"cluster-vip":            func() ([]proto.Message, error) { return one(VIPCluster(vip4)) },
		"cluster-pod-mesh-ipv4":  func() ([]proto.Message, error) { return one(PodCluster(pod4, testProxy.Workloads[1])) },
		"cluster-pod-mesh-ipv6":  func() ([]proto.Message, error) { return one(PodCluster(pod6, testProxy.Workloads[1])) },
		"cluster-pod-plain":      func() ([]proto.Message, error) { return one(PodCluster(pod4, plainWorkload("p", "10.1.0.3"))) },
		"cluster-pod-unknown":    func() ([]proto.Message, error) { return one(UnknownPodCluster(pod4)) },
		"endpoints-ipv4":         func() ([]proto.Message, error) { return one(VIPEndpoints(vip4, testService, Place{})) },
		"endpoints-ipv6":         func() ([]proto.Message, error) { return one(VIPEndpoints(vip6, testService, Place{})) },
		"endpoints-all-draining": func() ([]proto.Message, error) { return one(VIPEndpoints(vip4, draining, Place{})) },
		"endpoints-unknown":      func() ([]proto.Message, error) { return one(VIPEndpoints(vip4, model.Service{}, Place{})) },
		"http-endpoints":         func() ([]proto.Message, error) { return one(HTTPEndpoints(vip6), nil) },
		"http-backend":           func() ([]proto.Message, error) { return one(BackendCluster(backend, model.ProtocolHTTP)) },
		"http-backend-h2c":       func() ([]proto.Message, error) { return one(BackendCluster(backend, model.ProtocolHTTP2)) },
		"http-backend-ws":        func() ([]proto.Message, error) { return one(BackendCluster(backend, model.ProtocolHTTP1)) },
		"http-backend-endpoints": func() ([]proto.Message, error) { return one(BackendEndpoints(backend, testService, Place{}), nil) },
		"http-mirror":            func() ([]proto.Message, error) { return one(mirrorCluster()) },
		"http-routes":            routes(testRouting),
		"http-routes-none":       routes(model.Routing{}),
	}
	for name, build := range files {
		t.Run(name, func(t *testing.T) {
			ms, err := build()
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".yaml", yamlOf(t, ms))
		})
	}
	if *update {
		old, _ := filepath.Glob("testdata/*.yaml")
		for _, f := range old {
			if files[filepath.Base(f[:len(f)-len(".yaml")])] == nil {
				os.Remove(f)
			}
		}
	}
}

func messages[M proto.Message](ms []M, err error) (out []proto.Message, _ error) {
	for _, m := range ms {
		out = append(out, m)
	}
	return out, err
}

// yamlOf is how messages are on record. It validates them.
func yamlOf(t *testing.T, ms []proto.Message) []byte {
	t.Helper()
	var out bytes.Buffer
	for _, m := range ms {
		validateAll(t, m.ProtoReflect())
		out.WriteString("---\n")
		out.Write(toYAML(t, m))
	}
	return out.Bytes()
}

func toYAML(t *testing.T, m proto.Message) []byte {
	t.Helper()
	j, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(j, &v); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	file = filepath.Join("testdata", file)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; if that is right: go test ./xds -run TestGolden -update\n%s", file, got)
	}
}

// validateAll validates m and every message that an Any in it holds.
func validateAll(t *testing.T, m protoreflect.Message) {
	t.Helper()
	if err := validate(m.Interface()); err != nil {
		t.Error(err)
	}
	if a, ok := m.Interface().(*anypb.Any); ok {
		inner, err := a.UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		validateAll(t, inner.ProtoReflect())
		return
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			if f.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { validateAll(t, v.Message()); return true })
			}
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				validateAll(t, v.List().Get(i).Message())
			}
		default:
			validateAll(t, v.Message())
		}
		return true
	})
}
