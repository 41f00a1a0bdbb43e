package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// place is where trees go, and what is in use.
type place struct {
	dir string

	mu   sync.Mutex
	used map[string]bool
	// killed has AddVersion end as if nothing came after it.
	killed bool
}

func (p *place) HasVersion(version string) error {
	_, err := os.Stat(filepath.Join(p.dir, version, "envoy"))
	return err
}

func (p *place) AddVersion(version, tree string) error {
	os.RemoveAll(filepath.Join(p.dir, version))
	if err := os.Rename(tree, filepath.Join(p.dir, version)); err != nil || !p.killed {
		return err
	}
	return errors.New("killed")
}

func (p *place) RemoveVersion(version string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.used[version] {
		return errors.New("in use")
	}
	return os.RemoveAll(filepath.Join(p.dir, version))
}

// hub is a registry.
type hub struct {
	t    *testing.T
	host string
	// change looks at each request first, and may answer it.
	change atomic.Pointer[func(http.ResponseWriter, *http.Request) (done bool)]
	asked  atomic.Int32
}

func newHub(t *testing.T) *hub {
	h := &hub{t: t}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.asked.Add(1)
		if f := h.change.Load(); f != nil && (*f)(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	h.host = strings.TrimPrefix(s.URL, "http://")
	return h
}

// entry is a file of a layer; its type is a regular file's if it is zero.
type entry struct {
	name, content string
	kind          byte
	mode          int64
	link          string
}

func layerOf(t *testing.T, entries ...entry) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Linkname: e.link}
		if e.kind == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.content))
		}
		must(t, w.WriteHeader(h))
		if e.kind == 0 {
			_, err := io.WriteString(w, e.content)
			must(t, err)
		}
	}
	must(t, w.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	return l
}

// config is what an image says of itself.
type config struct {
	os, arch, version string
	// lies about what its layers hold.
	lies bool
}

var good = config{os: "linux", arch: "amd64", version: "1.40.0"}

// push puts an image into the registry and returns it as what a node may want.
func (h *hub) push(c config, layers ...v1.Layer) Source {
	h.t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	must(h.t, err)
	file, err := img.ConfigFile()
	must(h.t, err)
	file = file.DeepCopy()
	file.OS, file.Architecture = c.os, c.arch
	file.Config.Labels = map[string]string{labelVersion: c.version}
	if c.lies {
		file.RootFS.DiffIDs[0].Hex = strings.Repeat("0", 64)
	}
	img, err = mutate.ConfigFile(img, file)
	must(h.t, err)
	digest, err := img.Digest()
	must(h.t, err)
	ref, err := name.NewDigest(h.host + "/proxy@" + digest.String())
	must(h.t, err)
	must(h.t, remote.Write(ref, img))
	return Source{Version: c.version + "+" + digest.Hex[:12], Reference: ref.String()}
}

type node struct {
	t *testing.T
	*Store
	place *place
}

func newNode(t *testing.T, change func(*Options)) *node {
	dir := t.TempDir()
	n := &node{t: t, place: &place{dir: filepath.Join(dir, "versions"), used: map[string]bool{}}}
	must(t, os.Mkdir(n.place.dir, 0o755))
	n.open(filepath.Join(dir, "images"), change)
	return n
}

func (n *node) open(dir string, change func(*Options)) {
	n.t.Helper()
	o := Options{Dir: dir, Versions: n.place, Retry: 5 * time.Millisecond, MaxRetry: time.Hour, Reserve: 1, Log: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&o)
	}
	var err error
	n.Store, err = Open(o)
	must(n.t, err)
}

// run runs the store until stop.
func (n *node) run() (stop func()) {
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan struct{})
	go func() { n.Run(ctx); close(done) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	return stop
}

func (n *node) eventually(what string, f func() bool) {
	n.t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not in time: %s; %+v", what, n.States())
		}
	}
}

func (n *node) ready(s Source) bool { return n.States()[s.Version].Ready }

func TestFetch(t *testing.T) {
	h, n := newHub(t), newNode(t, nil)
	source := h.push(good,
		layerOf(t, entry{name: "envoy", content: "old"}, entry{name: "lib/", kind: tar.TypeDir, mode: 0o700}, entry{name: "lib/libc.so.6", content: "libc", mode: 0o4755}),
		layerOf(t, entry{name: "./envoy", content: "the proxy", mode: 0o600}))
	n.run()
	n.Want([]Source{source}, nil)
	n.eventually("the image", func() bool { return n.ready(source) })
	for file, want := range map[string]string{"envoy": "the proxy", "lib/libc.so.6": "libc"} {
		path := filepath.Join(n.place.dir, source.Version, file)
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s is %q, %v", file, b, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s has the mode %v, %v", file, info.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(n.o.Dir, ".pull-*")); left != nil {
		t.Errorf("left behind: %q", left)
	}
}

// What is on the node is neither asked for again, nor lost while it is wanted or
// runs, nor kept when nobody wants it.
func TestKeptAndRemoved(t *testing.T) {
	h, n := newHub(t), newNode(t, nil)
	source, other := h.push(good, layerOf(t, entry{name: "envoy", content: "a"})), h.push(good, layerOf(t, entry{name: "envoy", content: "b"}))
	stop := n.run()
	n.Want([]Source{source, other}, nil)
	n.eventually("both", func() bool { return n.ready(source) && n.ready(other) })
	stop()
	// A pull that was killed, and the next store.
	half := filepath.Join(n.o.Dir, ".pull-123")
	must(t, os.Mkdir(half, 0o700))
	asked := h.asked.Load()
	n.open(n.o.Dir, nil)
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was half fetched: %v", err)
	}
	n.run()
	n.eventually("first look", func() bool { n.wake(); return n.place.HasVersion(source.Version) == nil })
	n.Want([]Source{source}, map[string]bool{other.Version: true})
	n.eventually("it knows", func() bool { return n.ready(source) })
	n.place.mu.Lock()
	n.place.used[source.Version] = true
	n.place.mu.Unlock()
	n.Want(nil, nil)
	n.eventually("the end of what isn't wanted", func() bool { return n.place.HasVersion(other.Version) != nil })
	if err := n.place.HasVersion(source.Version); err != nil {
		t.Errorf("what runs was removed: %v", err)
	}
	n.place.mu.Lock()
	n.place.used[source.Version] = false
	n.place.mu.Unlock()
	n.eventually("the end of what ran", func() bool {
		_, err := os.Stat(n.record(source.Version))
		return n.place.HasVersion(source.Version) != nil && errors.Is(err, fs.ErrNotExist)
	})
	if now := h.asked.Load(); now != asked {
		t.Errorf("the registry was asked %d times for what was there", now-asked)
	}
}

// A tree that came whole, with an agent that was killed before it noted it, goes as
// any other when nobody wants it.
func TestKilledBeforeTheRecord(t *testing.T) {
	h, n := newHub(t), newNode(t, nil)
	source := h.push(good, layerOf(t, entry{name: "envoy", content: "a"}))
	n.place.killed = true
	stop := n.run()
	n.Want([]Source{source}, nil)
	n.eventually("a failure", func() bool { return n.States()[source.Version].Reason != "" })
	stop()
	if n.place.HasVersion(source.Version) != nil || n.has(source) {
		t.Fatalf("the tree isn't there, or taken for whole")
	}
	n.open(n.o.Dir, nil)
	n.run()
	n.Want(nil, nil)
	n.eventually("nothing is left", func() bool {
		trees, err := os.ReadDir(n.place.dir)
		records, err2 := os.ReadDir(n.o.Dir)
		return err == nil && err2 == nil && len(trees) == 0 && len(records) == 0
	})
}

func TestBadImages(t *testing.T) {
	h := newHub(t)
	envoy := entry{name: "envoy", content: "the proxy"}
	fine := h.push(good, layerOf(t, envoy))
	_, digest, _ := strings.Cut(fine.Reference, "@")
	nobody := strings.Repeat("0", 64)
	for name, tc := range map[string]struct {
		source Source
		// reason and a part of the message.
		reason, says string
		options      func(*Options)
		change       func(w http.ResponseWriter, r *http.Request) bool
	}{
		"not there":         {source: Source{"1.40.0+000000000000", h.host + "/proxy@sha256:" + nobody}, reason: ReasonNotFound},
		"a tag":             {source: Source{"1.40.0+000000000000", h.host + "/proxy:latest"}, reason: ReasonInvalid, says: "isn't a repository and a digest"},
		"another's version": {source: Source{"1.40.0+000000000000", fine.Reference}, reason: ReasonInvalid, says: "first twelve digits"},
		"a path as version": {source: Source{"../1.40.0+" + digest[7:19], fine.Reference}, reason: ReasonInvalid},
		"too old":           {source: h.push(config{os: "linux", arch: "amd64", version: "1.38.9"}, layerOf(t, envoy)), reason: ReasonTooOld, says: "the oldest that can be run is 1.39.0"},
		"older by label":    {source: Source{"1.41.0+" + digest[7:19], fine.Reference}, reason: ReasonInvalid, says: "1.40.0"},
		"other platform":    {source: h.push(config{os: "linux", arch: "riscv64", version: "1.40.0"}, layerOf(t, envoy)), reason: ReasonInvalid, says: "riscv64"},
		"no envoy":          {source: h.push(good, layerOf(t, entry{name: "usr/bin/envoy", content: "x"})), reason: ReasonInvalid, says: "no file /envoy"},
		"envoy a folder":    {source: h.push(good, layerOf(t, entry{name: "envoy", kind: tar.TypeDir})), reason: ReasonInvalid, says: "no file /envoy"},
		"leads out":         {source: h.push(good, layerOf(t, envoy, entry{name: "../out", content: "x"})), reason: ReasonInvalid, says: "leads out"},
		"leads out inside":  {source: h.push(good, layerOf(t, envoy, entry{name: "lib/../../out", content: "x"})), reason: ReasonInvalid, says: "leads out"},
		"absolute":          {source: h.push(good, layerOf(t, envoy, entry{name: "/out", content: "x"})), reason: ReasonInvalid, says: "leads out"},
		"too deep":          {source: h.push(good, layerOf(t, envoy, entry{name: strings.Repeat("d/", maxDepth+1) + "out", content: "x"})), reason: ReasonInvalid, says: "folders"},
		"deep folders":      {source: h.push(good, layerOf(t, envoy, entry{name: strings.Repeat("d/", maxDepth+2), kind: tar.TypeDir})), reason: ReasonInvalid, says: "folders"},
		"a link":            {source: h.push(good, layerOf(t, envoy, entry{name: "lib", kind: tar.TypeSymlink, link: "/"}, entry{name: "lib/out", content: "x"})), reason: ReasonInvalid, says: "no regular file"},
		"a hard link":       {source: h.push(good, layerOf(t, envoy, entry{name: "passwd", kind: tar.TypeLink, link: "/etc/passwd"})), reason: ReasonInvalid, says: "no regular file"},
		"a device":          {source: h.push(good, layerOf(t, envoy, entry{name: "mem", kind: tar.TypeChar})), reason: ReasonInvalid, says: "no regular file"},
		"a pipe":            {source: h.push(good, layerOf(t, envoy, entry{name: "pipe", kind: tar.TypeFifo})), reason: ReasonInvalid, says: "no regular file"},
		"full disk":         {source: fine, reason: ReasonDiskFull, says: "are to stay free", options: func(o *Options) { o.Reserve = 1 << 62 }},
		"another layer than its configuration says": {source: h.push(config{"linux", "amd64", "1.40.0", true}, layerOf(t, envoy)), reason: ReasonTampered},
		"tampered layer": {source: fine, reason: ReasonTampered, change: func(w http.ResponseWriter, r *http.Request) bool {
			return tamper(w, r, "/blobs/", false)
		}},
		"tampered configuration": {source: fine, reason: ReasonTampered, change: func(w http.ResponseWriter, r *http.Request) bool {
			return tamper(w, r, "/blobs/", true)
		}},
		"no archive": {source: h.push(good, static.NewLayer([]byte("no archive at all"), types.OCIUncompressedLayer)), reason: ReasonInvalid},
		"tampered manifest": {source: fine, reason: ReasonTampered, change: func(w http.ResponseWriter, r *http.Request) bool {
			return tamper(w, r, "/manifests/", true)
		}},
		"wants credentials": {source: fine, reason: ReasonUnauthorized, change: func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}},
		"out of order": {source: fine, reason: ReasonUnreachable, change: func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(http.StatusForbidden + 100)
			return true
		}},
		"nobody there": {source: Source{fine.Version, "127.0.0.1:1/proxy@" + digest}, reason: ReasonUnreachable},
		"no access": {source: fine, reason: ReasonUnreachable, says: "credentials", options: func(o *Options) {
			o.Access = func(context.Context) (Access, error) { return Access{}, errors.New("no such Secret") }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tc.options)
			if tc.change != nil {
				h.change.Store(&tc.change)
				defer h.change.Store(nil)
			}
			n.run()
			n.Want([]Source{tc.source}, nil)
			n.eventually("a verdict", func() bool { return n.States()[tc.source.Version] != State{} })
			s := n.States()[tc.source.Version]
			if s.Ready || s.Reason != tc.reason || !strings.Contains(s.Message, tc.says) {
				t.Errorf("%+v, want %s: %s", s, tc.reason, tc.says)
			}
			if left, err := os.ReadDir(n.place.dir); err != nil || len(left) > 0 {
				t.Errorf("on the node: %v, %v", left, err)
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(n.o.Dir), "out")); err == nil {
				t.Error("a file outside of the image")
			}
		})
	}
}

// sized is an image whose manifest has other sizes.
type sized struct {
	v1.Image
	config, layer int64
}

func (s sized) Manifest() (*v1.Manifest, error) {
	m, err := s.Image.Manifest()
	if err == nil {
		m = m.DeepCopy()
		m.Config.Size, m.Layers[0].Size = s.config, s.layer
	}
	return m, err
}

// What has no size has no bound either.
func TestSizes(t *testing.T) {
	img, err := mutate.AppendLayers(empty.Image, layerOf(t, entry{name: "envoy", content: "x"}))
	must(t, err)
	for name, s := range map[string]sized{"no configuration's": {img, -1, 1}, "no layer's": {img, 1, -1}, "a large layer": {img, 1, maxTree + 1}} {
		if err := check(s, "1.40.0"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// tamper answers a blob or manifest with a bit changed, of the same length: JSON, or
// what isn't.
func tamper(w http.ResponseWriter, r *http.Request, what string, isJSON bool) bool {
	if !strings.Contains(r.URL.Path, what) || r.Method != http.MethodGet || r.Header.Get("X-Inner") != "" {
		return false
	}
	inner, err := http.NewRequest(http.MethodGet, "http://"+r.Host+r.URL.Path, nil)
	if err != nil {
		return false
	}
	inner.Header.Set("X-Inner", "1")
	res, err := http.DefaultClient.Do(inner)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || len(b) == 0 || (b[0] == '{') != isJSON {
		return false
	}
	if i := bytes.Index(b, []byte("digest")); i >= 0 {
		b[i] = 'D' // JSON, still
	} else {
		b[len(b)-1] ^= 1
	}
	w.Header().Set("Content-Type", res.Header.Get("Content-Type"))
	w.Write(b)
	return true
}

// A registry that was away is asked again.
func TestRetried(t *testing.T) {
	h, n := newHub(t), newNode(t, nil)
	source := h.push(good, layerOf(t, entry{name: "envoy", content: "a"}))
	away := func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusTeapot); return true }
	h.change.Store(&away)
	n.run()
	n.Want([]Source{source}, nil)
	n.eventually("a failure", func() bool { return n.States()[source.Version].Reason == ReasonUnreachable })
	h.change.Store(nil)
	n.eventually("the image", func() bool { return n.ready(source) })
}

// Credentials are used where they belong, and never sent in the clear but to this
// machine.
func TestCredentials(t *testing.T) {
	h := newHub(t)
	source := h.push(good, layerOf(t, entry{name: "envoy", content: "a"}))
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("node:secret"))
	closed := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == want {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	h.change.Store(&closed)
	keychain, err := NewKeychain([]byte(`{"auths": {"` + h.host + `": {"username": "node", "password": "secret"}, "other.example": {"auth": "bm9ib2R5Om5vdGhpbmc="}}}`))
	must(t, err)
	n := newNode(t, func(o *Options) {
		o.Access = func(context.Context) (Access, error) { return Access{Keychain: keychain}, nil }
	})
	n.run()
	n.Want([]Source{source}, nil)
	n.eventually("the image", func() bool { return n.ready(source) })

	reached := false
	c := confined{roundTripper(func(*http.Request) (*http.Response, error) { reached = true; return nil, errors.New("reached") })}
	r, err := http.NewRequest(http.MethodGet, "http://10.0.0.1:5000/v2/", nil)
	must(t, err)
	c.RoundTrip(r)
	if !reached {
		t.Error("a registry without TLS can't be asked without credentials")
	}
	reached = false
	form, err := http.NewRequest(http.MethodPost, "http://10.0.0.1:5000/token", strings.NewReader("grant_type=refresh_token&refresh_token=secret"))
	must(t, err)
	if _, err := c.RoundTrip(form); reached || err == nil || !strings.Contains(err.Error(), "in the clear") {
		t.Errorf("an identity token in the clear: reached %t, %v", reached, err)
	}
	reached = false
	r.Header.Set("Authorization", want)
	if _, err := c.RoundTrip(r); reached || err == nil || !strings.Contains(err.Error(), "in the clear") {
		t.Errorf("credentials in the clear: reached %t, %v", reached, err)
	}
	r.URL.Host = "127.evil.example"
	if _, err := c.RoundTrip(r); reached || err == nil {
		t.Errorf("credentials in the clear to a name that looks like this machine: reached %t, %v", reached, err)
	}
	r.URL.Host = "[::1]:5000"
	if c.RoundTrip(r); !reached {
		t.Error("this machine can't be asked with credentials")
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestKeychain(t *testing.T) {
	k, err := NewKeychain([]byte(`{"auths": {
		"https://index.docker.io/v1/": {"auth": "aHViOmE="},
		"registry.example/team": {"auth": "dGVhbTpi"},
		"registry.example": {"auth": "YWxsOmM="}}}`))
	must(t, err)
	for image, want := range map[string]string{
		"envoyproxy/envoy":           "hub",
		"registry.example/team/x":    "team",
		"registry.example/teammates": "all",
		"registry.example/other":     "all",
		"registry.example.evil/x":    "",
		"other.example/x":            "",
	} {
		repo, err := name.NewRepository(image)
		must(t, err)
		a, err := k.Resolve(repo)
		must(t, err)
		got, err := authn.Authorization(t.Context(), a)
		must(t, err)
		if got.Username != want {
			t.Errorf("for %s it is %q, want %q", image, got.Username, want)
		}
	}
	if _, err := NewKeychain([]byte("no JSON")); err == nil {
		t.Error("what is no configuration was taken")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
