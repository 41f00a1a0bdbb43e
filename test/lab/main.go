// Package lab is the node's half of the product on this machine's kernel, without
// Kubernetes: two nodes, their pods and a host outside are network namespaces,
// their agents are real ones run by plan files, and their tenant proxies real
// Envoys that trust a real authority.
//
//	outside ── router ══ 1300 bytes ══ router2 ── node2 ── pods a3 b2
//	             └── node1 ── pods a1 a2 b1
//
// The tenants are team-a and team-b; each has a proxy on both nodes.
package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
)

// The test binary runs itself again: as the router, in mount and network
// namespaces of its own (so that nothing is left behind, however it ends), and
// from there as the applications.
const (
	roleVariable = "BULKHEAD_KERNEL_TEST_ROLE"
	dirVariable  = "BULKHEAD_KERNEL_TEST_DIR"
)

// Main is the TestMain of packages that use the lab. It doesn't return.
func Main(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		flag.Parse()
		if testing.Short() {
			os.Exit(m.Run()) // each test says that it is skipped
		}
		os.Exit(runRouter())
	case "router":
		os.Exit(m.Run())
	case "app":
		if err := app.Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func runRouter() int {
	// Cgroups have no namespace: one run at a time.
	lock, err := os.Create(filepath.Join(os.TempDir(), "bht-kernel.lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "wait for another run:", err)
		return 1
	}
	defer lock.Close()
	dir, err := os.MkdirTemp("", "bht-kernel-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "agent"), "github.com/bulkhead-mesh/bulkhead/cmd/agent")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the agent: %v: %s\n", err, out)
		return 1
	}
	// The namespaces need a thread that lives as long as they.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVariable+"=router", dirVariable+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "these tests need root:", err)
		return 1
	}
	return 0
}

// Check fails the test with an error.
func Check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
