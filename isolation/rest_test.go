package isolation

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// allStopped reports whether each thread of the process has stopped.
func allStopped(t *testing.T, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
	if err != nil || len(stats) == 0 {
		t.Fatalf("threads of process %d: %v, %v", pid, stats, err)
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, state, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(state, "T") {
			return false
		}
	}
	return true
}

// deleteAtRest has a tenant end at rest, and deletes it then.
func (n *node) deleteAtRest(m *Manager, name model.Tenant, idle func() (bool, error)) (deleted bool, err error) {
	n.t.Helper()
	for deadline := time.Now().Add(patience()); ; time.Sleep(time.Millisecond) {
		ended, err := m.End(name, idle)
		switch {
		case errors.Is(err, ErrEnding) && time.Now().Before(deadline):
		case err != nil || !ended:
			return false, err
		default:
			return true, m.Delete(n.t.Context(), name)
		}
	}
}

// A proxy is ended only where it stands still and nothing waits for it; otherwise it goes
// on, also if the manager was killed in between.
func TestDeleteAtRest(t *testing.T) {
	n := newNode(t)
	exits := n.collectExits()
	m := n.open()
	n.serveXDS(m, tenantA, 1, echoListener(t))
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, dist.Default}}}); err != nil {
		t.Fatal(err)
	}
	p := n.waitLive(m, tenantA, 0)
	s, _ := m.State(tenantA)
	c := dialInside(t, s.Netns)
	goesOn := func(when string) {
		t.Helper()
		if err := c.echo(when); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if now := n.waitLive(m, tenantA, 0); now.PID != p.PID {
			t.Fatalf("%s: process %d, was %d", when, now.PID, p.PID)
		}
	}
	goesOn("at first")

	// look has the tenant deleted if idle is the answer, once its proxy rests.
	look := func(idle bool, problem error) (deleted bool, err error) {
		t.Helper()
		asked, stopped := false, false
		// What is stopped in epoll_wait asks again when it goes on: looks must not follow
		// each other at once.
		for deadline := time.Now().Add(patience()); !asked && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			deleted, err = n.deleteAtRest(m, tenantA, func() (bool, error) {
				if stopped = allStopped(t, p.PID); !stopped {
					return true, nil // that it is worth a stop
				}
				asked = true
				return idle, problem
			})
			if deleted && !stopped {
				t.Error("it was looked for what is under way while the proxy went on")
			}
		}
		if !asked {
			t.Fatal("the proxy never came to rest")
		}
		return deleted, err
	}
	if deleted, err := look(false, nil); deleted || err != nil {
		t.Fatalf("with something under way: %v, %v", deleted, err)
	}
	goesOn("when something was under way")
	busy := func() (bool, error) {
		if allStopped(t, p.PID) {
			t.Error("a proxy that is busy was stopped")
		}
		return false, nil
	}
	if deleted, err := n.deleteAtRest(m, tenantA, busy); deleted || err != nil {
		t.Fatalf("busy: %v, %v", deleted, err)
	}
	failed := errors.New("the kernel doesn't tell")
	if deleted, err := look(true, failed); deleted || !errors.Is(err, failed) {
		t.Fatalf("without a look: %v, %v", deleted, err)
	}
	goesOn("when the look failed")

	m.Close()
	if err := unix.Kill(p.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	m = n.open()
	goesOn("when its manager was killed while it stood still")

	if deleted, err := look(true, nil); !deleted || err != nil {
		t.Fatalf("at rest: %v, %v", deleted, err)
	}
	if alive(p.PID) {
		t.Error("the process is left")
	}
	if told := exits.of(tenantA); len(told) != 1 || told[0].Cause != CauseStopped {
		t.Errorf("its end is told as %+v", told)
	}
	if _, there := m.State(tenantA); there {
		t.Error("the tenant is left")
	}
}

// A process with a thread that is at work isn't at rest, whatever the kernel has for it.
func TestWorkIsNoRest(t *testing.T) {
	n := newNode(t)
	n.useStandin(map[int]string{1: "flood"}, standinTargets{})
	m := n.open()
	n.serveXDS(m, tenantA, 1, nil)
	if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: []Generation{{1, standinVersion}}}); err != nil {
		t.Fatal(err)
	}
	p := n.waitLive(m, tenantA, 0)
	for range 20 {
		deleted, err := n.deleteAtRest(m, tenantA, func() (bool, error) { return true, nil })
		if deleted || err != nil {
			t.Fatalf("%v, %v", deleted, err)
		}
	}
	if now := n.waitLive(m, tenantA, 0); now.PID != p.PID {
		t.Errorf("process %d, was %d", now.PID, p.PID)
	}
}
