package xds

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// serveOnce answers one line of a client and closes at once.
func serveOnce(t *testing.T, addr string) {
	t.Helper()
	serveEach(t, addr, func(c net.Conn) {
		buf := make([]byte, 1024)
		if _, err := c.Read(buf); err == nil {
			io.WriteString(c, strings.Repeat("x", 373))
		}
		c.Close()
	})
}

// A server may answer and close in one go: the answer arrives. (It takes isolation's
// setting of enable_send_rst_on_user_space_socket.)
func TestServerClosesAtOnce(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			store, server, _ := envoyStore(t)
			if err := store.SetService(endpointService("once", "10.96.1.1", model.Endpoint{Addr: netip.MustParseAddrPort("10.1.0.3:8080"), Identity: identity("api")})); err != nil {
				t.Fatal(err)
			}
			serveOnce(t, "10.1.0.3:8080")
			startEnvoy(t, version, server, newAuthority(t))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-web-0"); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				c, err := dialFrom("10.1.0.2", "10.96.1.1:15001")
				if err != nil {
					t.Fatal(err)
				}
				io.WriteString(c, "hello\n")
				got, err := io.ReadAll(c)
				c.Close()
				if len(got) != 373 || err != nil {
					t.Errorf("got %d bytes, %v", len(got), err)
				}
			}
		})
	}
}
