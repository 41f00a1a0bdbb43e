package relay

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	// maxGood bounds what is kept of one tenant and Envoy version, in bytes.
	maxGood = 16 << 20
	// goodDelay is how long changes gather before they are written out.
	goodDelay = 2 * time.Second
)

// lastGood keeps what proxies acknowledged, so that one that starts while the
// operator is away has something to serve. Secrets never get here.
type lastGood struct {
	dir string
	log *slog.Logger

	mu     sync.Mutex
	sets   map[string]*goodSet // by file name
	timer  *time.Timer
	closed bool
}

// goodSet is what one tenant's proxies of one Envoy version acknowledged.
type goodSet struct {
	owner  *lastGood
	tenant model.Tenant
	file   string

	mu    sync.Mutex
	types map[string]map[string]goodResource
	size  int
	dirty bool
}

type goodResource struct {
	resource *discovery.Resource
	// wildcard resources were sent without being asked for by name.
	wildcard bool
}

func newLastGood(dir string, log *slog.Logger) *lastGood {
	return &lastGood{dir: dir, log: log, sets: map[string]*goodSet{}}
}

// set returns the tenant's set, read from disk the first time.
func (g *lastGood) set(t model.Tenant, version string) *goodSet {
	file := t.FileName() + "@" + version
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.sets[file]; s != nil {
		return s
	}
	s := &goodSet{owner: g, tenant: t, file: file, types: map[string]map[string]goodResource{}}
	if g.dir != "" {
		if err := s.load(filepath.Join(g.dir, file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			g.log.Warn("last good configuration ignored", "tenant", t.String(), "error", err)
		}
	}
	g.sets[file] = s
	return s
}

// load reads the file: one DeltaDiscoveryResponse whose resources carry the
// alias "*" if they belong to the wildcard.
func (s *goodSet) load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() > maxGood+1<<20 {
		return fmt.Errorf("read %s: it has %d bytes, more than %d", path, info.Size(), maxGood+1<<20)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var all discovery.DeltaDiscoveryResponse
	if err := proto.Unmarshal(b, &all); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	for _, r := range all.Resources {
		wild := slices.Contains(r.Aliases, wildcard)
		r.Aliases = nil
		s.put(r.GetResource().GetTypeUrl(), r, wild)
	}
	return nil
}

func (s *goodSet) put(typeURL string, r *discovery.Resource, wild bool) {
	if _, ok := kinds[typeURL]; !ok || typeURL == TypeSecret || r.GetResource().GetTypeUrl() != typeURL {
		return
	}
	m := s.types[typeURL]
	if m == nil {
		m = map[string]goodResource{}
		s.types[typeURL] = m
	}
	size := proto.Size(r)
	if old, ok := m[r.Name]; ok {
		size -= proto.Size(old.resource)
	}
	if s.size+size > maxGood {
		return
	}
	s.size += size
	m[r.Name] = goodResource{r, wild}
}

// update takes in what a proxy acknowledged.
func (s *goodSet) update(typeURL string, sub *subscription, resources []*discovery.Resource, removed []string) {
	if typeURL == TypeSecret || len(resources)+len(removed) == 0 {
		return
	}
	s.mu.Lock()
	for _, name := range removed {
		if old, ok := s.types[typeURL][name]; ok {
			s.size -= proto.Size(old.resource)
			delete(s.types[typeURL], name)
		}
	}
	for _, r := range resources {
		_, named := sub.names[r.Name]
		s.put(typeURL, r, sub.wildcard && !named)
	}
	s.dirty = true
	s.mu.Unlock()
	s.owner.schedule()
}

// get returns the resource of that name; nil if there is none.
func (s *goodSet) get(typeURL, name string) *discovery.Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.types[typeURL][name].resource
}

// onDemand reports whether a proxy had the resource by its name, not by the
// wildcard.
func (s *goodSet) onDemand(typeURL, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.types[typeURL][name]
	return ok && !g.wildcard
}

// lookup returns what is known of the names that nobody answered, and that the proxy
// has no version of: one that has kept its own through an agent's end may have a newer
// one than was written out, and chains that another process hasn't.
func (s *goodSet) lookup(typeURL string, sub *subscription) []*discovery.Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*discovery.Resource
	_, wild := sub.waiting[wildcard]
	m := s.types[typeURL]
	for _, name := range slices.Sorted(maps.Keys(m)) {
		g := m[name]
		if _, waiting := sub.waiting[name]; waiting || (wild && g.wildcard) {
			if _, has := sub.held[name]; has {
				continue
			}
			out = append(out, g.resource)
		}
	}
	return out
}

func (g *lastGood) schedule() {
	if g.dir == "" {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.timer == nil && !g.closed {
		g.timer = time.AfterFunc(goodDelay, func() {
			g.mu.Lock()
			g.timer = nil
			g.mu.Unlock()
			g.flush()
		})
	}
}

func (g *lastGood) flush() {
	if g.dir == "" {
		return
	}
	g.mu.Lock()
	sets := slices.Collect(maps.Values(g.sets))
	g.mu.Unlock()
	for _, s := range sets {
		if err := s.save(g.dir); err != nil {
			g.log.Warn("last good configuration not kept", "tenant", s.tenant.String(), "error", err)
		}
	}
}

func (s *goodSet) save(dir string) error {
	s.mu.Lock()
	if !s.dirty {
		s.mu.Unlock()
		return nil
	}
	s.dirty = false
	var all discovery.DeltaDiscoveryResponse
	for _, m := range s.types {
		for _, g := range m {
			r := &discovery.Resource{Name: g.resource.Name, Version: g.resource.Version, Resource: g.resource.Resource}
			if g.wildcard {
				r.Aliases = []string{wildcard}
			}
			all.Resources = append(all.Resources, r)
		}
	}
	s.mu.Unlock()
	b, err := proto.Marshal(&all)
	if err != nil {
		return fmt.Errorf("encode last good: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	tmp, err := os.CreateTemp(dir, ".new-*") // 0600
	if err != nil {
		return fmt.Errorf("create file: %w", err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(dir, s.file))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", s.file, err), os.Remove(tmp.Name()))
	}
	return nil
}

// keep drops the sets of all other tenants, in memory and on disk.
func (g *lastGood) keep(tenants []model.Tenant) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	files := map[string]bool{}
	for _, t := range tenants {
		files[t.FileName()] = true
	}
	wanted := func(file string) bool {
		name, _, ok := strings.Cut(file, "@")
		return ok && files[name]
	}
	maps.DeleteFunc(g.sets, func(file string, _ *goodSet) bool { return !wanted(file) })
	if g.dir == "" {
		return nil
	}
	entries, err := os.ReadDir(g.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("prune last good: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !wanted(e.Name()) {
			errs = append(errs, os.Remove(filepath.Join(g.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (g *lastGood) close() {
	g.mu.Lock()
	g.closed = true
	if g.timer != nil {
		g.timer.Stop()
	}
	g.mu.Unlock()
	g.flush()
}
