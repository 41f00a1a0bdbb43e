package xds

import (
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// enterNetns puts the test's goroutine, and what it starts, into a new network
// namespace in which every address is local. It lives as long as they do.
func enterNetns(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root and a real Envoy: make test-kernel")
	}
	// There is no network to fetch one from in there.
	for _, version := range dist.Versions() {
		if _, err := dist.Fetch(t.Context(), version); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		t.Skipf("this test needs a network namespace of its own: %v", err)
	}
	for _, args := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo"},
		{"ip", "-6", "route", "add", "local", "::/0", "dev", "lo"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}

// netnsOf runs functions in the calling goroutine's network namespace, whichever
// goroutine they are called from.
func netnsOf(t *testing.T) func(func() error) error {
	t.Helper()
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return func(f func() error) error {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				done <- err
				return
			}
			done <- f()
		}()
		return <-done
	}
}
