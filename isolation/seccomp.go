package isolation

import (
	"fmt"
	"strings"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// allowed is what Envoy calls, from start to end, with HTTP/1, HTTP/2, mTLS, TCP
// and on-demand configuration. Anything else ends the process. nanosleep is for
// the Go runtime between filter and exec, getcwd for a heap profile.
const allowed = `
accept4 access arch_prctl bind brk clock_gettime clock_nanosleep close connect dup
epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 execve exit exit_group fcntl fstat futex
getcwd getegid geteuid getgid getpeername getpid getrandom getsockname getsockopt gettid getuid ioctl
listen lseek madvise mincore mmap mprotect mremap munmap nanosleep newfstatat openat
pipe2 prctl pread64 prlimit64 read readlink readv recvfrom recvmsg restart_syscall rseq rt_sigaction
rt_sigprocmask rt_sigreturn sched_getaffinity sched_getparam sched_getscheduler
sched_setaffinity sched_yield sendmsg sendto set_robust_list set_tid_address setsockopt shutdown
sigaltstack socket tgkill timerfd_create timerfd_settime uname write writev`

// newNamespaces are the flags of clone that make a namespace. Without them an
// unprivileged process could make itself root of a user namespace, and reach
// kernel code that is meant for root.
const newNamespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// families of sockets that Envoy needs. Not netlink, with which a process learns
// of links and addresses and reaches much of the kernel: Envoy asks for its own
// address at the start and does without.
var families = []uint64{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6}

// filters are the two filters of a proxy, in the order of loading: the kernel
// takes the stricter answer. They are two because a condition on an argument can
// stand only at the very end of a filter: the library's code compares what comes
// after it with the argument instead of with the call's number.
func filters() ([]seccomp.Filter, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	var names []string
	for _, name := range strings.Fields(allowed) {
		// Newer architectures lack the older calls.
		if _, ok := info.SyscallNames[name]; ok {
			names = append(names, name)
		}
	}
	var otherFamily seccomp.ArgumentConditions
	for _, f := range families {
		otherFamily = append(otherFamily, seccomp.Condition{Argument: 0, Operation: seccomp.NotEqual, Value: f})
	}
	return []seccomp.Filter{
		{Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionAllow,
			Syscalls: []seccomp.SyscallGroup{{
				NamesWithCondtions: []seccomp.NameWithConditions{{Name: "socket", Conditions: otherFamily}},
				Action:             seccomp.ActionErrno | seccomp.Action(unix.EAFNOSUPPORT),
			}},
		}},
		{Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionKillProcess,
			Syscalls: []seccomp.SyscallGroup{
				{Names: names, Action: seccomp.ActionAllow},
				// Its flags are in memory, where no filter can read them; told that it
				// doesn't exist, libc calls clone.
				{Names: []string{"clone3"}, Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)},
				{
					NamesWithCondtions: []seccomp.NameWithConditions{{Name: "clone", Conditions: seccomp.ArgumentConditions{
						{Argument: 0, Operation: seccomp.BitsNotSet, Value: newNamespaces},
					}}},
					Action: seccomp.ActionAllow,
				},
			},
		}},
	}, nil
}
