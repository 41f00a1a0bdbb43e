package xds

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bootstrap"
)

const typeSecret = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// node answers for one proxy what its agent would: secrets itself, the rest is the
// server's.
type node struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	server *Server
	ca     *authority
	// issued are the identities whose certificates it gives out.
	issued []string
	// edit changes what the server sends, if it isn't nil.
	edit func(proto.Message) error
}

func (n *node) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return n.server.DeltaAggregatedResources(&withSecrets{AggregatedDiscoveryService_DeltaAggregatedResourcesServer: g, node: n})
}

type withSecrets struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	node *node
	mu   sync.Mutex
}

func (s *withSecrets) Send(r *discoveryv3.DeltaDiscoveryResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.node.edit != nil {
		r = proto.CloneOf(r) // its resources are all streams'
		if err := s.node.edit(r); err != nil {
			return err
		}
	}
	return s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Send(r)
}

func (s *withSecrets) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	for {
		r, err := s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Recv()
		if err != nil || r.TypeUrl != typeSecret {
			return r, err
		}
		for _, name := range r.ResourceNamesSubscribe {
			answer := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeSecret, Nonce: "secret " + name}
			if name == RootCA || slices.Contains(s.node.issued, name) {
				a, err := pack(s.node.ca.secret(name))
				if err != nil {
					return nil, err
				}
				answer.Resources = []*discoveryv3.Resource{{Name: name, Version: "1", Resource: a}}
			} else {
				answer.RemovedResources = []string{name}
			}
			if err := s.Send(answer); err != nil {
				return nil, err
			}
		}
	}
}

// envoy is a real one.
type envoy struct {
	t      *testing.T
	server *Server
	ca     *authority
	dir    string
	admin  *http.Client
	log    *os.File
	// process is Envoy's.
	process *os.Process
}

// startEnvoy runs Envoy against the store, as testProxy's, in the calling thread's
// network namespace, until the test ends. It returns when Envoy is live.
func startEnvoy(t *testing.T, version string, server *Server, ca *authority) *envoy {
	t.Helper()
	return startEnvoyWith(t, version, 1, server, ca)
}

// startEnvoyWith is startEnvoy with more than one worker thread.
func startEnvoyWith(t *testing.T, version string, workers int, server *Server, ca *authority) *envoy {
	t.Helper()
	return startEnvoyEdited(t, version, workers, server, ca, nil)
}

// startEnvoyEdited is startEnvoyWith with a configuration that edit changes, and more
// arguments.
func startEnvoyEdited(t *testing.T, version string, workers int, server *Server, ca *authority, edit func(proto.Message) error, args ...string) *envoy {
	t.Helper()
	bin, err := dist.Fetch(t.Context(), version)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its names may be too long for a socket.
	dir, err := os.MkdirTemp("", "bulkhead-xds-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "xds.sock"))
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(GRPCOptions()...)
	n := &node{server: server, ca: ca, issued: []string{identity("web").String(), identity("api").String()}, edit: edit}
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, n)
	go g.Serve(l)
	t.Cleanup(g.Stop)

	if err := os.WriteFile(filepath.Join(dir, "bootstrap.yaml"), []byte(bootstrap.ADS), 0o600); err != nil {
		t.Fatal(err)
	}
	e := &envoy{t: t, server: server, ca: ca, dir: dir, admin: &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dir, "admin.sock"))
	}}}}
	if e.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin.Binary, append(args, "-c", "bootstrap.yaml", "--concurrency", strconv.Itoa(workers), "--disable-hot-restart", "--file-flush-interval-msec", "50",
		"--component-log-level", "misc:error")...) // of messages that are marked as work in progress, one for each address
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, e.log, e.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e.process = cmd.Process
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
		e.log.Close()
		if t.Failed() {
			log, _ := os.ReadFile(e.log.Name())
			t.Logf("Envoy's log:\n%s", log[max(0, len(log)-8<<10):])
		}
	})
	eventually(t, "Envoy is live", func() bool {
		select {
		case <-exited:
			t.Fatal("Envoy ended")
		default:
		}
		return strings.HasPrefix(e.get("/ready"), "LIVE")
	})
	return e
}

// signal sends Envoy a signal.
func (e *envoy) signal(s os.Signal) {
	e.t.Helper()
	if err := e.process.Signal(s); err != nil {
		e.t.Fatal(err)
	}
}

// get asks the admin interface; "" while it doesn't answer.
func (e *envoy) get(path string) string {
	r, err := e.admin.Get("http://envoy" + path)
	if err != nil {
		return ""
	}
	defer r.Body.Close()
	body, _ := io.ReadAll(r.Body)
	return string(body)
}

// listeners are those in force, by name. It fails if any was refused. (Their
// versions say nothing: Envoy keeps the old one when it updates in place.)
func (e *envoy) listeners() map[string]*listenerv3.Listener {
	e.t.Helper()
	type state struct{ Listener json.RawMessage }
	got := map[string]*listenerv3.Listener{}
	for _, c := range dump[struct {
		Name         string
		ActiveState  *state          `json:"active_state"`
		WarmingState *state          `json:"warming_state"`
		ErrorState   json.RawMessage `json:"error_state"`
	}](e, "dynamic_listeners") {
		if c.ErrorState != nil {
			e.t.Errorf("listener %s: %s", c.Name, c.ErrorState)
		}
		if c.ActiveState == nil || c.WarmingState != nil {
			continue
		}
		a, l := &anypb.Any{}, &listenerv3.Listener{}
		if err := protojson.Unmarshal(c.ActiveState.Listener, a); err != nil {
			e.t.Fatal(err)
		}
		if err := a.UnmarshalTo(l); err != nil {
			e.t.Fatal(err)
		}
		got[c.Name] = l
	}
	return got
}

// clusters are the names of those in force, sorted.
func (e *envoy) clusters() (names []string) {
	e.t.Helper()
	for _, c := range dump[struct{ Cluster struct{ Name string } }](e, "dynamic_active_clusters") {
		names = append(names, c.Cluster.Name)
	}
	slices.Sort(names)
	return names
}

// dump reads one resource of the config dump.
func dump[T any](e *envoy, resource string) []T {
	e.t.Helper()
	var d struct{ Configs []T }
	if body := e.get("/config_dump?resource=" + resource); json.Unmarshal([]byte(body), &d) != nil {
		e.t.Fatalf("the config dump isn't JSON: %.2000s", body)
	}
	return d.Configs
}

// refused are the counters that tell of configuration that Envoy didn't take.
func (e *envoy) refused() (out []string) {
	for line := range strings.Lines(e.get("/stats?filter=rejected|create_failure")) {
		if line = strings.TrimSpace(line); !strings.HasSuffix(line, ": 0") {
			out = append(out, line)
		}
	}
	return out
}

func envoyStore(t *testing.T) (*Store, *Server, func() []Rejection) {
	t.Helper()
	var mu sync.Mutex
	var rejections []Rejection
	quiet := slog.New(slog.DiscardHandler)
	store := NewStore(StoreOptions{Logger: quiet, OnReject: func(r Rejection) {
		mu.Lock()
		defer mu.Unlock()
		rejections = append(rejections, r)
	}})
	for _, err := range []error{store.SetNetwork(testNetwork), store.SetProxy(testProxy), store.SetService(testService)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	store.MarkSynced()
	server := NewServer(store, ServerOptions{Logger: quiet, Authorize: func(context.Context) (StreamIdentity, error) {
		return StreamIdentity{Node: testProxy.Node, Tenant: testProxy.Tenant}, nil
	}})
	return store, server, func() []Rejection {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(rejections)
	}
}

// Every pinned Envoy takes all that any proxy gets from the start, and its updates.
func TestEnvoyAccepts(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			store, server, rejections := envoyStore(t)
			e := startEnvoy(t, version, server, newAuthority(t))
			steps := []struct {
				name  string
				proxy model.Proxy
			}{
				{"two accounts", testProxy},
				{"one pod more", func() model.Proxy {
					p := testProxy
					p.Workloads = append(slices.Clone(p.Workloads), workload("web-2", "web", "10.1.0.4"))
					return p
				}()},
				{"one account", model.Proxy{Node: testProxy.Node, Tenant: testProxy.Tenant, Workloads: testProxy.Workloads[:1]}},
				{"no pods", model.Proxy{Node: testProxy.Node, Tenant: testProxy.Tenant}},
				{"two accounts again", testProxy},
			}
			for _, step := range steps {
				if err := store.SetProxy(step.proxy); err != nil {
					t.Fatal(err)
				}
				want, err := Listeners(testNetwork, step.proxy)
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, step.name+" is in force", func() bool {
					if rs := rejections(); len(rs) > 0 {
						t.Fatalf("%s: %+v", step.name, rs)
					}
					got := e.listeners()
					for _, l := range want {
						if !proto.Equal(got[l.Name], l) {
							return false
						}
					}
					return len(got) == len(want)
				})
			}
			if got, want := e.clusters(), slices.Sorted(slices.Values(staticNames)); !slices.Equal(got, want) {
				t.Errorf("clusters %q are in force; want %q", got, want)
			}
			for _, w := range testProxy.Workloads {
				if err := server.WaitServed(t.Context(), testProxy.Key(), w.UID); err != nil {
					t.Error(err)
				}
			}
			if r := e.refused(); len(r) > 0 {
				t.Errorf("Envoy refused something: %v", r)
			}
		})
	}
}
