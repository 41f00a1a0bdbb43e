package isolation

import (
	"context"
	"log/slog"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// startHeld is a process that rests, with its supervisor, which waits for its end again
// and again.
func startHeld(t *testing.T) *running {
	t.Helper()
	c := exec.Command("/bin/sleep", "300")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := hold(c.Process.Pid, c.Process)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	supervised := make(chan struct{})
	go func() {
		defer close(supervised)
		for ctx.Err() == nil && !r.wait(ctx, probeLive) {
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-supervised
		if err := r.kill(); err != nil {
			t.Error(err)
		}
		r.reap()
	})
	return r
}

// A process that doesn't stop is waited for as long as that, whatever its supervisor
// waits for: all tenants wait, too.
func TestWhatDoesNotStopIsGivenUp(t *testing.T) {
	r := startHeld(t)
	begin := time.Now()
	if rests, err := r.awaitStop(); rests || err != nil {
		t.Errorf("it wasn't stopped: %v, %v", rests, err)
	}
	if took := time.Since(begin); took > probeLive/2 {
		t.Errorf("it took %s; want %s", took, stopPatience)
	}
}

// A process that has ended, and that its supervisor has let go of, is none that can't be
// signalled.
func TestEndedIsSignalled(t *testing.T) {
	c := exec.Command("/bin/true")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r, err := hold(c.Process.Pid, c.Process)
	if err != nil {
		t.Fatal(err)
	}
	if !r.wait(t.Context(), time.Minute) {
		t.Fatal("it goes on")
	}
	r.reap()
	if err := signalAll([]*running{r}, unix.SIGSTOP); err != nil {
		t.Error(err)
	}
	if rests, err := r.awaitStop(); !rests || err != nil {
		t.Errorf("at rest: %v, %v", rests, err)
	}
}

// Where the kernel shows nobody what a thread does, proxies end as well: at a moment at
// which nothing waits for them.
func TestUnseenProxiesEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root")
	}
	c := exec.Command("/bin/sleep", "300")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	r, err := hold(c.Process.Pid, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.release()
	proxies := &tenant{m: &Manager{log: slog.New(slog.NewTextHandler(t.Output(), nil))}}
	proxies.processes = []*process{newProcess(proxies, processState{}, r)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with this goroutine.
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			t.Error(err)
			return
		}
		data[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
		if err := unix.Capset(&header, &data[0]); err != nil {
			t.Error(err)
			return
		}
		for _, idle := range []bool{false, true} {
			if ended, err := proxies.endAtRest(func() (bool, error) { return idle, nil }); ended != idle || err != nil {
				t.Errorf("idle: %v, ended: %v, %v", idle, ended, err)
			}
		}
	}()
	<-done
	if !r.wait(t.Context(), time.Minute) {
		t.Error("it goes on")
	}
}
