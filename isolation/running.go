package isolation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// reapWait is how long another parent may take to reap a process.
const reapWait = 100 * time.Millisecond

// running is a process that is held by its pidfd, so that signals can't reach
// another one that got its pid.
type running struct {
	pid   int
	pidfd *os.File
	// child is nil for a process that another manager started.
	child *os.Process
}

// hold takes a process that must not have been reaped yet.
func hold(pid int, child *os.Process) (*running, error) {
	// Non-blocking, so that waiting for its end takes no thread.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &running{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"), child: child}, nil
}

// adopt takes the process of a state if it still is that one. It returns nil if
// it isn't, and ends it if it is but not where it belongs.
func adopt(s processState, netns, cgroup string, c *cgroups) (*running, error) {
	if s.PID <= 0 {
		return nil, nil
	}
	r, err := hold(s.PID, nil)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Read while the pidfd is held and then found alive: it is of this process.
	ticks, err := startTicks(s.PID)
	if err != nil || ticks != s.StartTicks || r.exited() {
		r.release()
		return nil, nil
	}
	if c.has(cgroup, s.PID) && sameNetns(s.PID, netns) {
		// A manager that was killed while it looked whether it could end it (End)
		// has left it stopped.
		if err := r.signal(unix.SIGCONT); err != nil && !errors.Is(err, unix.ESRCH) {
			r.release()
			return nil, err
		}
		return r, nil
	}
	// An init that didn't get far, or a network that was lost.
	r.kill()
	r.release()
	return nil, nil
}

// sameNetns is also true for an init that hasn't entered it yet but will, since
// the manager has put it into its cgroups: see adopt.
func sameNetns(pid int, netns string) bool {
	var own, want, node unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &own) != nil || unix.Stat(netns, &want) != nil {
		return false
	}
	if own.Ino == want.Ino && own.Dev == want.Dev {
		return true
	}
	return unix.Stat("/proc/self/ns/net", &node) == nil && own.Ino == node.Ino
}

// wait returns true when the process has ended, and false at the end of ctx or
// after d. It is the supervisor's: another's deadline would take the place of its own.
func (r *running) wait(ctx context.Context, d time.Duration) bool {
	if r.pidfd.SetReadDeadline(time.Now().Add(d)) != nil {
		return true
	}
	stop := context.AfterFunc(ctx, func() { r.pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := r.pidfd.SyscallConn()
	if err != nil {
		return true
	}
	return raw.Read(func(fd uintptr) bool { return readable(fd) }) == nil || r.exited()
}

func (r *running) exited() (exited bool) {
	raw, err := r.pidfd.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) { exited = readable(fd) })
	return err != nil || exited
}

func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1
}

func (r *running) signal(sig syscall.Signal) error {
	raw, err := r.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	if sent != nil {
		return fmt.Errorf("send signal %d to process %d: %w", sig, r.pid, sent)
	}
	return nil
}

// terminate ends the process: it is asked to, and after grace it is killed.
func (r *running) terminate(grace time.Duration) error {
	if err := r.signal(unix.SIGTERM); err == nil && r.wait(context.Background(), grace) {
		return nil
	}
	return r.kill()
}

func (r *running) kill() error {
	err := r.signal(unix.SIGKILL)
	if err == nil && !r.wait(context.Background(), 5*time.Second) {
		err = fmt.Errorf("process %d didn't end when it was killed: the kernel holds it", r.pid)
	}
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// release lets go of it, whether it runs or not.
func (r *running) release() {
	r.pidfd.Close()
	if r.child != nil {
		r.child.Release()
	}
}

// reap says how an ended process ended, as far as the kernel tells.
func (r *running) reap() exitStatus {
	defer r.pidfd.Close()
	if r.child != nil {
		state, err := r.child.Wait()
		if err != nil {
			return exitStatus{}
		}
		status, ok := state.Sys().(syscall.WaitStatus)
		return exitStatus{ok, status}
	}
	var s exitStatus
	raw, err := r.pidfd.SyscallConn()
	if err != nil {
		return s
	}
	raw.Control(func(fd uintptr) {
		// It may still be ours, of a manager that this program closed before.
		unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG, nil)
		// The status is there once its parent has reaped it. A parent that doesn't
		// must not hold up the next start.
		unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(reapWait/time.Millisecond))
		s = exitOf(fd)
	})
	return s
}

// keepPIDs are those of ps, for killOthers.
func keepPIDs(ps []*running) (pids []int) {
	for _, p := range ps {
		if p != nil {
			pids = append(pids, p.pid)
		}
	}
	slices.Sort(pids)
	return pids
}
