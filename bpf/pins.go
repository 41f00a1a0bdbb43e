package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Mount mounts a BPF file system at dir, which must exist, unless one is there.
// It stays mounted.
func Mount(dir string) error {
	is, err := isBPF(dir)
	if err != nil || is {
		return err
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system at %s: %w", dir, err)
	}
	return nil
}

func isBPF(dir string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return false, fmt.Errorf("examine file system of %s: %w", dir, err)
	}
	return s.Type == unix.BPF_FS_MAGIC, nil
}

func makeDirs(dir string) error {
	parent := filepath.Dir(dir)
	switch is, err := isBPF(parent); {
	case err != nil:
		return err
	case !is:
		return fmt.Errorf("%s is not on a BPF file system, so nothing could be pinned: mount -t bpf bpf %s", dir, parent)
	}
	for _, part := range []string{"", "maps", "programs", "tenants", "pods"} {
		if err := makeDir(filepath.Join(dir, part)); err != nil {
			return err
		}
	}
	return nil
}

func makeDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make pin folder: %w", err)
	}
	return nil
}

func entries(dir string) ([]string, error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list pin folder: %w", err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names, nil
}

// closing are the maps without whose entries TCP is dropped.
var closing = []string{datapathMapPods, datapathMapTenants, datapathMapVeths, datapathMapListeners}

// adoptMap returns the pinned map if it fits this build, otherwise a new one in
// its place, with the entries if they can be carried over.
func (d *Datapath) adoptMap(path string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err == nil {
		if err = errors.Join(spec.Compatible(m), sameFields(m, spec)); err == nil && spec.InnerMap != nil {
			err = takesInner(m, spec.InnerMap)
		}
		if err == nil {
			return m, nil
		}
		migrated, later, why := migrateMap(path, m, spec)
		if why == nil && spec.Name == datapathMapFlows {
			later.from, d.late = m, later
		} else {
			m.Close()
		}
		if why == nil {
			d.log.Info("Carried a pinned map over to this version", "path", path, "reason", err)
			return migrated, nil
		}
		err = errors.Join(err, why)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		lost := "A pinned map doesn't fit this version and is made anew: what it held is lost"
		if slices.Contains(closing, spec.Name) {
			lost = "A pinned map doesn't fit this version and is made anew: TCP of the node's mesh pods is dropped until their tenants and they are updated"
		}
		d.log.Warn(lost, "path", path, "error", err)
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove pinned map: %w", err)
		}
	}
	m, err = ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create BPF map %s: %w", spec.Name, err)
	}
	if err := m.Pin(path); err != nil {
		m.Close()
		return nil, fmt.Errorf("pin BPF map %s: %w", spec.Name, err)
	}
	return m, nil
}

var errOtherInner = errors.New("it takes other maps")

// takesInner tells by trying whether a map takes such maps: the kernel doesn't say.
func takesInner(m *ebpf.Map, spec *ebpf.MapSpec) error {
	inner, err := ebpf.NewMap(spec)
	if err != nil {
		return fmt.Errorf("create BPF map %s: %w", spec.Name, err)
	}
	defer inner.Close()
	const nobody = uint32(math.MaxUint32)
	switch err := m.Put(nobody, inner); {
	case errors.Is(err, unix.EINVAL):
		return errOtherInner
	case errors.Is(err, unix.E2BIG):
		return nil // full of what nobody can tell
	case err != nil:
		return fmt.Errorf("put a map into a pinned one: %w", err)
	}
	if err := deleteKey(m, nobody); err != nil {
		return fmt.Errorf("take a map out of a pinned one: %w", err)
	}
	return nil
}

// adoptProgram returns the pinned program if it is the one of this build and
// works on these maps, otherwise loads it in its place. set is called to set
// the constants.
func (d *Datapath) adoptProgram(path, name string, maps map[string]*ebpf.Map, set func(*ebpf.CollectionSpec) error) (*ebpf.Program, error) {
	p, err := ebpf.LoadPinnedProgram(path, nil)
	if err == nil {
		if err = d.sameProgram(p, name, maps, set); err == nil {
			return p, nil
		}
		p.Close()
		d.log.Info("Replacing a program", "path", path, "reason", err)
	} else if !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("A pinned program can't be read and is loaded anew", "path", path, "error", err)
	}
	p, err = d.loadProgram(name, maps, set)
	if err != nil {
		return nil, err
	}
	// Links are compared with what is in use, not with this pin, so a process
	// that ends in between leaves nothing wrong.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.Close()
		return nil, fmt.Errorf("remove pinned program: %w", err)
	}
	if err := p.Pin(path); err != nil {
		p.Close()
		return nil, fmt.Errorf("pin BPF program %s: %w", name, err)
	}
	return p, nil
}

func (d *Datapath) loadProgram(name string, maps map[string]*ebpf.Map, set func(*ebpf.CollectionSpec) error) (*ebpf.Program, error) {
	spec := d.spec.Copy()
	replacements := map[string]*ebpf.Map{}
	used := usedMaps(spec.Programs[name])
	for m := range spec.Maps {
		switch {
		case !used[m]:
			delete(spec.Maps, m)
		case maps[m] != nil:
			replacements[m] = maps[m]
		}
	}
	if set != nil {
		if err := set(spec); err != nil {
			return nil, fmt.Errorf("set constants of BPF program %s: %w", name, err)
		}
	}
	for v, variable := range spec.Variables {
		if !used[variable.SectionName] {
			delete(spec.Variables, v)
		}
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{name: spec.Programs[name]}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if err != nil {
		return nil, fmt.Errorf("load BPF program %s: %w", name, err)
	}
	defer c.Close()
	return c.DetachProgram(name), nil
}

// usedMaps are the names of the maps that a program refers to.
func usedMaps(spec *ebpf.ProgramSpec) map[string]bool {
	names := map[string]bool{}
	for i := range spec.Instructions {
		if ins := &spec.Instructions[i]; ins.IsLoadFromMap() {
			names[ins.Reference()] = true
		}
	}
	return names
}

var (
	errOtherCode = errors.New("it is another version")
	errOtherMaps = errors.New("it works on other maps")
)

// sameProgram says why a loaded program isn't what would be loaded now. The
// kernel's tag covers the instructions, but not which maps they use.
func (d *Datapath) sameProgram(p *ebpf.Program, name string, maps map[string]*ebpf.Map, set func(*ebpf.CollectionSpec) error) error {
	info, err := p.Info()
	if err != nil {
		return err
	}
	switch tag, err := d.tag(name, maps, set); {
	case err != nil:
		return err
	case tag != info.Tag:
		return errOtherCode
	}
	ids, ok := info.MapIDs()
	if !ok {
		return errors.New("the kernel doesn't tell which maps it uses")
	}
	for name := range usedMaps(d.spec.Programs[name]) {
		if maps[name] == nil {
			continue // constants
		}
		m, err := maps[name].Info()
		if err != nil {
			return err
		}
		if id, ok := m.ID(); !ok || !slices.Contains(ids, id) {
			return errOtherMaps
		}
	}
	return nil
}

// tag is what the kernel says of this build's program: what can be computed from
// the file alone differs for programs with functions.
func (d *Datapath) tag(name string, maps map[string]*ebpf.Map, set func(*ebpf.CollectionSpec) error) (string, error) {
	if tag, ok := d.tags[name]; ok {
		return tag, nil
	}
	p, err := d.loadProgram(name, maps, set)
	if err != nil {
		return "", err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return "", err
	}
	d.tags[name] = info.Tag
	return info.Tag, nil
}

// ensureLink makes the pin at path a link that fits, with the given program. A
// link whose device, namespace or cgroup is gone fits nothing.
func ensureLink(path string, program *ebpf.Program, fits func(*link.Info) bool, attach func() (link.Link, error)) error {
	switch kept, err := keepLink(path, program, fits); {
	case err != nil:
		return err
	case kept:
		return nil
	}
	if err := detach(path); err != nil {
		return err
	}
	l, err := attach()
	if err != nil {
		return err
	}
	// Unpinned, it ends with its last file descriptor.
	defer l.Close()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin link %s: %w", path, err)
	}
	return nil
}

// detach ends a link and removes its pin, if it is there. The kernel alone would
// detach some time after the pin is gone.
func detach(path string) error {
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		err := l.Detach()
		l.Close()
		if err != nil && !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("detach %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pinned link: %w", err)
	}
	return nil
}

// removeDir detaches the links in a folder of pins, in the order given, and
// removes the folder with all else that is in it.
func removeDir(dir string, links ...string) error {
	for _, name := range links {
		if err := detach(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

func keepLink(path string, program *ebpf.Program, fits func(*link.Info) bool) (bool, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return false, nil // absent or something else: a new one takes its place
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || !fits(info) {
		return false, nil
	}
	return true, updateLink(path, l, info, program)
}

func updateLink(path string, l link.Link, info *link.Info, program *ebpf.Program) error {
	wanted, err := program.Info()
	if err != nil {
		return fmt.Errorf("examine BPF program: %w", err)
	}
	if id, ok := wanted.ID(); ok && id == info.Program {
		return nil
	}
	if err := l.Update(program); err != nil {
		return fmt.Errorf("replace program of link %s: %w", path, err)
	}
	return nil
}

// replaceProgram gives a pinned link another program, if it is there and attached.
func (d *Datapath) replaceProgram(path string, program *ebpf.Program) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil {
		defer l.Close()
		var info *link.Info
		if info, err = l.Info(); err == nil {
			err = updateLink(path, l, info, program)
		}
	}
	if err != nil && !errors.Is(err, unix.ENOLINK) {
		d.log.Warn("Can't replace the program of a link; the former one stays", "path", path, "error", err)
	}
}
