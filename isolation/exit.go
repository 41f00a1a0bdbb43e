package isolation

import (
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Cause is why a proxy ended.
type Cause string

// The causes. The zero value says that none has ended yet.
const (
	// CauseStopped: it wasn't wanted any more.
	CauseStopped Cause = "Stopped"
	// CauseOutOfMemory: the kernel killed it at its tenant's memory limit, or the
	// node's.
	CauseOutOfMemory Cause = "OutOfMemory"
	// CauseForbiddenCall: it made a system call that the sandbox doesn't allow.
	CauseForbiddenCall Cause = "ForbiddenCall"
	// CauseCrash: it ended by its own fault, or gave up with an error.
	CauseCrash Cause = "Crash"
	// CauseKilled: somebody sent a signal, and it wasn't the manager.
	CauseKilled Cause = "Killed"
	// CauseExited: it ended by itself without error.
	CauseExited Cause = "Exited"
	// CauseUnknown: it ended while no manager watched, or before Linux 6.15 told
	// how somebody else's child ended.
	CauseUnknown Cause = "Unknown"
)

// Exit is how a process ended. It is comparable.
type Exit struct {
	Cause Cause
	// Status in words, for example "killed by SIGKILL: out of memory".
	Status string
	PID    int
	// At is when the manager saw it.
	At time.Time
	// Log are the last lines that the process wrote, at most 20 and 4 KiB. The
	// tenant's proxy wrote them: what isn't printable is replaced.
	Log string
}

const (
	lastLines = 20
	lastBytes = 4 << 10
)

// exitStatus is what the kernel tells of an ended process.
type exitStatus struct {
	known  bool
	status syscall.WaitStatus
}

// judge finds the cause. oom says that the kernel counted one more kill for lack
// of memory in the tenant's cgroup, and stopped that the manager had it ended.
func judge(s exitStatus, oom, stopped bool) (Cause, string) {
	switch {
	// Nobody but the kernel sends SIGKILL for memory.
	case oom && !s.known:
		return CauseOutOfMemory, "ended: out of memory"
	case oom && s.status.Signaled() && s.status.Signal() == unix.SIGKILL:
		return CauseOutOfMemory, "killed by SIGKILL: out of memory"
	case !s.known && stopped:
		return CauseStopped, "ended as asked"
	case !s.known:
		return CauseUnknown, "ended; its status is unknown, because another agent process had started it"
	case s.status.Exited():
		text := "exit status " + strconv.Itoa(s.status.ExitStatus())
		switch {
		case stopped:
			return CauseStopped, text
		case s.status.ExitStatus() != 0:
			return CauseCrash, text
		}
		return CauseExited, text
	}
	sig := s.status.Signal()
	text := "killed by " + unix.SignalName(sig)
	switch sig {
	case unix.SIGSYS:
		return CauseForbiddenCall, text + ": a system call that isn't allowed"
	case unix.SIGSEGV, unix.SIGABRT, unix.SIGBUS, unix.SIGILL, unix.SIGFPE, unix.SIGTRAP:
		return CauseCrash, text
	}
	if stopped {
		return CauseStopped, text
	}
	return CauseKilled, text
}

// pidfdInfo is the kernel's struct pidfd_info in its first version.
type pidfdInfo struct {
	mask, cgroup                                 uint64
	pid, tgid, ppid                              uint32
	ruid, rgid, euid, egid, suid, sgid, fsu, fsg uint32
	exitCode                                     int32
}

const (
	pidfdInfoExit = 1 << 3
	// pidfdGetInfo is _IOWR(0xFF, 11, struct pidfd_info).
	pidfdGetInfo = 3<<30 | unsafe.Sizeof(pidfdInfo{})<<16 | 0xff<<8 | 11
)

// exitOf asks for the status of a process that its parent has reaped; unlike
// wait, anybody may who held a pidfd before. Linux has it since 6.15.
func exitOf(pidfd uintptr) exitStatus {
	info := pidfdInfo{mask: pidfdInfoExit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, pidfd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&pidfdInfoExit == 0 {
		return exitStatus{}
	}
	return exitStatus{true, syscall.WaitStatus(info.exitCode)}
}

// lastLog reads the last lines from offset on: what was there before is another
// process's. A file that was cut since is read as a whole.
func lastLog(path string, offset int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	if offset > info.Size() {
		offset = 0
	}
	offset = max(offset, info.Size()-lastBytes)
	data, err := io.ReadAll(io.NewSectionReader(f, offset, lastBytes))
	if err != nil {
		return ""
	}
	text := strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '·'
	}, strings.ToValidUTF8(string(data), "·"))
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-lastLines):], "\n")
}
