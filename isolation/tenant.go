package isolation

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Bulkhead is where a tenant's processes run.
type Bulkhead struct {
	Tenant model.Tenant
	// Index is 1 to 4095 and the tenant's alone on this node.
	Index uint16
	// UID is also its gid.
	UID uint32
	// Netns is the path of its network namespace on the node.
	Netns string
	// The two ends of its veth: the host's is on the node, the tenant's is eth0 in Netns.
	HostIfindex, TenantIfindex int
	HostMAC, TenantMAC         net.HardwareAddr
	// CgroupV2 is its folder in cgroup version 2, "" if the node has none.
	CgroupV2 string

	tenantDir string
}

// Process is one generation's Envoy.
type Process struct {
	Generation int
	Version    string
	// PID is 0 while none runs. With StartTicks, clock ticks since boot, it is
	// unique until the next boot.
	PID        int
	StartTicks uint64
	// Live says that Envoy has its first configuration and serves.
	Live      bool
	StartedAt time.Time
	// Restarts since the generation began.
	Restarts int
	// Workers are its threads that serve connections; 0 if that isn't known.
	Workers int
	// LastExit is how the one before ended, "" if there was none: Exit.Status.
	LastExit string
	// Exit says more about it.
	Exit Exit
	// DrainUntil isn't zero while the process finishes its connections because its
	// generation isn't wanted any more: it ends then at the latest.
	DrainUntil time.Time
}

// State is what is, as far as the kernel and the processes say.
type State struct {
	Bulkhead
	// Limits as read back from the kernel.
	Limits Limits
	// Bandwidth likewise, at the last Update.
	Bandwidth Bandwidth
	// Unenforced says which limits the node's cgroups can't hold as they are meant,
	// and why. It is no Problem: nothing but another node can change it.
	Unenforced []string
	Processes  []Process
	// Problem is what is wrong right now, "" if nothing is.
	Problem string
}

// tenant is one bulkhead with its processes.
type tenant struct {
	m    *Manager
	name model.Tenant
	file string

	// op is held by whoever changes the bulkhead: one at a time.
	op      sync.Mutex
	deleted bool
	// ending is an attempt to end its processes that nobody has asked about since it was
	// over, or nil. The manager's mu guards it.
	ending *ending

	// saving orders writes of the state file.
	saving sync.Mutex
	// limiting orders writes of limits, so that the last are those that are wanted.
	limiting sync.Mutex

	mu        sync.Mutex
	index     uint16
	mtu       int
	limits    Limits
	link      link
	problem   string
	processes []*process
	// oomKills is how many of the kernel's count were put down to a process.
	oomKills uint64
	// since when it is there.
	since time.Time
	// workers of each process, 0 by default.
	workers int
	// leaving is what SetLeaving said last, and telling that the proxies are being told.
	leaving, telling bool
	// bandwidth that the kernel had last, nil if it wasn't asked, and why it can't be
	// bounded.
	bandwidth *Bandwidth
	unshaped  string
}

func (t *tenant) netns() string { return t.m.o.netnsPath(t.name) }

func (t *tenant) uid() uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.m.o.UIDBase + uint32(t.index)
}

func (t *tenant) wantedLimits() Limits {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.limits
}

// limit has the kernel enforce the wanted limits, all that it can.
func (t *tenant) limit() error {
	t.limiting.Lock()
	defer t.limiting.Unlock()
	return t.m.cgroups.limit(t.file, t.wantedLimits())
}

// limitAgain does so before a start, in whatever cgroup there is then. It passes over
// what limit tells at each update: that the node can't hold a limit, or refuses a value.
func (t *tenant) limitAgain() error {
	t.limiting.Lock()
	defer t.limiting.Unlock()
	_, err := t.m.cgroups.write(t.file, t.wantedLimits())
	return err
}

func (t *tenant) wantedWorkers() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.workers
}

func (t *tenant) changed() {
	if t.m.o.Changed != nil {
		t.m.o.Changed(t.name)
	}
}

func (t *tenant) setProblem(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.problem = ""
	if err != nil {
		t.problem = err.Error()
	}
}

func (t *tenant) list() []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.processes)
}

func (t *tenant) persist() error {
	t.saving.Lock()
	defer t.saving.Unlock()
	t.mu.Lock()
	s := tenantState{Tenant: t.name.String(), Index: t.index, Boot: t.m.boot, MTU: t.mtu, Limits: t.limits, OOMKills: t.oomKills, Since: t.since, Workers: t.workers}
	t.mu.Unlock()
	for _, p := range t.list() {
		state, _, _ := p.snapshot()
		s.Processes = append(s.Processes, state)
	}
	return writeState(t.m.o.statePath(t.name), s)
}

// forgetOOMKills is called before a start: while nothing else runs, kills until
// now belong to processes that are gone.
func (t *tenant) forgetOOMKills() {
	for _, p := range t.list() {
		p.mu.Lock()
		runs := p.running != nil
		p.mu.Unlock()
		if runs {
			return
		}
	}
	n := t.m.cgroups.oomKills(t.file)
	t.mu.Lock()
	t.oomKills = n
	t.mu.Unlock()
}

// takeOOMKill reports whether the kernel killed one more process of the tenant
// than was asked for here: each kill is put down to one process.
func (t *tenant) takeOOMKill() bool {
	n := t.m.cgroups.oomKills(t.file)
	t.mu.Lock()
	defer t.mu.Unlock()
	if n <= t.oomKills {
		t.oomKills = n
		return false
	}
	t.oomKills++
	return true
}

func (t *tenant) ended(generation int, e Exit) {
	if t.m.o.Exited != nil {
		t.m.o.Exited(t.name, generation, e)
	}
}

func (t *tenant) bulkhead() Bulkhead {
	t.mu.Lock()
	defer t.mu.Unlock()
	return Bulkhead{
		Tenant: t.name, Index: t.index, UID: t.m.o.UIDBase + uint32(t.index), Netns: t.netns(),
		HostIfindex: t.link.hostIfindex, TenantIfindex: t.link.tenantIfindex,
		HostMAC: t.link.hostMAC, TenantMAC: t.link.tenantMAC,
		CgroupV2: t.m.cgroups.unified(t.file), tenantDir: t.m.o.tenantDir(t.name),
	}
}

func (t *tenant) state() State {
	s := State{Bulkhead: t.bulkhead(), Limits: t.m.cgroups.limits(t.file), Unenforced: t.m.cgroups.unenforced(t.file, t.wantedLimits())}
	t.mu.Lock()
	problems := []string{t.problem}
	if t.bandwidth != nil {
		s.Bandwidth = *t.bandwidth
	}
	if t.unshaped != "" {
		s.Unenforced = append(s.Unenforced, t.unshaped)
	}
	t.mu.Unlock()
	for _, p := range t.list() {
		ps, live, problem := p.snapshot()
		s.Processes = append(s.Processes, Process{
			Generation: ps.Generation, Version: ps.Version, PID: ps.PID, StartTicks: ps.StartTicks,
			Live: live, StartedAt: ps.StartedAt, Restarts: ps.Restarts, Workers: ps.Workers, LastExit: ps.Exit.Status, Exit: ps.Exit,
			DrainUntil: ps.DrainUntil,
		})
		problems = append(problems, problem)
	}
	for _, problem := range problems {
		if problem != "" && s.Problem != "" {
			s.Problem += "; "
		}
		s.Problem += problem
	}
	return s
}

// prepare makes everything but processes. The caller holds op.
func (t *tenant) prepare(mtu int) error {
	index, err := t.m.indexes.acquire(t.file)
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.index, t.mtu = index, mtu
	if t.since.IsZero() {
		t.since = time.Now()
	}
	t.mu.Unlock()
	// The state comes first, so that nothing is there that a next manager wouldn't look for.
	if err := t.persist(); err != nil {
		return err
	}
	if err := t.m.cgroups.ensure(t.file); err != nil {
		return err
	}
	if err := ensureNetns(t.netns()); err != nil {
		return err
	}
	l, err := ensureNetwork(t.netns(), t.m.o.linkName(index), index, mtu)
	if err != nil {
		return err
	}
	t.mu.Lock()
	t.link = l
	t.mu.Unlock()
	return os.MkdirAll(t.m.o.tenantDir(t.name), 0o700)
}

// update brings processes to what is wanted. The caller holds op.
func (t *tenant) update(ctx context.Context, s Spec) error {
	t.mu.Lock()
	t.limits, t.workers = s.Limits, s.Workers
	t.mu.Unlock()
	// A limit that the kernel refuses is a problem and no reason to have no proxy.
	errs := []error{t.limit(), t.setBandwidth(s.Bandwidth)}
	generations, err := t.possible(s.Generations)
	errs = append(errs, err)
	t.removeUnwanted(generations, s.Drain, !s.Unawaited)
	var started []*process
	for _, g := range generations {
		if p := t.process(g.Generation); p != nil {
			t.checkNetns(p)
			continue
		}
		if err := t.m.o.makeXDSDir(t.name, g.Generation, t.uid()); err != nil {
			errs = append(errs, err)
			continue
		}
		p := newProcess(t, processState{Generation: g.Generation, Version: g.Version}, nil)
		t.mu.Lock()
		t.processes = append(t.processes, p)
		t.mu.Unlock()
		started = append(started, p)
	}
	errs = append(errs, t.persist())
	for _, p := range started {
		t.m.supervise(p)
	}
	if s.Unawaited {
		return errors.Join(errs...)
	}
	for _, p := range started {
		select {
		case <-p.first:
			errs = append(errs, p.firstErr)
		case <-p.done:
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("wait for start of generation %d: %w", p.state.Generation, ctx.Err()))
		}
	}
	return errors.Join(errs...)
}

// possible is what is wanted, but with the version that runs where there is no
// other.
func (t *tenant) possible(wanted []Generation) ([]Generation, error) {
	possible := slices.Clone(wanted)
	var errs []error
	for i := range possible {
		version, err := t.runnable(possible[i])
		possible[i].Version = version
		errs = append(errs, err)
	}
	return possible, errors.Join(errs...)
}

// runnable is the version that a generation will run. One that isn't there must
// not end one that is: it is told in the error, and what runs stays.
func (t *tenant) runnable(g Generation) (string, error) {
	p := t.process(g.Generation)
	if p == nil {
		return g.Version, nil
	}
	state, _, _ := p.snapshot()
	if state.Version == g.Version {
		return g.Version, nil
	}
	if _, err := t.m.versions.tree(g.Version); err != nil {
		return state.Version, fmt.Errorf("generation %d stays at version %s: %w", g.Generation, state.Version, err)
	}
	return g.Version, nil
}

func (t *tenant) process(generation int) *process {
	for _, p := range t.list() {
		if p.state.Generation == generation {
			return p
		}
	}
	return nil
}

// removeUnwanted ends generations that aren't wanted, or with another version.
// One that isn't wanted at all has drain for its connections; the others have to
// make room at once. With await it returns when those have ended.
func (t *tenant) removeUnwanted(wanted []Generation, drain time.Duration, await bool) {
	var ended sync.WaitGroup
	var kept []int
	for _, p := range t.list() {
		state, _, _ := p.snapshot()
		if state.DrainUntil.IsZero() && slices.Contains(wanted, Generation{state.Generation, state.Version}) {
			kept = append(kept, state.Generation)
			continue
		}
		again := slices.ContainsFunc(wanted, func(g Generation) bool { return g.Generation == state.Generation })
		if drain > 0 && !again && t.startDrain(p, drain) {
			kept = append(kept, state.Generation)
			continue
		}
		if !await {
			t.startEnd(p)
			kept = append(kept, state.Generation)
			continue
		}
		ended.Go(func() {
			p.stop()
			t.forget(p, !again)
		})
	}
	ended.Wait()
	t.m.o.pruneLogs(t.name, kept)
}

// forget drops a process that has ended, and the folder of its socket unless the
// next one of that generation wants it.
func (t *tenant) forget(p *process, removeDir bool) {
	t.mu.Lock()
	t.processes = slices.DeleteFunc(t.processes, func(other *process) bool { return other == p })
	t.mu.Unlock()
	if !removeDir {
		return
	}
	if err := os.RemoveAll(t.m.o.xdsDir(t.name, p.state.Generation)); err != nil {
		t.m.log.Warn("Can't remove folder of an xDS socket.", "tenant", t.name, "error", err)
	}
}

// checkNetns kills a process whose network namespace was taken away from under
// it: it is started again in the one that there is now.
func (t *tenant) checkNetns(p *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running != nil && p.live && !sameNetns(p.running.pid, t.netns()) && !p.running.exited() {
		p.running.signal(9)
	}
}

// remove ends and removes everything. The caller holds op.
func (t *tenant) remove() error {
	t.removeUnwanted(nil, 0, true)
	t.mu.Lock()
	index := t.index
	t.mu.Unlock()
	if index == 0 {
		index = t.m.indexes.get(t.file)
	}
	if err := t.m.removeLeftovers(t.file, index); err != nil {
		return err
	}
	t.deleted = true
	return nil
}
