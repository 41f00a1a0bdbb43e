package image

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Versions is where fetched trees go.
type Versions interface {
	// HasVersion returns an error if the version can't be run.
	HasVersion(version string) error
	// AddVersion takes a tree, which is on the same file system, as its own.
	AddVersion(version, tree string) error
	// RemoveVersion removes a version that nothing runs; of one that runs it returns
	// an error, of one that isn't there none.
	RemoveVersion(version string) error
}

// Options of a Store. Dir and Versions are required.
type Options struct {
	// Dir is the store's own, on the file system of Versions.
	Dir string
	// Versions is where fetched trees go.
	Versions Versions
	// Access is asked for before each pull. Default: no credentials, this machine's
	// roots.
	Access func(context.Context) (Access, error)
	// Reserve is what must stay free on the disk, in bytes. Default 512 MiB.
	Reserve uint64
	// Retry is the time between the first attempts; it doubles up to MaxRetry.
	// Defaults 2 s and 5 min.
	Retry, MaxRetry time.Duration
	// Changed is called, if set, when a State has changed. It must not block.
	Changed func()
	// Log; default slog.Default().
	Log *slog.Logger
}

// pullTimeout bounds one attempt: a registry that says nothing isn't waited for.
const pullTimeout = 10 * time.Minute

// State is how a wanted version is.
type State struct {
	// Ready: the node has it.
	Ready bool
	// Reason and Message say why it couldn't be had the last time; "" while it is
	// being fetched.
	Reason, Message string
}

// Store has a node's wanted images. Its methods may be called from any goroutine.
type Store struct {
	o Options

	mu      sync.Mutex
	wanted  map[string]Source
	keep    map[string]bool
	known   bool
	states  map[string]State
	changed chan struct{}
}

// Open removes what an earlier one left half done.
func Open(o Options) (*Store, error) {
	if o.Reserve == 0 {
		o.Reserve = 512 << 20
	}
	if o.Retry == 0 {
		o.Retry = 2 * time.Second
	}
	if o.MaxRetry == 0 {
		o.MaxRetry = 5 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Access == nil {
		o.Access = func(context.Context) (Access, error) { return Access{}, nil }
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(o.Dir, ".pull-*"))
	if err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil { // the agent is needed all the same
			o.Log.Error("what was half fetched stays", "folder", dir, "error", err)
		}
	}
	return &Store{o: o, wanted: map[string]Source{}, states: map[string]State{}, changed: make(chan struct{}, 1)}, nil
}

// Want says which images the node is to have, and which versions besides it must
// not lose. All others are removed, once nothing runs them.
func (s *Store) Want(images []Source, keep map[string]bool) {
	wanted := map[string]Source{}
	for _, i := range images {
		wanted[i.Version] = i
	}
	s.mu.Lock()
	same := s.known && maps.Equal(s.wanted, wanted) && maps.Equal(s.keep, keep)
	s.wanted, s.keep, s.known = wanted, maps.Clone(keep), true
	maps.DeleteFunc(s.states, func(version string, _ State) bool { _, ok := wanted[version]; return !ok })
	s.mu.Unlock()
	if !same {
		s.wake()
	}
}

func (s *Store) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// States are those of all wanted images, by version.
func (s *Store) States() map[string]State {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]State{}
	for version := range s.wanted {
		out[version] = s.states[version]
	}
	return out
}

// Run fetches and removes until ctx ends.
func (s *Store) Run(ctx context.Context) error {
	failures := map[Source]int{}
	due := map[Source]time.Time{}
	for {
		next := s.o.MaxRetry
		if !s.collect() {
			next = s.o.Retry
		}
		for _, source := range s.missing() {
			if wait := time.Until(due[source]); wait > 0 {
				next = min(next, wait)
				continue
			}
			err := s.fetch(ctx, source)
			if ctx.Err() != nil {
				return nil
			}
			s.note(source, err)
			if err == nil {
				delete(failures, source)
				continue
			}
			wait := min(s.o.MaxRetry, s.o.Retry<<min(failures[source], 20))
			failures[source]++
			due[source], next = time.Now().Add(wait), min(next, wait)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.changed:
		case <-time.After(next):
		}
	}
}

// missing are the wanted images that the node doesn't have.
func (s *Store) missing() (out []Source) {
	s.mu.Lock()
	wanted := slices.Collect(maps.Values(s.wanted))
	s.mu.Unlock()
	for _, source := range wanted {
		if s.has(source) {
			s.note(source, nil)
		} else {
			out = append(out, source)
		}
	}
	slices.SortFunc(out, func(a, b Source) int { return strings.Compare(a.Version, b.Version) })
	return out
}

// has goes by the record that is written last: a version's name has but a part of
// its image's digest.
func (s *Store) has(source Source) bool {
	ref, _, err := source.parse()
	if err != nil {
		return false
	}
	record, err := os.ReadFile(s.record(source.Version))
	return err == nil && string(record) == ref.DigestStr() && s.o.Versions.HasVersion(source.Version) == nil
}

func (s *Store) record(version string) string { return filepath.Join(s.o.Dir, version) }

func (s *Store) note(source Source, err error) {
	state := State{Ready: err == nil}
	if err != nil {
		state.Reason, state.Message = reason(err), err.Error()
	}
	s.mu.Lock()
	before, had := s.states[source.Version]
	wanted := s.wanted[source.Version] == source
	if wanted {
		s.states[source.Version] = state
	}
	s.mu.Unlock()
	if !wanted || had && before == state {
		return
	}
	if err != nil {
		s.o.Log.Warn("image of a proxy can't be had", "version", source.Version, "image", source.Reference, "reason", state.Reason, "error", err)
	} else {
		s.o.Log.Info("image of a proxy is there", "version", source.Version, "image", source.Reference)
	}
	if s.o.Changed != nil {
		s.o.Changed()
	}
}

// fetch brings one image to the node, whole or not at all.
func (s *Store) fetch(ctx context.Context, source Source) error {
	ref, _, err := source.parse()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	access, err := s.o.Access(ctx)
	if err != nil {
		return fmt.Errorf("read the registry's credentials: %w", err)
	}
	dir, err := os.MkdirTemp(s.o.Dir, ".pull-")
	if err != nil {
		return fmt.Errorf("make room for %s: %w", source.Reference, err)
	}
	defer os.RemoveAll(dir)
	if err := (puller{access, s.o.Reserve}).pull(ctx, source, dir); err != nil {
		return err
	}
	// Without a digest it is no image that is there, but one that is removed if nobody
	// wants it, whenever the agent is killed from here on.
	if err := s.keepRecord(source.Version, ""); err != nil {
		return err
	}
	if err := s.o.Versions.AddVersion(source.Version, dir); err != nil {
		return err
	}
	return s.keepRecord(source.Version, ref.DigestStr())
}

func (s *Store) keepRecord(version, digest string) error {
	tmp := filepath.Join(s.o.Dir, ".pull-record")
	if err := os.WriteFile(tmp, []byte(digest), 0o600); err != nil {
		return fmt.Errorf("note image: %w", err)
	}
	return os.Rename(tmp, s.record(version))
}

// collect removes what nobody wants any more, and reports whether there is nothing of
// that left: what runs stays until it has ended. Before the first Want nobody knows.
func (s *Store) collect() (done bool) {
	s.mu.Lock()
	known := s.known
	s.mu.Unlock()
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil || !known {
		return true
	}
	done = true
	for _, e := range entries {
		version := e.Name()
		s.mu.Lock()
		_, wanted := s.wanted[version]
		wanted = wanted || s.keep[version]
		s.mu.Unlock()
		if wanted || strings.HasPrefix(version, ".") {
			continue
		}
		if err := s.o.Versions.RemoveVersion(version); err != nil {
			s.o.Log.Debug("version of a proxy stays", "version", version, "error", err)
			done = false
			continue
		}
		if err := os.Remove(s.record(version)); err != nil {
			s.o.Log.Warn("record of an image stays", "version", version, "error", err)
		}
		s.o.Log.Info("image of a proxy is removed", "version", version)
	}
	return done
}
