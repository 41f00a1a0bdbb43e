// Package oldkernel shows a test what it would see on a kernel that lacks something:
// the test's own binary runs again as a process to which the real kernel refuses some
// calls.
package oldkernel

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Call is a system call, or one of its kinds.
type Call struct {
	Number uint32
	// Argument has the value in the kind that is refused; below 0 is all of them.
	Argument int
	Value    uint32
	// Answer is what an older kernel says.
	Answer unix.Errno
}

const variable = "BULKHEAD_TEST_OLD_KERNEL"

// Says runs f in a process of its own to which these calls are refused, and returns the
// text of its error, "" if there was none. The test that calls it is run again up to
// this point, which has to be its beginning.
func Says(t *testing.T, f func() error, refused ...Call) string {
	t.Helper()
	switch os.Getenv(variable) {
	case t.Name():
		err := refuse(refused)
		if err == nil {
			if err = f(); err == nil {
				os.Exit(0)
			}
		}
		fmt.Fprint(os.Stdout, err)
		os.Exit(3)
	case "":
	default:
		t.SkipNow() // another one's process
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$")
	cmd.Env = append(os.Environ(), variable+"="+t.Name())
	var out, messages bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &messages
	if err := cmd.Run(); err != nil && cmd.ProcessState.ExitCode() != 3 {
		t.Fatalf("run the test again: %v: %s%s", err, out.String(), messages.String())
	}
	return out.String()
}

// refuse loads a filter for each call, into all threads.
func refuse(calls []Call) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up privileges: %w", err)
	}
	for _, c := range calls {
		const number, arguments = 0, 16 // in struct seccomp_data, whose arguments have 8 bytes each
		program := []bpf.Instruction{
			bpf.LoadAbsolute{Off: number, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: c.Number, SkipFalse: 3},
			bpf.LoadAbsolute{Off: arguments + 8*uint32(max(c.Argument, 0)), Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: c.Value, SkipFalse: 1},
			bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(c.Answer)},
			bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		}
		if c.Argument < 0 {
			program[3] = bpf.Jump{}
		}
		raw, err := bpf.Assemble(program)
		if err != nil {
			return fmt.Errorf("assemble filter: %w", err)
		}
		filter := make([]unix.SockFilter, len(raw))
		for i, r := range raw {
			filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
		}
		load := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&load))); errno != 0 {
			return fmt.Errorf("load filter: %w", errno)
		}
	}
	return nil
}
