package e2e

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// registryHere is an image registry on this machine, which the nodes reach.
type registryHere struct {
	address string
	server  *http.Server
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
	r := &registryHere{address: l.Addr().String(), server: &http.Server{
		Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)))}}
	go r.server.Serve(l)
	return r, nil
}

// Close ends it.
func (r *registryHere) Close() error { return r.server.Close() }

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
