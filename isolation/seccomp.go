package isolation

import (
	"fmt"
	"strings"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
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

// filters are the filters of a proxy, in the order of loading: of all answers the
// kernel takes the strictest. The policies are two because a condition on an
// argument can stand only at the very end of one: the library's code compares
// what comes after it with the argument instead of with the call's number.
func filters() ([][]bpf.Instruction, error) {
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
	list := [][]bpf.Instruction{noTransparent(uint32(info.ID))}
	for _, policy := range []seccomp.Policy{
		{
			DefaultAction: seccomp.ActionAllow,
			Syscalls: []seccomp.SyscallGroup{{
				NamesWithCondtions: []seccomp.NameWithConditions{{Name: "socket", Conditions: otherFamily}},
				Action:             seccomp.ActionErrno | seccomp.Action(unix.EAFNOSUPPORT),
			}},
		},
		{
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
		},
	} {
		code, err := policy.Assemble()
		if err != nil {
			return nil, fmt.Errorf("assemble system call filter: %w", err)
		}
		list = append(list, code)
	}
	return list, nil
}

// noTransparent says yes to IP_TRANSPARENT of both families and doesn't do it.
// Envoy's original_src asks for it, which needs CAP_NET_ADMIN; in the tenant's
// network namespace every address is local, so that its bind works without. The
// library can't be told an error of 0.
func noTransparent(arch uint32) []bpf.Instruction {
	// Of struct seccomp_data; of arguments the low half, all that the kernel reads
	// of an int.
	const number, architecture, level, option = 0, 4, 16 + 8, 16 + 16
	load := func(offset uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offset, Size: 4} }
	return []bpf.Instruction{
		load(architecture),
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: arch, SkipTrue: 9},
		load(number),
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_SETSOCKOPT, SkipTrue: 7},
		load(level),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SOL_IPV6, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SOL_IP, SkipTrue: 4},
		load(option),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IP_TRANSPARENT, SkipTrue: 3, SkipFalse: 2},
		load(option),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPV6_TRANSPARENT, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO},
	}
}

// loadFilter sets a filter on this thread, which has no_new_privs, for good.
func loadFilter(code []bpf.Instruction) error {
	raw, err := bpf.Assemble(code)
	if err != nil {
		return fmt.Errorf("assemble system call filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("load system call filter: %w", errno)
	}
	return nil
}
