// Package image brings versions of Envoy to a node that its agent doesn't bring
// along: from OCI images, by digest.
//
// Such an image is a tree as a proxy runs in it: /envoy and the libraries that it
// needs, regular files alone. Its label org.opencontainers.image.version says which
// Envoy it is.
package image

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/version"
)

// Oldest is the oldest Envoy that the product knows how to configure.
const Oldest = "1.39.0"

// labelVersion names the version in an image's configuration.
const labelVersion = "org.opencontainers.image.version"

// Bounds of an image. Envoy with its libraries has about 110 MB in 10 files.
const (
	maxLayers  = 16
	maxConfig  = 1 << 20
	maxEntries = 4096
	maxTree    = 1 << 30
	// maxDepth is how many folders a file may be in: a path has room for a million,
	// which nobody could remove again.
	maxDepth = 16
)

// What can be wrong with an image.
var (
	ErrTooOld   = errors.New("too old")
	ErrInvalid  = errors.New("no image of a proxy")
	ErrTampered = errors.New("not what its digest says")
	ErrDiskFull = errors.New("no room on the node's disk")
)

// Source is an image, and the version that it is known by.
type Source struct {
	// Version is the Envoy's version, a plus, and the first twelve digits of the
	// image's digest: 1.40.0+4f53cda18c2b.
	Version string
	// Reference is a repository and a digest.
	Reference string
}

var versionPattern = regexp.MustCompile(`^([0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]{1,24})?)\+([0-9a-f]{12})$`)

// parse returns the image's reference and the Envoy's version. The error wraps
// ErrInvalid or ErrTooOld.
func (s Source) parse() (name.Digest, string, error) {
	ref, err := name.NewDigest(s.Reference, name.StrictValidation)
	if err != nil {
		return ref, "", fmt.Errorf("%w: %q isn't a repository and a digest (host/repository@sha256:…): %w", ErrInvalid, s.Reference, err)
	}
	parts := versionPattern.FindStringSubmatch(s.Version)
	_, digits, _ := strings.Cut(ref.DigestStr(), ":")
	if parts == nil || !strings.HasPrefix(digits, parts[2]) {
		return ref, "", fmt.Errorf("%w: version %q of %s must end with + and the first twelve digits of its digest", ErrInvalid, s.Version, s.Reference)
	}
	v, err := version.ParseSemantic(parts[1])
	if err != nil {
		return ref, "", fmt.Errorf("%w: version %q: %w", ErrInvalid, s.Version, err)
	}
	if v.LessThan(version.MustParseSemantic(Oldest)) {
		return ref, "", fmt.Errorf("%w: Envoy %s, the oldest that can be run is %s", ErrTooOld, parts[1], Oldest)
	}
	return ref, parts[1], nil
}

// Access is what a registry wants to see, and whom it is believed to be.
type Access struct {
	// Keychain has the node's credentials. Default: none.
	Keychain authn.Keychain
	// Roots that registries' certificates must be of. Default: this machine's.
	Roots *x509.CertPool
}

// puller pulls images.
type puller struct {
	access Access
	// reserve is what of the disk must stay free, in bytes.
	reserve uint64
}

// pull unpacks an image into an empty directory. Whatever goes wrong, what is there
// then is of no use.
func (p puller) pull(ctx context.Context, s Source, dir string) error {
	ref, want, err := s.parse()
	if err != nil {
		return err
	}
	keychain := p.access.Keychain
	if keychain == nil {
		keychain = authn.NewMultiKeychain()
	}
	client := newTransport(p.access.Roots)
	defer client.CloseIdleConnections()
	img, err := remote.Image(ref, remote.WithContext(ctx), remote.WithTransport(confined{client}), remote.WithAuthFromKeychain(keychain),
		remote.WithPlatform(v1.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}), remote.WithUserAgent("bulkhead-agent"))
	if err != nil {
		return fmt.Errorf("ask for %s: %w", s.Reference, err)
	}
	if err := check(img, want); err != nil {
		return fmt.Errorf("look at %s: %w", s.Reference, err)
	}
	if err := p.unpack(img, dir); err != nil {
		return fmt.Errorf("unpack %s: %w", s.Reference, err)
	}
	return nil
}

// check looks at what an image says of itself. want is the version of Envoy.
func check(img v1.Image, want string) error {
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	if m.Config.Size < 0 || m.Config.Size > maxConfig || len(m.Layers) == 0 || len(m.Layers) > maxLayers {
		return fmt.Errorf("%w: it has %d layers and %d bytes of configuration", ErrInvalid, len(m.Layers), m.Config.Size)
	}
	var size int64
	for _, l := range m.Layers {
		if len(l.URLs) > 0 {
			return fmt.Errorf("%w: layer %s is elsewhere", ErrInvalid, l.Digest)
		}
		if l.Size < 0 || l.Size > maxTree-size {
			return fmt.Errorf("%w: its layers have more than %d bytes, or don't say how many", ErrInvalid, maxTree)
		}
		size += l.Size
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("%w: its configuration: %w", ErrInvalid, err)
	}
	if config.OS != runtime.GOOS || config.Architecture != runtime.GOARCH {
		return fmt.Errorf("%w: it is for %s/%s, the node is %s/%s", ErrInvalid, config.OS, config.Architecture, runtime.GOOS, runtime.GOARCH)
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("%w: %d layers, %d digests of them", ErrInvalid, len(m.Layers), len(config.RootFS.DiffIDs))
	}
	if got := config.Config.Labels[labelVersion]; got != want {
		return fmt.Errorf("%w: its label %s is %.64q, not %q", ErrInvalid, labelVersion, got, want)
	}
	return nil
}

func newTransport(roots *x509.CertPool) *http.Transport {
	t := remote.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = 30 * time.Second
	if roots != nil {
		t.TLSClientConfig.RootCAs = roots
	}
	return t
}

// confined never sends credentials in the clear, but to this machine.
type confined struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (c confined) RoundTrip(r *http.Request) (*http.Response, error) {
	// What a puller sends in a body is a form that asks for a token, with another one.
	secret := r.Header.Get("Authorization") != "" || r.Body != nil && r.Body != http.NoBody
	if secret && r.URL.Scheme != "https" && !isLocal(r.URL.Hostname()) {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, fmt.Errorf("registry %s speaks no TLS: credentials aren't sent in the clear", r.URL.Host)
	}
	return c.RoundTripper.RoundTrip(r)
}

func isLocal(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// Reasons why a version can't be had, for status.
const (
	ReasonNotFound     = "ImageNotFound"
	ReasonUnauthorized = "Unauthorized"
	ReasonUnreachable  = "RegistryUnreachable"
	ReasonTampered     = "DigestMismatch"
	ReasonInvalid      = "InvalidImage"
	ReasonTooOld       = "TooOld"
	ReasonDiskFull     = "DiskFull"
	ReasonFailed       = "Failed"
)

// reason puts an error into a word.
func reason(err error) string {
	var answer *transport.Error
	switch {
	case errors.Is(err, ErrTooOld):
		return ReasonTooOld
	case errors.Is(err, ErrDiskFull), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return ReasonDiskFull
	case errors.Is(err, ErrTampered), strings.Contains(err.Error(), "manifest digest"), strings.Contains(err.Error(), "error verifying"):
		return ReasonTampered // the library has no error of a type for it
	case errors.Is(err, ErrInvalid):
		return ReasonInvalid
	case errors.As(err, &answer):
		switch answer.StatusCode {
		case http.StatusNotFound:
			return ReasonNotFound
		case http.StatusUnauthorized, http.StatusForbidden:
			return ReasonUnauthorized
		}
		return ReasonUnreachable
	case errors.As(err, new(*os.PathError)), errors.As(err, new(*os.LinkError)):
		return ReasonFailed
	}
	return ReasonUnreachable
}
