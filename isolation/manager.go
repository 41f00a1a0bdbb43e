package isolation

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Generation is one wanted process of a tenant.
type Generation struct {
	Generation int
	// Version of Envoy, as in Options.EnvoyDir.
	Version string
}

// Spec is what a tenant should be.
type Spec struct {
	Tenant model.Tenant
	// MTU of its veth: the smallest of its pods. 0 leaves the kernel's.
	MTU int
	// Limits take effect at once.
	Limits Limits
	// Bandwidth takes effect at once.
	Bandwidth Bandwidth
	// Workers is how many threads of each process serve connections, from its next
	// start on, at most MaxWorkers. 0 is one for each CPU that Limits allow, two at most.
	Workers int
	// Generations that should run, side by side.
	Generations []Generation
	// Unawaited has Update return before new processes have become Envoy, and before
	// those that aren't wanted have ended: until then they are there with a DrainUntil
	// that is over, and nothing is started in their place. How long either takes is up to
	// the tenant's limits, and to what it does with them.
	Unawaited bool
	// Drain is for how long a generation that is no longer among them may finish
	// its connections; it ends as soon as it has none. The caller has led new
	// connections elsewhere before. 0 ends it at once. A generation that drains
	// keeps the deadline that it got, over restarts of the manager too; without
	// Drain in a later Update it ends then.
	Drain time.Duration
}

// Manager owns all bulkheads of a node. There must be one per RunDir. Safe for
// concurrent use; calls for one tenant run one after the other, and no tenant
// waits for another.
type Manager struct {
	o        Options
	log      *slog.Logger
	boot     string
	cgroups  *cgroups
	indexes  *indexes
	versions *versions

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// unseen is told once: see errUnseen.
	unseen sync.Once
	// endings of tenants under way, which need the supervisors that wg is of.
	endings sync.WaitGroup

	// limiting is held by who limits all together, all are what that set last.
	limiting sync.Mutex
	all      atomic.Pointer[Limits]

	mu      sync.Mutex
	closed  bool
	tenants map[model.Tenant]*tenant
}

var errClosed = errors.New("isolation: manager is closed")

// Open adopts and supervises what a former manager left running, restarts what
// died meanwhile, and removes what a crash left half done. It must run as root
// in the node's network and pid namespaces. The caller closes the Manager.
func Open(o Options) (*Manager, error) {
	m, err := newManager(o)
	if err != nil {
		return nil, fmt.Errorf("open isolation: %w", err)
	}
	if err := m.adoptAll(); err != nil {
		m.Close()
		return nil, fmt.Errorf("open isolation: %w", err)
	}
	return m, nil
}

func newManager(o Options) (*Manager, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := o.makeDirs(); err != nil {
		return nil, err
	}
	m := &Manager{
		o: o, log: o.Log, tenants: map[model.Tenant]*tenant{},
		versions: &versions{from: o.EnvoyDir, to: filepath.Join(o.LibDir, "envoy"), known: map[string]knownVersion{}},
	}
	if m.boot, err = bootID(); err != nil {
		return nil, err
	}
	if m.cgroups, err = openCgroups(o.CgroupRoot, o.CgroupParent, o.CgroupName); err != nil {
		return nil, err
	}
	all := m.cgroups.limits(everyone)
	m.all.Store(&all)
	m.cgroups.all.Store(&all)
	m.cgroups.quota.Store(all.CPUMillis)
	m.versions.digest = m.neutralDigest
	if m.indexes, err = openIndexes(o.LibDir); err != nil {
		return nil, err
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

// Close ends the supervision. Everything keeps running for the next Open.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.endings.Wait()
	m.cancel()
	m.wg.Wait()
}

func (m *Manager) supervise(p *process) {
	if !m.background(func() {
		p.run(m.ctx)
		p.tenant.drained(p)
	}) {
		close(p.done)
	}
}

// background runs f beside the caller; Close waits for it. On a manager that is closed it
// does nothing and returns false.
func (m *Manager) background(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.wg.Go(f)
	}
	return !m.closed
}

// adoptAll takes over every tenant that has a whole state and removes the rest.
func (m *Manager) adoptAll() error {
	if err := m.cgroups.killOthers(textCgroup, nil); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(m.o.RunDir, "state"))
	if err != nil {
		return fmt.Errorf("read states: %w", err)
	}
	var adopted []string
	taken := map[uint16]string{}
	for _, e := range entries {
		path := filepath.Join(m.o.RunDir, "state", e.Name())
		if strings.HasPrefix(e.Name(), ".tmp-") {
			os.Remove(path)
			continue
		}
		s, name, err := readState(path)
		if err == nil && taken[s.Index] != "" {
			err = fmt.Errorf("index %d of %s is %s's", s.Index, name, taken[s.Index])
		}
		if err != nil {
			m.log.Error("A tenant's state is of no use; what is left of it is removed.", "error", err)
			continue
		}
		taken[s.Index] = s.Tenant
		adopted = append(adopted, e.Name())
		if err := m.adopt(s, name); err != nil {
			return fmt.Errorf("adopt tenant %s: %w", name, err)
		}
	}
	for _, file := range m.foundFiles() {
		if slices.Contains(adopted, file) {
			continue
		}
		if err := m.removeLeftovers(file, m.indexes.get(file)); err != nil {
			m.log.Error("Can't remove what is left of a tenant.", "tenant", file, "error", err)
		}
	}
	var used []string
	for _, t := range m.tenants {
		for _, p := range t.list() {
			used = append(used, p.state.Tree)
		}
	}
	if err := m.versions.prune(used); err != nil {
		m.log.Warn("Can't remove old copies of Envoy.", "error", err)
	}
	var wanted []string
	for _, t := range m.tenants {
		for _, p := range t.list() {
			wanted = append(wanted, p.state.Version)
			m.supervise(p)
		}
	}
	slices.Sort(wanted)
	m.wg.Go(func() {
		// Checked ahead, so that a proxy that dies doesn't wait for it. An error is
		// told when the version is needed.
		for _, version := range slices.Compact(wanted) {
			m.versions.tree(version)
		}
	})
	return nil
}

func (m *Manager) adopt(s tenantState, name model.Tenant) error {
	t := &tenant{m: m, name: name, file: name.FileName(), index: s.Index, mtu: s.MTU, limits: s.Limits, oomKills: s.OOMKills, since: s.Since, workers: s.Workers}
	if err := m.indexes.reserve(t.file, s.Index); err != nil {
		return err
	}
	var kept []*running
	for _, ps := range s.Processes {
		var r *running
		var err error
		if s.Boot == m.boot {
			if r, err = adopt(ps, t.netns(), t.file, m.cgroups); err != nil {
				return err
			}
		}
		if r == nil {
			if ps.PID != 0 {
				ps.Exit = Exit{PID: ps.PID, At: time.Now(), Cause: CauseUnknown, Status: "ended while no agent watched",
					Log: lastLog(m.o.logPath(name, ps.Generation), ps.LogStart)}
				if t.takeOOMKill() {
					ps.Exit.Cause, ps.Exit.Status = CauseOutOfMemory, ps.Exit.Status+": out of memory"
				}
				ps.Restarts++
				m.log.Warn("A proxy ended.", "tenant", name, "generation", ps.Generation, "pid", ps.PID,
					"cause", ps.Exit.Cause, "status", ps.Exit.Status, "log", ps.Exit.Log)
				t.ended(ps.Generation, ps.Exit)
			}
			ps.PID, ps.StartTicks = 0, 0
			if !ps.DrainUntil.IsZero() {
				continue
			}
		}
		kept = append(kept, r)
		p := newProcess(t, ps, r)
		if !ps.DrainUntil.IsZero() {
			p.drainOnce.Do(func() { close(p.draining) })
		}
		t.processes = append(t.processes, p)
	}
	if err := m.cgroups.killOthers(t.file, keepPIDs(kept)); err != nil {
		return err
	}
	m.tenants[name] = t
	// Repaired if need be; the link's indexes aren't in the state.
	if err := t.prepare(s.MTU); err != nil {
		t.setProblem(err)
		m.log.Error("Can't repair a tenant's bulkhead.", "tenant", name, "error", err)
	}
	return nil
}

// foundFiles are the names of all tenants of which anything is there.
func (m *Manager) foundFiles() []string {
	found := m.cgroups.tenants()
	for _, dir := range []string{"netns", "state", "tenants"} {
		entries, err := os.ReadDir(filepath.Join(m.o.RunDir, dir))
		if err != nil {
			continue
		}
		for _, e := range entries {
			found = append(found, e.Name())
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// removeLeftovers removes all of a tenant, whatever there is of it, processes
// first and its index last. index is 0 if it isn't known.
func (m *Manager) removeLeftovers(file string, index uint16) error {
	if err := m.cgroups.remove(file); err != nil {
		return err
	}
	if index != 0 {
		if err := ensureNoLink(m.o.linkName(index)); err != nil {
			return err
		}
	}
	if err := removeNetns(filepath.Join(m.o.RunDir, "netns", file)); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Join(m.o.RunDir, "tenants", file), filepath.Join(m.o.LibDir, "log", file)} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove tenant's files: %w", err)
		}
	}
	if err := removeFile(filepath.Join(m.o.RunDir, "state", file)); err != nil {
		return err
	}
	return m.indexes.release(file)
}

// lock returns the tenant with op held, nil if it isn't there and create is false. It
// doesn't wait for a tenant's end: that is an ErrEnding.
func (m *Manager) lock(name model.Tenant, create bool) (*tenant, error) {
	if err := checkTenant(name); err != nil {
		return nil, err
	}
	for {
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return nil, errClosed
		}
		t := m.tenants[name]
		if t == nil && create {
			t = &tenant{m: m, name: name, file: name.FileName()}
			m.tenants[name] = t
		}
		if t != nil && t.ending != nil {
			if !t.ending.isOver() {
				m.mu.Unlock()
				return nil, fmt.Errorf("tenant %s: %w", name, ErrEnding)
			}
			t.ending = nil // whatever came of it isn't so any more
		}
		m.mu.Unlock()
		if t == nil {
			return nil, nil
		}
		t.op.Lock()
		if !t.deleted {
			return t, nil
		}
		t.op.Unlock()
	}
}

// Prepare makes a tenant's index, cgroup, network and folders, but no process.
func (m *Manager) Prepare(ctx context.Context, name model.Tenant, mtu int) (Bulkhead, error) {
	t, err := m.lock(name, true)
	if err != nil {
		return Bulkhead{}, err
	}
	defer t.op.Unlock()
	if err := ctx.Err(); err != nil {
		return Bulkhead{}, err
	}
	if err := t.prepare(mtu); err != nil {
		err = fmt.Errorf("prepare bulkhead of %s: %w", name, err)
		t.setProblem(err)
		return Bulkhead{}, err
	}
	t.setProblem(nil)
	return t.bulkhead(), nil
}

// Update makes the tenant what s says: Prepare, limits, and processes, which the
// manager keeps running from then on. Unless they are Unawaited, it returns when each
// new process has become Envoy or failed to for the first time; State tells when it
// is live.
// Generations that aren't wanted are ended. A limit that the kernel refuses and
// a version that isn't there (ErrVersion) are told and hold up nothing else; a
// generation that runs another version goes on running that.
func (m *Manager) Update(ctx context.Context, s Spec) error {
	if err := s.validate(); err != nil {
		return fmt.Errorf("update bulkhead of %s: %w", s.Tenant, err)
	}
	t, err := m.lock(s.Tenant, true)
	if err != nil {
		return err
	}
	defer t.op.Unlock()
	before := t.state()
	if err = ctx.Err(); err == nil {
		if err = t.prepare(s.MTU); err == nil {
			err = t.update(ctx, s)
		}
	}
	if err != nil {
		err = fmt.Errorf("update bulkhead of %s: %w", s.Tenant, err)
	}
	t.setProblem(err)
	// Whoever repeats what is so already must not be woken by it, to repeat it.
	if !reflect.DeepEqual(before, t.state()) {
		t.changed()
	}
	return err
}

// Runnable is the version that Update will run for a wanted generation: another
// than g's if that isn't there and the generation runs already.
func (m *Manager) Runnable(name model.Tenant, g Generation) string {
	t := m.tenant(name)
	if t == nil {
		return g.Version
	}
	version, _ := t.runnable(g) // Update tells why
	return version
}

// HasVersion returns an ErrVersion that says why a version of Envoy can't be run. The
// first time it reads the version.
func (m *Manager) HasVersion(version string) error {
	_, err := m.versions.tree(version)
	return err
}

// AddVersion takes a tree, a folder on LibDir's file system that holds /envoy and its
// libraries, as a version of Envoy: it moves it away. The name must have a plus, which
// no version of EnvoyDir has. One of that name that is there is replaced.
func (m *Manager) AddVersion(version, tree string) error {
	if err := m.versions.add(version, tree); err != nil {
		return fmt.Errorf("add Envoy %s: %w", version, err)
	}
	return nil
}

// RemoveVersion removes a version that AddVersion brought. One that a tenant's process
// runs, or is to run, stays, with an ErrVersionInUse. One that isn't there is no error.
func (m *Manager) RemoveVersion(version string) error {
	for _, name := range m.Tenants() {
		t := m.tenant(name)
		if t == nil {
			continue
		}
		for _, p := range t.list() {
			if state, _, _ := p.snapshot(); state.Version == version {
				return fmt.Errorf("remove Envoy %s: %w: that of %s", version, ErrVersionInUse, name)
			}
		}
	}
	if err := m.versions.remove(version); err != nil {
		return fmt.Errorf("remove Envoy %s: %w", version, err)
	}
	return nil
}

func (s Spec) validate() error {
	if s.Drain < 0 {
		return fmt.Errorf("drain %s: can't be negative", s.Drain)
	}
	if err := s.Bandwidth.validate(); err != nil {
		return err
	}
	if s.Workers < 0 || s.Workers > MaxWorkers {
		return fmt.Errorf("%d workers: 0 to %d", s.Workers, MaxWorkers)
	}
	if s.MTU < 0 || (s.MTU > 0 && s.MTU < 1280) {
		return fmt.Errorf("MTU %d: at least 1280, for IPv6", s.MTU)
	}
	seen := map[int]bool{}
	for _, g := range s.Generations {
		if g.Generation < 0 || seen[g.Generation] {
			return fmt.Errorf("generation %d is negative or there twice", g.Generation)
		}
		seen[g.Generation] = true
	}
	return s.Limits.validate()
}

// Delete ends the tenant's processes, first by asking and after 2 s by force, and
// removes all of it. Deleting what isn't there is no error.
func (m *Manager) Delete(ctx context.Context, name model.Tenant) error {
	t, err := m.lock(name, true)
	if err != nil {
		return err
	}
	defer t.op.Unlock()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete bulkhead of %s: %w", name, err)
	}
	return m.delete(t)
}

// delete removes a tenant whose op the caller holds.
func (m *Manager) delete(t *tenant) error {
	if err := t.remove(); err != nil {
		err = fmt.Errorf("delete bulkhead of %s: %w", t.name, err)
		t.setProblem(err)
		return err
	}
	m.mu.Lock()
	delete(m.tenants, t.name)
	m.mu.Unlock()
	t.changed()
	return nil
}

// Tenants are all that there are, sorted by name.
func (m *Manager) Tenants() []model.Tenant {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []model.Tenant
	for name := range m.tenants {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b model.Tenant) int { return strings.Compare(a.String(), b.String()) })
	return names
}

func (m *Manager) tenant(name model.Tenant) *tenant {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tenants[name]
}

// HasCgroupV2 reports whether the node has cgroup version 2, where each tenant has a
// folder then, as long as it lasts.
func (m *Manager) HasCgroupV2() bool { return m.cgroups.unified("") != "" }

// State returns what is of a tenant, false if there is no such one.
func (m *Manager) State(name model.Tenant) (State, bool) {
	t := m.tenant(name)
	if t == nil {
		return State{}, false
	}
	return t.state(), true
}

// Kill sends a signal to a tenant's process; any other pid is refused with an
// error that wraps fs.ErrNotExist.
func (m *Manager) Kill(pid int, sig syscall.Signal) error {
	for _, name := range m.Tenants() {
		t := m.tenant(name)
		if t == nil {
			continue
		}
		for _, p := range t.list() {
			p.mu.Lock()
			r := p.running
			p.mu.Unlock()
			if r != nil && r.pid == pid {
				return r.signal(sig)
			}
		}
	}
	return fmt.Errorf("kill %d: it is no tenant's proxy: %w", pid, fs.ErrNotExist)
}

// LogFile is where a generation's output goes; the part before the last cut is
// beside it with the suffix .1.
func (m *Manager) LogFile(name model.Tenant, generation int) string {
	return m.o.logPath(name, generation)
}

// XDSSocket is the path, on the node, of the socket that the given generation
// connects to. Its folder is there once Update asked for that generation or
// MakeXDSDir for it alone.
func (b Bulkhead) XDSSocket(generation int) string {
	return filepath.Join(b.tenantDir, fmt.Sprintf("xds%d", generation), "xds.sock")
}

// MakeXDSDir creates the folder of a generation's socket ahead of Update, so that
// the socket can be there before the process that wants it.
func (m *Manager) MakeXDSDir(name model.Tenant, generation int) error {
	t, err := m.lock(name, false)
	if err != nil {
		return err
	}
	if t == nil {
		return fmt.Errorf("create xDS folder of %s: prepare it first", name)
	}
	defer t.op.Unlock()
	return m.o.makeXDSDir(name, generation, t.uid())
}
