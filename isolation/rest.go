package isolation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// stopPatience is for how long a process may take to stop: a thread that is in the
// kernel stops when it leaves it.
const stopPatience = 250 * time.Millisecond

// waitCalls are those in which Envoy's threads have nothing to do. Epoll is asked again
// when the process goes on: what came meanwhile isn't lost.
var waitCalls = []int{unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2, unix.SYS_FUTEX}

// ErrEnding is returned for a tenant whose processes are being ended.
var ErrEnding = errors.New("its proxies are being ended")

// ending is an attempt to end a tenant's processes.
type ending struct {
	// over is closed when ended and err say what came of it.
	over  chan struct{}
	ended bool
	err   error
}

func (e *ending) isOver() bool {
	select {
	case <-e.over:
		return true
	default:
		return false
	}
}

// End ends the processes of a tenant that nobody wants any more, and removes its cgroup;
// the rest is Delete's. How long that takes is up to the tenant, so it goes on beside the
// caller, who is told by Changed when it is over and asks again then: until that End,
// like everything else that changes the tenant, returns an ErrEnding. After an attempt
// that came to nothing another call begins the next one.
//
// With idle there is no moment between the last look for something under way and the end:
// the processes are stopped first. Only if all of their threads wait then, and idle finds
// nothing in the kernel that they haven't taken, they are ended, as they are; otherwise
// they go on, and ended is false. A manager that is killed in between leaves them stopped
// to the next one, which has them go on. idle is asked before, too: who is busy isn't
// stopped. It runs beside the caller, and of the Manager it may ask for State only.
func (m *Manager) End(name model.Tenant, idle func() (bool, error)) (ended bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false, errClosed
	}
	t := m.tenants[name]
	switch {
	case t == nil:
		return true, nil
	case t.ending == nil:
		e := &ending{over: make(chan struct{})}
		t.ending = e
		m.endings.Go(func() {
			if e.ended, e.err = t.end(idle); e.err != nil {
				e.err = fmt.Errorf("end the proxies of %s: %w", name, e.err)
			}
			close(e.over)
			t.changed()
		})
	case t.ending.isOver():
		e := t.ending
		t.ending = nil
		return e.ended, e.err
	}
	return false, fmt.Errorf("tenant %s: %w", name, ErrEnding)
}

// end ends the processes and removes their cgroup, at rest only if idle isn't nil.
func (t *tenant) end(idle func() (bool, error)) (ended bool, err error) {
	t.op.Lock()
	defer t.op.Unlock()
	if idle != nil {
		if ok, err := idle(); err != nil || !ok {
			return false, err
		}
		if ended, err := t.endAtRest(idle); err != nil || !ended {
			return false, err
		}
	}
	t.removeUnwanted(nil, 0, true)
	// The next manager isn't to start them again.
	if err := errors.Join(t.persist(), t.m.cgroups.remove(t.file)); err != nil {
		return false, err
	}
	return true, nil
}

// endAtRest ends the processes. The caller holds op.
func (t *tenant) endAtRest(idle func() (bool, error)) (ended bool, err error) {
	processes := t.list()
	var stopped []*running
	for _, p := range processes {
		p.mu.Lock()
		if p.running != nil {
			stopped = append(stopped, p.running)
		}
		p.mu.Unlock()
	}
	defer func() {
		if !ended {
			err = errors.Join(err, signalAll(stopped, unix.SIGCONT))
		}
	}()
	if err := signalAll(stopped, unix.SIGSTOP); err != nil {
		return false, err
	}
	for _, r := range stopped {
		rests, err := r.awaitStop()
		if errors.Is(err, errUnseen) {
			// Asking again would come to the same.
			t.m.unseen.Do(func() {
				t.m.log.Warn("Proxies that end may lose what they have read and not passed on yet: what their threads do isn't shown.", "error", err)
			})
			continue
		}
		if err != nil || !rests {
			return false, err
		}
	}
	if ok, err := idle(); err != nil || !ok {
		return false, err
	}
	// Their supervisors hear of it first: it is no crash.
	for _, p := range processes {
		p.endOnce.Do(func() { close(p.end) })
	}
	return true, signalAll(stopped, unix.SIGKILL)
}

func signalAll(rs []*running, sig unix.Signal) error {
	var errs []error
	for _, r := range rs {
		// One that has ended is no error, whether or not its supervisor has let go of it.
		if err := r.signal(sig); err != nil && !r.exited() {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// errUnseen is that the kernel doesn't show what a thread does, of no process that isn't
// the manager's own.
var errUnseen = errors.New("the agent needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3")

// awaitStop waits until all threads have stopped, and reports whether each of them had
// nothing to do then, or that this can't be seen with an errUnseen. One that has ended has
// nothing to do.
func (r *running) awaitStop() (rests bool, err error) {
	for deadline := time.Now().Add(stopPatience); ; {
		stopped, rests, err := threads(r.pid)
		if r.exited() {
			return true, nil
		}
		if err != nil || stopped {
			return rests, err
		}
		if time.Now().After(deadline) {
			return false, nil
		}
		// The kernel tells parents only, and an adopted process is another's child. Not by
		// wait, whose deadline is of all who wait: the supervisor's would be this one's.
		time.Sleep(time.Millisecond)
	}
}

// threads reports whether all of a process's threads have stopped, and all of them in a
// call in which they waited.
func threads(pid int) (stopped, rest bool, err error) {
	dirs, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(dirs) == 0 {
		return false, false, err
	}
	rest = true
	var unseen error
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return false, false, nil // it ends; the others are to be listed again
		}
		if err != nil {
			return false, false, fmt.Errorf("look at a thread: %w", err)
		}
		if _, state, ok := cutLast(string(stat), ") "); !ok || !strings.HasPrefix(state, "T") {
			return false, false, nil
		}
		call, err := os.ReadFile(filepath.Join(dir, "syscall"))
		if errors.Is(err, fs.ErrPermission) {
			unseen = fmt.Errorf("look at what a thread does: %w; %w", err, errUnseen)
			continue
		}
		if err != nil {
			return false, false, fmt.Errorf("look at what a thread does: %w", err)
		}
		// "-1" is one that was stopped at work.
		number, _, _ := strings.Cut(strings.TrimSpace(string(call)), " ")
		n, err := strconv.Atoi(number)
		rest = rest && err == nil && slices.Contains(waitCalls, n)
	}
	return true, rest, unseen
}
