package xds

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Clients that upload and leave, many more than a worker is done with, wait in the kernel:
// what a proxy holds is what it is at work on, and not all that came.
func TestUploadsWaitInTheKernel(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			store, server, _ := envoyStore(t)
			var arrived atomic.Int64
			serveEach(t, "10.1.0.3:8080", func(c net.Conn) {
				defer c.Close()
				io.Copy(io.Discard, c)
				arrived.Add(1)
			})
			at := model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")}
			if err := store.SetService(endpointService("web", "10.96.1.1", at)); err != nil {
				t.Fatal(err)
			}
			route(t, store, "", prefixed("/", model.Action{Backends: to("web")}))
			e := startEnvoy(t, version, server, newAuthority(t))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
				t.Fatal(err)
			}
			var request bytes.Buffer
			fmt.Fprintf(&request, "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: %d\r\n\r\n", 1<<20)
			request.Write(make([]byte, 1<<20))

			upload := func() func() {
				c, err := dialFrom("10.1.0.2", "10.96.1.1:15001")
				if err != nil {
					t.Fatal(err)
				}
				return func() {
					c.Write(request.Bytes())
					c.Close()
				}
			}
			upload()()
			eventually(t, "all that there is to ask for and to open is there", func() bool {
				return arrived.Load() > 0 && slices.ContainsFunc(e.listeners()[listenerOutbound].GetFilterChains(), func(c *listenerv3.FilterChain) bool { return strings.HasPrefix(c.Name, "http/") })
			})

			const uploads = 300
			e.signal(syscall.SIGSTOP) // as behind as can be
			var clients sync.WaitGroup
			for range uploads {
				clients.Go(upload())
			}
			e.signal(syscall.SIGCONT)
			connections, heap := 0, 0
			eventually(t, "all have been read", func() bool {
				connections = max(connections, e.count(`^listener\....._15001\.downstream_cx_active`))
				heap = max(heap, e.allocated())
				return e.count(`^listener\....._15001\.downstream_cx_total`) > uploads && e.count(`^listener\....._15001\.downstream_cx_active`) == 0
			})
			clients.Wait()
			t.Logf("%d connections at a time, %d MiB at most, %d arrived", connections, heap>>20, arrived.Load())
			if connections > uploads/4 {
				t.Errorf("%d connections were taken at a time, of %d; want those that there is time for", connections, uploads)
			}
		})
	}
}

// allocated is how many bytes Envoy's heap has in use.
func (e *envoy) allocated() int {
	e.t.Helper()
	_, v, _ := strings.Cut(e.get("/memory"), `"allocated": "`)
	v, _, _ = strings.Cut(v, `"`)
	n, err := strconv.Atoi(v)
	if err != nil {
		e.t.Fatalf("the heap's size isn't told: %v", err)
	}
	return n
}
