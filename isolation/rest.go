package isolation

import (
	"context"
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

// DeleteAtRest is Delete for a tenant that nobody wants any more, without a moment
// between the last look for something under way and the end: its processes are stopped
// first. Only if all of their threads wait then, and idle finds nothing in the kernel
// that they haven't taken, they are ended, as they are; otherwise they go on, and deleted
// is false. A manager that is killed in between leaves them stopped to the next one,
// which has them go on. Of the Manager idle may ask for State only.
func (m *Manager) DeleteAtRest(ctx context.Context, name model.Tenant, idle func() (bool, error)) (deleted bool, err error) {
	t, err := m.lock(name, true)
	if err != nil {
		return false, err
	}
	defer t.op.Unlock()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if ended, err := t.endAtRest(idle); err != nil || !ended {
		if err != nil {
			err = fmt.Errorf("delete bulkhead of %s at rest: %w", name, err)
		}
		return false, err
	}
	return true, m.delete(t)
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
		if rests, err := r.awaitStop(); err != nil || !rests {
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

// awaitStop waits until all threads have stopped, and reports whether each of them had
// nothing to do then. One that has ended has nothing to do.
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
		if err != nil {
			return false, false, fmt.Errorf("look at what a thread does: %w", err)
		}
		// "-1" is one that was stopped at work.
		number, _, _ := strings.Cut(strings.TrimSpace(string(call)), " ")
		n, err := strconv.Atoi(number)
		rest = rest && err == nil && slices.Contains(waitCalls, n)
	}
	return true, rest, nil
}
