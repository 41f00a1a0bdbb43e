// Package attest tells which pod a process is in by what the kernel says, and by
// nothing that the process could.
//
//	connected socket ──SO_PEERPIDFD──▶ pidfd ──▶ /proc/PID/cgroup ──▶ pod's UID
//	                                     └── alive before and after: it was that process
package attest

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrExited is for a process that isn't there any more.
var ErrExited = errors.New("the process has exited")

// Process is the process that connected to a Unix socket. It stays the same one
// however often pids are used again. Its methods may be called from any
// goroutine; the caller closes it.
type Process struct {
	// PID as this process sees it. It means that process only while it is Alive.
	PID int
	// UID that it had when it connected, in this process's user namespace.
	UID uint32

	fd *os.File // a pidfd
}

// Peer returns the process that connected c, which this process accepted. It is
// that process whoever holds the other end of c now: who hands a connection on
// hands on what it may do, as with what it was told over it. The error wraps
// ErrExited if it has exited.
func Peer(c *net.UnixConn) (*Process, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("identify peer: %w", err)
	}
	fd := -1
	var cred *unix.Ucred
	var credErr, fdErr error
	if err := raw.Control(func(s uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil {
			fd, fdErr = unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		}
	}); err != nil {
		return nil, fmt.Errorf("identify peer: %w", err)
	}
	switch {
	case credErr != nil:
		return nil, fmt.Errorf("identify peer: %w", credErr)
	case errors.Is(fdErr, unix.ENOPROTOOPT):
		return nil, fmt.Errorf("identify peer: this kernel doesn't know SO_PEERPIDFD, Linux 6.5 does: %w", fdErr)
	case errors.Is(fdErr, unix.ESRCH), errors.Is(fdErr, unix.EINVAL), errors.Is(fdErr, unix.ENODATA):
		return nil, fmt.Errorf("identify peer: %w", ErrExited)
	case fdErr != nil:
		return nil, fmt.Errorf("identify peer: %w", fdErr)
	}
	unix.CloseOnExec(fd)
	p, err := newProcess(fd)
	if err != nil {
		return nil, fmt.Errorf("identify peer: %w", err)
	}
	p.UID = cred.Uid
	return p, nil
}

// newProcess takes over a pidfd, also if it fails.
func newProcess(fd int) (*Process, error) {
	if err := unix.SetNonblock(fd, true); err != nil { // for Go's poller
		unix.Close(fd)
		return nil, err
	}
	p := &Process{fd: os.NewFile(uintptr(fd), "pidfd")}
	var err error
	if p.PID, err = pidOf(fd); err == nil && !p.Alive() {
		err = ErrExited
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func pidOf(pidfd int) (int, error) {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(pidfd))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(v))
			switch {
			case err != nil:
				return 0, err
			case pid < 0:
				return 0, ErrExited
			case pid == 0:
				return 0, errors.New("the process is in a process namespace that this one doesn't see: the agent must be in the node's")
			}
			return pid, nil
		}
	}
	return 0, errors.New("its pidfd doesn't tell a pid")
}

// Close lets go of the process.
func (p *Process) Close() error { return p.fd.Close() }

// Alive reports whether the process hasn't exited.
func (p *Process) Alive() bool {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = raw.Control(func(fd uintptr) { alive = !exited(fd) })
	return alive && err == nil
}

// Wait returns when the process has exited or Close was called.
func (p *Process) Wait() {
	raw, err := p.fd.SyscallConn()
	if err == nil {
		_ = raw.Read(exited) // fails when closed
	}
}

// exited reports whether a pidfd's process has, which makes it readable.
func exited(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err != nil || n > 0
		}
	}
}

// Pod returns the UID of the pod whose cgroups the process is in now. The error
// wraps ErrExited if it has exited.
func (p *Process) Pod(c PodCgroups) (uid string, err error) {
	err = p.read("cgroup", func(file string) error {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		uid, err = c.pod(f)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("find the pod of process %d: %w", p.PID, err)
	}
	return uid, nil
}

// Namespace identifies a namespace while somebody is in it.
type Namespace struct{ device, inode uint64 }

// NetworkNamespace is the one that the process is in now. The error wraps
// ErrExited if it has exited.
func (p *Process) NetworkNamespace() (n Namespace, err error) {
	err = p.read("ns/net", func(file string) error {
		n, err = NamespaceAt(file)
		return err
	})
	if err != nil {
		return n, fmt.Errorf("find the network of process %d: %w", p.PID, err)
	}
	return n, nil
}

// NamespaceAt is the namespace that a file of /proc, or a mount of one, stands for.
func NamespaceAt(file string) (Namespace, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return Namespace{}, fmt.Errorf("stat %s: %w", file, err)
	}
	return Namespace{st.Dev, st.Ino}, nil
}

// read lets f read a file of the process under /proc. Its pid isn't used again
// while it isn't reaped: if it is alive afterwards, what was read was its own.
func (p *Process) read(name string, f func(file string) error) error {
	err := f(filepath.Join("/proc", strconv.Itoa(p.PID), name))
	if !p.Alive() {
		return ErrExited
	}
	return err
}
