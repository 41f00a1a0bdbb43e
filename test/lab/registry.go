package lab

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// registryPort is where nodes find the registry, each on its own loopback.
const registryPort = 15500

// Registry is a registry that both nodes reach.
type Registry struct {
	// Hold, if it isn't nil, is called before each answer to a node.
	Hold func(r *http.Request)

	inner http.Handler
}

// NewRegistry serves one. It ends with the test.
func (l *Lab) NewRegistry(t testing.TB) *Registry {
	t.Helper()
	r := &Registry{inner: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(t.TempDir())))}
	for _, n := range []*Node{l.Node1, l.Node2} {
		var listener net.Listener
		n.Do(t, func() {
			var err error
			listener, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", registryPort))
			Check(t, err)
		})
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if r.Hold != nil {
				r.Hold(req)
			}
			r.inner.ServeHTTP(w, req)
		})}
		go s.Serve(listener)
		t.Cleanup(func() { s.Close() })
	}
	return r
}

// Push puts an image there and returns what a node's plan says of it.
func (r *Registry) Push(t testing.TB, version string, img v1.Image) v1alpha1.NodeImage {
	t.Helper()
	digest, err := img.Digest()
	Check(t, err)
	ref, err := name.NewDigest(fmt.Sprintf("127.0.0.1:%d/bulkhead/envoy@%s", registryPort, digest))
	Check(t, err)
	Check(t, remote.Write(ref, img, remote.WithTransport(r)))
	return v1alpha1.NodeImage{Version: version + "+" + digest.Hex[:12], Image: ref.String()}
}

// RoundTrip implements http.RoundTripper without a network: the test itself has none.
func (r *Registry) RoundTrip(req *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if req.Body == nil {
		req.Body = http.NoBody
	}
	r.inner.ServeHTTP(w, req)
	res := w.Result()
	res.Request = req
	return res, nil
}
