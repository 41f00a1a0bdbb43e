package e2e

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"path"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// registryHere is an image registry on this machine, which the nodes reach.
type registryHere struct {
	address string
	server  *http.Server
	// altered is the digest of what is served with another end than it has; "" for
	// nothing.
	altered atomic.Pointer[string]
}

// newRegistry serves one, without TLS, where the API server's answers come to: nodes
// that reach the API server by this machine reach that. dir has its blobs. The caller
// closes it.
func newRegistry(dir string) (*registryHere, error) {
	api, err := url.Parse(e.Config.Host)
	if err != nil {
		return nil, fmt.Errorf("read the API server's address: %w", err)
	}
	port := api.Port()
	if port == "" {
		port = "443"
	}
	// Nothing is sent: it is only asked which address would be.
	probe, err := net.Dial("udp", net.JoinHostPort(api.Hostname(), port))
	if err != nil {
		return nil, fmt.Errorf("find this machine's address: %w", err)
	}
	host := probe.LocalAddr().(*net.UDPAddr).IP.String()
	probe.Close()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, fmt.Errorf("serve a registry: %w", err)
	}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)))
	r := &registryHere{address: l.Addr().String()}
	r.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if digest := r.altered.Load(); digest != nil && request.Method == http.MethodGet && path.Base(request.URL.Path) == *digest {
			w = &altering{ResponseWriter: w}
		}
		inner.ServeHTTP(w, request)
	})}
	go r.server.Serve(l)
	return r, nil
}

// Close ends it.
func (r *registryHere) Close() error { return r.server.Close() }

// alter has what has that digest served altered.
func (r *registryHere) alter(digest string) { r.altered.Store(&digest) }

// altering alters the last byte of each part that is written.
type altering struct{ http.ResponseWriter }

func (a *altering) Write(p []byte) (int, error) {
	p = bytes.Clone(p)
	if len(p) > 0 {
		p[len(p)-1] ^= 1
	}
	return a.ResponseWriter.Write(p)
}

// Name is what an image of that digest would be called there.
func (r *registryHere) Name(digest string) string { return r.address + "/bulkhead/envoy@" + digest }

// Push puts an image there and returns its name.
func (r *registryHere) Push(img v1.Image) (string, error) {
	digest, err := img.Digest()
	if err != nil {
		return "", err
	}
	ref, err := name.NewDigest(r.Name(digest.String()))
	if err != nil {
		return "", err
	}
	return ref.String(), remote.Write(ref, img)
}

// startRegistry is newRegistry for as long as the test.
func startRegistry(t *testing.T) *registryHere {
	t.Helper()
	r, err := newRegistry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// allServe waits for all tenants to have the version that there is without a rollout:
// deleted ones of the test before, the later first, have proxies follow.
func allServe(t *testing.T) {
	t.Helper()
	for _, tenant := range tenants {
		onlyVersion(t, tenant, newEnvoy)
	}
	e.goesOn(t)
}
