package bpf

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// DefaultPinDir is where links, programs and maps are pinned by default.
const DefaultPinDir = "/sys/fs/bpf/bulkhead"

// Options configure Open. The zero value works.
type Options struct {
	// PinDir is a folder on a BPF file system (see Mount), made by Open; its
	// name can't hold a dot. Default DefaultPinDir.
	PinDir string
	// Mark and MarkMask are the bits of a packet's mark that say that a tenant
	// sent it as a pod, and which of them can be set. It has the mark only on
	// the way into the pod's veth, where the first program takes it off. Default
	// 0xb01df00d and all bits.
	Mark, MarkMask uint32
	// Log gets what isn't any caller's error. Default: nothing is logged.
	Log *slog.Logger
}

// Datapath is the steering of one node. All methods can be called concurrently;
// those that attach or look up interfaces must run in the node's network
// namespace. One process at a time has it open.
type Datapath struct {
	dir  string
	log  *slog.Logger
	lock *os.File

	mu       sync.Mutex
	spec     *ebpf.CollectionSpec
	maps     map[string]*ebpf.Map     // shared ones, by name
	programs map[string]*ebpf.Program // shared ones, by name
	tags     map[string]string        // the kernel's, of this build's programs
	pods     map[string]*podEntries   // what the maps hold, by UID
	// exclusions are the entries of the map, by ifindex.
	exclusions map[uint32]map[datapathExclusion]uint8
	events     *steer.EventReader // the one that is open, or nil
	suspected  map[uint16]int64   // by how much a tenant's count of connections was too high
	late       *latecomers        // while the programs are replaced, if the map of flows was carried over
	kept       *keptFlows         // nil before they were counted
	joining    map[uint32]uint16  // the tenants of pods that aren't there yet, but have connections written down, by ifindex
	cut        steer.Cut          // connections that pods have lost in moves, by the tenant that had too many
}

// sharedMaps are used by the programs of all tenants.
var sharedMaps = []string{datapathMapPods, datapathMapVeths, datapathMapTenants, datapathMapNodeAddresses, datapathMapCounters,
	datapathMapPerPod, datapathMapLoads, datapathMapBegun, datapathMapAnswered, datapathMapFlows, datapathMapFormers, datapathMapExclusions, datapathMapConfig, datapathMapEvents,
	datapathMapPerGeneration, datapathMapWatched, datapathMapSyns}

// sharedPrograms are loaded once; steer is loaded for every tenant.
var sharedPrograms = []string{datapathProgFromPod, datapathProgToPod, datapathProgFromTenant}

// Open loads the programs, or adopts what a former process pinned, also if that
// one was killed at any point. Where a pinned program differs from the one of
// this build, it is replaced in place, without a moment in between.
//
// If a map has another layout than in this build, its entries are carried over,
// where the kernel says what their fields are. If they can't be, for lack of that
// or because a field has another meaning, a warning is logged, and the map made anew.
// Where it says what is steered to where, the TCP of the node's mesh pods is dropped
// until UpdateTenant, UpdatePod and SetListeners were called for them; counters begin
// at 0.
func Open(o Options) (*Datapath, error) {
	if o.PinDir == "" {
		o.PinDir = DefaultPinDir
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Mark == 0 && o.MarkMask == 0 {
		o.Mark, o.MarkMask = 0xb01df00d, 0xffffffff
	}
	// With a mark of 0, all packets of pods would pass in the clear.
	if o.Mark == 0 || o.Mark&^o.MarkMask != 0 {
		return nil, fmt.Errorf("mark %#x with mask %#x: want some bit, and none outside of the mask", o.Mark, o.MarkMask)
	}
	if err := makeDirs(o.PinDir); err != nil {
		return nil, err
	}
	lock, err := lockDir(o.PinDir)
	if err != nil {
		return nil, err
	}
	spec, err := loadDatapath()
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("read the built-in BPF object: %w", err)
	}
	d := &Datapath{
		dir: o.PinDir, log: o.Log, lock: lock, spec: spec,
		maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, tags: map[string]string{}, pods: map[string]*podEntries{}, exclusions: map[uint32]map[datapathExclusion]uint8{}, joining: map[uint32]uint16{}, cut: steer.Cut{},
	}
	if err := d.load(datapathSettings{Mark: o.Mark, MarkMask: o.MarkMask}); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Datapath) load(settings datapathSettings) error {
	defer d.endLate()
	for _, name := range sharedMaps {
		m, err := d.adoptMap(filepath.Join(d.dir, "maps", name), d.spec.Maps[name])
		if err != nil {
			return err
		}
		d.maps[name] = m
	}
	if err := d.addLoads(); err != nil {
		return err
	}
	// A former process' secret stays: handshakes go on.
	var former datapathSettings
	if err := d.maps[datapathMapConfig].Lookup(uint32(0), &former); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	if settings.HashKey = former.HashKey; settings.HashKey == [2]uint32{} {
		var key [8]byte
		rand.Read(key[:]) // never fails
		settings.HashKey = [2]uint32{binary.NativeEndian.Uint32(key[:4]), binary.NativeEndian.Uint32(key[4:])}
	}
	if err := d.maps[datapathMapConfig].Put(uint32(0), settings); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	for _, name := range sharedPrograms {
		p, err := d.adoptProgram(filepath.Join(d.dir, "programs", name), name, d.maps, nil)
		if err != nil {
			return err
		}
		d.programs[name] = p
	}
	// Packets that belong to no tenant.
	if err := d.addCounters(0); err != nil {
		return err
	}
	if err := errors.Join(d.readPods(), d.readExclusions()); err != nil {
		return err
	}
	// Before a pod's programs are replaced, and before those that write of others are.
	d.copyLate()
	err := d.replacePrograms()
	d.copyLate()
	return err
}

// replacePrograms brings this build's programs into all links there are. What
// can't be replaced keeps its former program, which is closed too; the caller's
// next update of that pod or tenant tells the error.
func (d *Datapath) replacePrograms() error {
	pods, err := entries(filepath.Join(d.dir, "pods"))
	if err != nil {
		return err
	}
	for _, uid := range pods {
		for _, name := range podLinks {
			d.replaceProgram(filepath.Join(d.podDir(uid), name), d.programs[name])
		}
	}
	d.copyLate()
	tenants, err := d.tenantDirs()
	if err != nil {
		return err
	}
	for _, index := range tenants {
		dir := d.tenantDir(index)
		d.replaceProgram(filepath.Join(dir, fromTenantLink), d.programs[datapathProgFromTenant])
		if err := d.replaceTenantPrograms(index); err != nil {
			d.log.Warn("Can't load a tenant's steering; what is there stays", "tenant", index, "error", err)
		}
	}
	return nil
}

func (d *Datapath) replaceTenantPrograms(index uint16) error {
	dir := d.tenantDir(index)
	steer, listeners, err := d.loadSteer(index)
	if err != nil {
		return err
	}
	defer steer.Close()
	defer listeners.Close()
	d.replaceProgram(filepath.Join(dir, steerLink), steer)
	observe, err := d.loadObserve(index)
	if err != nil {
		return err
	}
	defer observe.Close()
	d.replaceProgram(filepath.Join(dir, observeLink), observe)
	return nil
}

// Close leaves all of it attached and at work.
func (d *Datapath) Close() error {
	eventsErr := d.closeEvents()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.maps {
		m.Close()
	}
	for _, p := range d.programs {
		p.Close()
	}
	return errors.Join(eventsErr, d.lock.Close())
}

// Uninstall detaches and removes all that is pinned under pinDir (empty:
// DefaultPinDir), of whatever version. Pods that still run have their plain
// connections from then on. It is not an error if there is nothing.
func Uninstall(pinDir string) error {
	if pinDir == "" {
		pinDir = DefaultPinDir
	}
	lock, err := lockDir(pinDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	// Pods first: without their tenant they would be cut off.
	for _, part := range []struct {
		name  string
		links []string
	}{{"pods", podLinks}, {"tenants", tenantLinks}} {
		names, err := entries(filepath.Join(pinDir, part.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, name := range names {
			if err := removeDir(filepath.Join(pinDir, part.name, name), part.links...); err != nil {
				return fmt.Errorf("uninstall: %w", err)
			}
		}
	}
	if err := os.RemoveAll(pinDir); err != nil {
		return fmt.Errorf("remove pinned BPF objects: %w", err)
	}
	return nil
}

// SetNodeAddresses says which addresses are the node's own, all of them: pods
// reach those directly, and connections that come from there are delivered from
// the deliver address.
func (d *Datapath) SetNodeAddresses(addresses []netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.maps[datapathMapNodeAddresses]
	wanted := map[datapathAddr]bool{}
	for _, a := range addresses {
		key, err := addrKey(a)
		if err != nil {
			return fmt.Errorf("set the node's addresses: %w", err)
		}
		wanted[key] = true
		if err := m.Put(key, uint8(1)); err != nil {
			return fmt.Errorf("set the node's address %s (at most %d): %w", a, m.MaxEntries(), err)
		}
	}
	var stale []datapathAddr
	var key datapathAddr
	var value uint8
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if !wanted[key] {
			stale = append(stale, key)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read the node's addresses: %w", err)
	}
	for _, key := range stale {
		if err := deleteKey(m, key); err != nil {
			return fmt.Errorf("remove a node's address: %w", err)
		}
	}
	return nil
}

// addrKey is an address as the programs look it up.
func addrKey(a netip.Addr) (datapathAddr, error) {
	if !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
		return datapathAddr{}, fmt.Errorf("address %q: want one IPv4 or IPv6 address without a zone", a)
	}
	return datapathAddr{Bytes: a.As16()}, nil
}

// deleteKey deletes what may not be there.
func deleteKey(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// lockDir keeps a second process away while the folder is open: two would undo
// each other's work.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pin folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("pin folder %s is in use by another process: end it first", dir)
		}
		return nil, fmt.Errorf("lock pin folder %s: %w", dir, err)
	}
	return f, nil
}
