package isolation

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// LogLimit is how many bytes a log file can have.
const LogLimit = 8 << 20

const (
	termGrace    = 2 * time.Second
	startTimeout = 10 * time.Second

	probeStarting = 25 * time.Millisecond
	probeLive     = 5 * time.Second

	// A log is begun anew at logTurn; the kernel stops it at LogLimit.
	logTurn = 4 << 20
	// openFiles is the most that a proxy gets of what the agent may have open.
	openFiles = 1 << 20
)

// process keeps one generation of a tenant running. Its goroutine is the only
// one that starts and reaps.
type process struct {
	tenant *tenant
	// end is closed to have it ended; the manager's context ends the watching only.
	end     chan struct{}
	endOnce sync.Once
	// draining is closed to have it ended once it has no connections left, or at
	// the deadline in state.
	draining  chan struct{}
	drainOnce sync.Once
	// first is closed after the first attempt to start, with what came of it in firstErr.
	first    chan struct{}
	firstErr error
	done     chan struct{}

	mu      sync.Mutex
	state   processState
	running *running
	live    bool
	// liveSince is zero while it isn't live, and served for how long it was before, at most.
	liveSince time.Time
	served    time.Duration
	problem   string
}

func newProcess(t *tenant, s processState, r *running) *process {
	return &process{
		tenant: t, state: s, running: r,
		end: make(chan struct{}), draining: make(chan struct{}), first: make(chan struct{}), done: make(chan struct{}),
	}
}

// stop has the process ended and waits for it.
func (p *process) stop() {
	p.endOnce.Do(func() { close(p.end) })
	<-p.done
}

func (p *process) snapshot() (processState, bool, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state, p.live, p.problem
}

// run supervises until the process is to end, or ctx does and it is left alone.
func (p *process) run(ctx context.Context) {
	defer close(p.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watching, unwatch := context.WithCancel(ctx)
	defer unwatch()
	go func() {
		select {
		case <-p.draining:
			unwatch()
		case <-ctx.Done():
		}
	}()
	go func() {
		select {
		case <-p.end:
			cancel()
		case <-ctx.Done():
		}
	}()
	var delays backoff
	for {
		p.mu.Lock()
		r := p.running
		p.mu.Unlock()
		var err error
		if r == nil {
			r, err = p.start()
		}
		p.attempted(err)
		var served time.Duration
		if err == nil {
			p.watch(watching, r)
			if ctx.Err() == nil && watching.Err() != nil {
				p.drain(ctx, r)
			}
			if ctx.Err() != nil && !r.exited() {
				p.leave(r)
				return
			}
			served = p.healthyFor()
			p.gone(r)
		}
		if watching.Err() != nil {
			return
		}
		select {
		case <-watching.Done():
			return
		case <-time.After(delays.next(served)):
		}
		p.mu.Lock()
		p.state.Restarts++
		p.mu.Unlock()
	}
}

// healthyFor is for how long the process has served, without a break. One that dies while
// it is probed, or hangs before, doesn't answer last.
func (p *process) healthyFor() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.liveSince.IsZero() {
		return p.served
	}
	return max(p.served, time.Since(p.liveSince))
}

// attempted notes what came of a start.
func (p *process) attempted(err error) {
	p.mu.Lock()
	p.problem = ""
	if err != nil {
		p.problem = err.Error()
	}
	p.mu.Unlock()
	select {
	case <-p.first:
	default:
		p.firstErr = err
		close(p.first)
	}
	p.tenant.changed()
}

// watch returns when the process has ended or ctx is over.
func (p *process) watch(ctx context.Context, r *running) {
	interval := probeStarting
	for {
		live := ready(ctx, p.tenant.netns(), p.state.Generation)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		changed, first := p.live != live, live && !p.state.Served
		p.live, p.state.Served = live, p.state.Served || live
		switch {
		case !live && !p.liveSince.IsZero():
			p.served, p.liveSince = max(p.served, time.Since(p.liveSince)), time.Time{}
		case !live:
		case p.liveSince.IsZero():
			p.liveSince = time.Now()
		}
		p.mu.Unlock()
		if first {
			p.persist()
		}
		if changed {
			p.tenant.changed()
		}
		switch {
		case live:
			interval = probeLive
		case changed:
			interval = probeStarting
		default:
			interval = min(2*interval, time.Second)
		}
		if err := turnLog(p.logPath()); err != nil {
			p.tenant.m.log.Warn("Can't turn a proxy's log.", "tenant", p.tenant.name, "error", err)
		}
		if r.wait(ctx, interval) || ctx.Err() != nil {
			return
		}
	}
}

// gone notes the end of a process, and tells of it.
func (p *process) gone(r *running) {
	status := r.reap()
	oom := p.tenant.takeOOMKill()
	p.mu.Lock()
	exit := Exit{PID: r.pid, At: time.Now(), Log: lastLog(p.logPath(), p.state.LogStart)}
	exit.Cause, exit.Status = judge(status, oom, p.stopping())
	p.running, p.live, p.liveSince, p.served = nil, false, time.Time{}, 0
	p.state.PID, p.state.StartTicks = 0, 0
	p.state.Exit = exit
	generation := p.state.Generation
	p.mu.Unlock()
	p.persist()
	if exit.Cause != CauseStopped {
		p.tenant.m.log.Warn("A proxy ended.", "tenant", p.tenant.name, "generation", generation, "pid", exit.PID,
			"cause", exit.Cause, "status", exit.Status, "log", exit.Log)
	}
	p.tenant.ended(generation, exit)
	p.tenant.changed()
}

// stopping reports whether it was to end.
func (p *process) stopping() bool {
	for _, c := range []chan struct{}{p.end, p.draining} {
		select {
		case <-c:
			return true
		default:
		}
	}
	return false
}

// leave ends the process, if that is what was asked for, or lets go of it.
func (p *process) leave(r *running) {
	select {
	case <-p.end:
		p.mu.Lock()
		served := p.state.Served
		p.mu.Unlock()
		end := r.kill
		if served {
			// Before it has its handlers, process 1 of a pid namespace doesn't see SIGTERM.
			end = func() error { return r.terminate(termGrace) }
		}
		if err := end(); err != nil {
			p.tenant.m.log.Error("Can't end a proxy.", "tenant", p.tenant.name, "error", err)
		}
		p.gone(r)
	default:
		p.mu.Lock()
		p.running = nil
		p.mu.Unlock()
		r.release()
	}
}

func (p *process) persist() {
	if err := p.tenant.persist(); err != nil {
		p.tenant.m.log.Error("Can't keep the state of a tenant.", "tenant", p.tenant.name, "error", err)
	}
}

func (p *process) logPath() string {
	return p.tenant.m.o.logPath(p.tenant.name, p.state.Generation)
}

// start runs the launcher, writes down who it is, puts it where it belongs and
// lets it go on.
func (p *process) start() (*running, error) {
	t, m := p.tenant, p.tenant.m
	s, _, _ := p.snapshot()
	tree, err := m.versions.tree(s.Version)
	if err != nil {
		return nil, err
	}
	threads := workers(t.wantedWorkers(), t.wantedLimits())
	config, err := p.config(tree, s.Generation, s.Version, threads)
	if err != nil {
		return nil, err
	}
	if err := m.o.makeXDSDir(t.name, s.Generation, t.uid()); err != nil {
		return nil, err
	}
	if err := m.cgroups.ensure(t.file); err != nil {
		return nil, err
	}
	if err := t.limitAgain(); err != nil {
		return nil, err
	}
	log, err := m.o.openLog(t.name, s.Generation, t.uid())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	info, err := log.Stat()
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.state.LogStart, p.state.Workers = info.Size(), threads
	p.mu.Unlock()
	l, err := launch(m.o.Launcher, log)
	if err != nil {
		return nil, err
	}
	r, err := p.install(l, tree, config)
	l.close()
	if err != nil {
		if r != nil {
			err = errors.Join(err, r.kill())
			r.reap()
			if t.takeOOMKill() {
				err = fmt.Errorf("%w: out of memory", err)
			}
		} else {
			l.child.Kill()
			l.child.Wait()
		}
		p.mu.Lock()
		p.running, p.state.PID, p.state.StartTicks = nil, 0, 0
		p.mu.Unlock()
		p.persist()
		return nil, fmt.Errorf("start Envoy %s of %s: %w", s.Version, t.name, err)
	}
	return r, nil
}

func (p *process) config(tree string, generation int, version string, workers int) ([]byte, error) {
	t, m := p.tenant, p.tenant.m
	static, err := bootstrap(t.name, generation, version)
	if err != nil {
		return nil, err
	}
	return json.Marshal(initConfig{
		Root: m.o.rootDir(), EnvoyTree: tree, XDSDir: m.o.xdsDir(t.name, generation),
		Log: m.o.logPath(t.name, generation), Netns: t.netns(), Bootstrap: static,
		UID: t.uid(), Args: arguments(workers), Hostname: "bulkhead",
		LogLimit: LogLimit, OpenFiles: openFiles,
	})
}

// install is what happens between clone and exec, seen from outside.
func (p *process) install(l *launched, tree string, config []byte) (*running, error) {
	t := p.tenant
	pid := l.child.Pid
	r, err := hold(pid, l.child)
	if err != nil {
		return nil, err
	}
	ticks, err := startTicks(pid)
	if err != nil {
		return r, err
	}
	t.forgetOOMKills()
	p.mu.Lock()
	p.running, p.live, p.liveSince, p.served, p.state.Served = r, false, time.Time{}, 0, false
	p.state.PID, p.state.StartTicks, p.state.Tree, p.state.StartedAt = pid, ticks, tree, time.Now()
	p.mu.Unlock()
	// From here on a crash leaves a process that the next manager knows.
	if err := t.persist(); err != nil {
		return r, err
	}
	if err := t.m.cgroups.join(t.file, pid); err != nil {
		return r, err
	}
	return r, l.configure(config, startTimeout, p.end)
}

// launched is a launcher's process that waits for its configuration.
type launched struct {
	child            *os.Process
	config, failures *os.File
}

func launch(command []string, log *os.File) (*launched, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	configIn, configOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer configIn.Close()
	failuresIn, failuresOut, err := os.Pipe()
	if err != nil {
		configOut.Close()
		return nil, err
	}
	defer failuresOut.Close()
	child, err := os.StartProcess(command[0], command, &os.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: []*os.File{null, log, log, configFD: configIn, errorFD: failuresOut},
		// A session of its own: what a terminal sends to the agent isn't for it.
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setsid: true},
	})
	if err != nil {
		configOut.Close()
		failuresIn.Close()
		return nil, fmt.Errorf("run launcher: %w", err)
	}
	return &launched{child: child, config: configOut, failures: failuresIn}, nil
}

// configure hands the configuration over and returns what init says of it, or
// nil when it has become something else or ended. It waits no longer once end is
// closed; nil is for ever.
func (l *launched) configure(config []byte, timeout time.Duration, end <-chan struct{}) error {
	if err := l.failures.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-end:
			l.failures.SetReadDeadline(time.Unix(1, 0))
		case <-done:
		}
	}()
	_, err := l.config.Write(config)
	if err := errors.Join(err, l.config.Close()); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(l.failures, 4096))
	if err != nil {
		return fmt.Errorf("wait for exec: %w", err)
	}
	if len(text) > 0 {
		return errors.New(string(text))
	}
	return nil
}

func (l *launched) close() {
	l.config.Close()
	l.failures.Close()
}
