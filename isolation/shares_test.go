package isolation

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// burner is a process in a tenant's cgroups that uses all of one CPU while it may.
type burner struct {
	t   *testing.T
	cmd *exec.Cmd
}

// burn starts one, which is idle, on one CPU that all of them have to share, however many
// the machine has.
func burn(t *testing.T, m *Manager, tenant model.Tenant) *burner {
	t.Helper()
	b := &burner{t, exec.Command("/proc/self/exe", "burn")}
	if _, err := b.cmd.StdinPipe(); err != nil { // it ends with its input
		t.Fatal(err)
	}
	// One that is stopped doesn't see its input end, as when the tests are killed. The
	// kernel ends it with the thread that started it, which waits for the test's end.
	b.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- b.cmd.Start()
		<-ended
	}()
	t.Cleanup(func() { close(ended) })
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.cmd.Process.Kill()
		b.cmd.Wait()
	})
	b.idle()
	if err := m.cgroups.join(tenant.FileName(), b.cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *burner) signal(s unix.Signal) {
	b.t.Helper()
	if err := b.cmd.Process.Signal(s); err != nil {
		b.t.Fatal(err)
	}
}

func (b *burner) idle() { b.signal(unix.SIGSTOP) }
func (b *burner) busy() { b.signal(unix.SIGCONT) }

// burning is the process: one thread is at work, on the first CPU that it may use.
func burning() {
	runtime.LockOSThread()
	var allowed, first unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		panic(err)
	}
	for cpu := 0; first.Count() == 0; cpu++ {
		if allowed.IsSet(cpu) {
			first.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &first); err != nil {
		panic(err)
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for turns := 0; ; turns++ {
	}
}

// Tenants have their shares of the CPU by their weights while all of them want it, what
// one leaves idle the others use by theirs, and all together keep below what bounds them.
func TestShares(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	m := n.open()
	// Beside what else runs here they have what they want.
	const all = 500
	if err := m.LimitAll(Limits{CPUWeight: 10000, CPUMillis: all}); err != nil {
		t.Fatal(err)
	}
	weights := []int64{1000, 100, 100}
	names := []model.Tenant{tenantA, tenantB, model.NamespaceTenant("bhi-c")}
	var burners []*burner
	for i, name := range names {
		if err := m.Update(t.Context(), Spec{Tenant: name, Limits: Limits{CPUWeight: weights[i]}, Generations: []Generation{{1, standinVersion}}}); err != nil {
			t.Fatal(err)
		}
		n.waitLive(m, name, 0)
		burners = append(burners, burn(t, m, name))
	}
	used := func() (cpu []time.Duration) {
		t.Helper()
		for _, name := range names {
			u, err := m.Usage(name)
			if err != nil {
				t.Fatal(err)
			}
			cpu = append(cpu, u.CPU)
		}
		return cpu
	}
	for _, c := range []struct {
		name string
		busy []bool
	}{
		{"the first alone", []bool{true, false, false}},
		{"all", []bool{true, true, true}},
		{"the first and one more", []bool{true, false, true}},
		{"a small one alone", []bool{false, true, false}},
		{"the small ones", []bool{false, true, true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var wanted int64
			for i, busy := range c.busy {
				if burners[i].idle(); busy {
					burners[i].busy()
					wanted += weights[i]
				}
			}
			// What a machine that is busy with other things spoils is measured again.
			var err error
			for range 10 {
				begin := time.Now() // first, so that it is never for less time than they have
				before := used()
				time.Sleep(2 * time.Second) // what is measured is a rate
				after, took := used(), time.Since(begin)
				var sum time.Duration
				for i := range after {
					after[i] -= before[i]
					sum += after[i]
				}
				t.Logf("%s of CPU in %s, of weights %d: %s", sum, took, weights, after)
				// A quota is handed out for each period, and in slices for each CPU.
				if most := took*all/1000 + 150*time.Millisecond; sum > most {
					t.Fatalf("together they have used %s in %s, at most %s", sum, took, most)
				}
				err = nil
				if least := took * all / 1000 * 7 / 10; sum < least {
					err = fmt.Errorf("together they have used %s of %s", sum, least)
				}
				for i, busy := range c.busy {
					share, due := float64(after[i])/float64(max(sum, 1)), 0.0
					least, most := 0.0, 0.02
					if busy {
						// A turn is long beside the quota of a period.
						due = float64(weights[i]) / float64(wanted)
						least, most = max(due-0.2, due/3), due+0.2
					}
					if share < least || share > most {
						err = errors.Join(err, fmt.Errorf("%s has %.2f of it, and %.2f is its share", names[i], share, due))
					}
				}
				if err == nil {
					break
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}
