package chain

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

// wrapper is the conflist made for a node whose CNI has a single .conf. It sorts
// before any name that a CNI is known to use.
const wrapper = "0-bulkhead.conflist"

// ErrNoConfig is returned while the node has no CNI to be chained to.
var ErrNoConfig = errors.New("no CNI configuration on the node yet")

// Options of a Keeper.
type Options struct {
	// ConfDir is the runtime's configuration directory. Default /etc/cni/net.d.
	ConfDir string
	// BinDir is where the runtime looks for plugins. Default /opt/cni/bin.
	BinDir string
	// Binary to install there. Required.
	Binary string
	// Entry for the conflist; its Type is set.
	Entry Entry
	// Interval between looks at the directory, beside those that a change brings.
	// Default 10 s.
	Interval time.Duration
	// Log; default slog.Default().
	Log *slog.Logger
}

// Keeper keeps the plugin installed.
type Keeper struct {
	o         Options
	installed atomic.Bool
}

// New returns a Keeper that has done nothing yet.
func New(o Options) *Keeper {
	o.ConfDir = cmp.Or(o.ConfDir, "/etc/cni/net.d")
	o.BinDir = cmp.Or(o.BinDir, "/opt/cni/bin")
	o.Interval = cmp.Or(o.Interval, 10*time.Second)
	o.Log = cmp.Or(o.Log, slog.Default())
	return &Keeper{o: o}
}

// Installed reports whether the plugin was in place at the last look.
func (k *Keeper) Installed() bool { return k.installed.Load() }

// Run keeps the plugin in place until ctx ends. It leaves it there.
func (k *Keeper) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch CNI configuration: %w", err)
	}
	defer w.Close()
	tick := time.NewTicker(k.o.Interval)
	defer tick.Stop()
	last := ""
	for {
		// Added again each time: the directory may be replaced by another.
		watchErr := w.Add(k.o.ConfDir)
		err := k.Ensure()
		k.installed.Store(err == nil)
		switch text := fmt.Sprint(err); {
		case err != nil && text != last:
			k.o.Log.Warn("CNI plugin isn't chained", "error", err)
			last = text
		case err == nil && last != "ok":
			k.o.Log.Info("CNI plugin is chained", "directory", k.o.ConfDir)
			last = "ok"
		}
		if watchErr != nil && !errors.Is(watchErr, fs.ErrNotExist) {
			k.o.Log.Warn("CNI directory can't be watched", "error", watchErr)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-w.Events:
		case <-w.Errors:
		}
	}
}

// Ensure installs the binary and chains the plugin, if that isn't so already. It
// returns ErrNoConfig while there is nothing to chain to.
func (k *Keeper) Ensure() error {
	if err := k.installBinary(); err != nil {
		return err
	}
	names, err := k.configs()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == wrapper {
			continue
		}
		path := filepath.Join(k.o.ConfDir, name)
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read CNI configuration: %w", err)
		}
		if filepath.Ext(name) == ".conflist" {
			chained, err := Chained(b, k.o.Entry)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if !bytes.Equal(chained, b) {
				if err := replaceFile(path, chained, 0o600); err != nil {
					return err
				}
			}
			return k.removeWrapper()
		}
		if name < wrapper {
			return fmt.Errorf("%s sorts before %s: rename it, or give it the form of a conflist", path, wrapper)
		}
		list, err := FromConf(b, k.o.Entry)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		ours := filepath.Join(k.o.ConfDir, wrapper)
		if old, err := os.ReadFile(ours); err == nil && bytes.Equal(old, list) {
			return nil
		}
		return replaceFile(ours, list, 0o600)
	}
	return errors.Join(ErrNoConfig, k.removeWrapper())
}

// Remove takes the plugin out of all configurations, then removes its binary: in
// this order no sandbox can be asked of a plugin that isn't there.
func (k *Keeper) Remove() error {
	k.installed.Store(false)
	names, err := k.configs()
	if err != nil {
		return err
	}
	errs := []error{k.removeWrapper()}
	for _, name := range names {
		if filepath.Ext(name) != ".conflist" || name == wrapper {
			continue
		}
		path := filepath.Join(k.o.ConfDir, name)
		b, err := os.ReadFile(path)
		if err == nil {
			var bare []byte
			if bare, err = Unchained(b); err == nil && !bytes.Equal(bare, b) {
				err = replaceFile(path, bare, 0o600)
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("unchain CNI plugin from %s: %w", path, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(k.o.BinDir, Type)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove CNI plugin: %w", err)
	}
	return nil
}

func (k *Keeper) removeWrapper() error {
	if err := os.Remove(filepath.Join(k.o.ConfDir, wrapper)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove conflist of ours: %w", err)
	}
	return nil
}

// configs lists what a runtime would read, in its order.
func (k *Keeper) configs() ([]string, error) {
	entries, err := os.ReadDir(k.o.ConfDir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list CNI configurations: %w", err)
	}
	var names []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
			if !e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

func (k *Keeper) installBinary() error {
	want, err := os.ReadFile(k.o.Binary)
	if err != nil {
		return fmt.Errorf("read CNI plugin: %w", err)
	}
	path := filepath.Join(k.o.BinDir, Type)
	if have, err := os.Open(path); err == nil {
		same := sameContent(have, want)
		have.Close()
		if same {
			return nil
		}
	}
	if err := os.MkdirAll(k.o.BinDir, 0o755); err != nil {
		return fmt.Errorf("install CNI plugin: %w", err)
	}
	return replaceFile(path, want, 0o755)
}

func sameContent(f *os.File, want []byte) bool {
	info, err := f.Stat()
	if err != nil || info.Size() != int64(len(want)) || info.Mode().Perm() != 0o755 {
		return false
	}
	have, err := io.ReadAll(f)
	return err == nil && bytes.Equal(have, want)
}

// replaceFile puts a new file in the place of path (or of what it links to) in
// one step, with the old one's mode if there is one.
func replaceFile(path string, b []byte, mode fs.FileMode) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if info, err := os.Stat(path); err == nil && mode&0o111 == 0 {
		mode = info.Mode().Perm()
	}
	// A name that no runtime takes for a configuration.
	tmp, err := os.CreateTemp(filepath.Dir(path), ".bulkhead-new-*")
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("replace %s: %w", path, err), os.Remove(tmp.Name()))
	}
	return nil
}
