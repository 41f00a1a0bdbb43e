package isolation

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// seed is logged, for who wants to see the same again.
func seed(t *testing.T) *rand.Rand {
	a, b := rand.Uint64(), rand.Uint64()
	t.Logf("seed %#x, %#x", a, b)
	return rand.New(rand.NewPCG(a, b))
}

// churn is a manager that never has enough.
func churn(options string) {
	m, err := openManaged(options)
	ctx := context.Background()
	update := func(t model.Tenant, generations ...int) {
		s := Spec{Tenant: t, Drain: 30 * time.Millisecond}
		for _, g := range generations {
			s.Generations = append(s.Generations, Generation{g, standinVersion})
		}
		if err == nil {
			err = m.Update(ctx, s)
		}
	}
	for err == nil {
		update(tenantA, 0)
		update(tenantB, 0)
		update(tenantA, 0, 1)
		update(tenantB)
		update(tenantA, 1)
		update(tenantB, 1)
		if err == nil {
			err = m.Delete(ctx, tenantB)
		}
		update(tenantA, 1, 0)
	}
	fmt.Println(err)
	os.Exit(1)
}

// survivors are the programs that run in Envoy's place, by what they are.
func (n *node) survivors() map[int]uint64 {
	n.t.Helper()
	all := map[int]uint64{}
	for _, pid := range n.processes() {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		ticks, terr := startTicks(pid)
		if err == nil && terr == nil && string(comm) == "envoy\n" {
			all[pid] = ticks
		}
	}
	return all
}

// recorded are the processes that state files name and that aren't to end.
func (n *node) recorded() map[int]uint64 {
	n.t.Helper()
	all := map[int]uint64{}
	dir := filepath.Join(n.o.RunDir, "state")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return all
	}
	for _, e := range entries {
		s, _, err := readState(filepath.Join(dir, e.Name()))
		for _, p := range s.Processes {
			if err == nil && p.PID != 0 && p.DrainUntil.IsZero() {
				all[p.PID] = p.StartTicks
			}
		}
	}
	return all
}

// Managers are killed at random points, one after the other, each taking over
// what the one before left. What ran goes on running and is never started
// twice, and nothing runs that no state knows of.
func TestManagersAreKilledAtRandom(t *testing.T) {
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	warm := n.open()
	if _, err := warm.versions.tree(standinVersion); err != nil {
		t.Fatal(err)
	}
	warm.Close()
	options, err := json.Marshal(n.managed())
	if err != nil {
		t.Fatal(err)
	}
	random := seed(t)
	adopted, longest := 0, 500*time.Millisecond
	for round := 0; round < 12 || adopted == 0 && longest < patience(); round++ {
		after := time.Duration(random.Int64N(int64(longest)))
		cmd := exec.Command("/proc/self/exe", "churn", string(options))
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		cmd.Process.Kill()
		if cmd.Wait(); cmd.ProcessState.Exited() {
			t.Fatalf("round %d: a manager ended: %s", round, &out)
		}
		before, recorded := n.survivors(), n.recorded()
		if len(recorded) == 0 { // a busy machine had it come to nothing
			longest *= 2
		}

		m := n.open()
		known := map[int]bool{}
		note := func() {
			for _, name := range m.Tenants() {
				s, _ := m.State(name)
				for _, p := range s.Processes {
					known[p.PID] = true
				}
			}
		}
		note()
		now := n.survivors()
		note()
		for pid := range now {
			if !known[pid] {
				t.Errorf("round %d, killed after %s: process %d is an orphan", round, after, pid)
			}
		}
		for pid, ticks := range before {
			if recorded[pid] != ticks {
				continue
			}
			adopted++
			if now[pid] != ticks {
				t.Errorf("round %d, killed after %s: process %d ran, was recorded, and isn't there any more", round, after, pid)
			}
		}
		for _, name := range m.Tenants() {
			s := n.await(m, name, "isn't whole", func(s State) bool {
				return !slices.ContainsFunc(s.Processes, func(p Process) bool { return !p.Live || !p.DrainUntil.IsZero() })
			})
			var want []int
			seen := map[int]bool{}
			for _, p := range s.Processes {
				want = append(want, p.PID)
				if seen[p.Generation] {
					t.Errorf("round %d: generation %d of %s is there twice: %+v", round, p.Generation, name, s)
				}
				seen[p.Generation] = true
			}
			slices.Sort(want)
			if got := m.cgroups.pids(name.FileName()); !equalSets(got, want) {
				t.Errorf("round %d, killed after %s: %s has processes %v, want %v", round, after, name, got, want)
			}
		}
		m.Close()
	}
	if adopted == 0 {
		t.Error("no manager came far enough to leave a process")
	}
	t.Logf("%d processes were taken over", adopted)
}

func equalSets(a, b []int) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// Two hundred tenants come, change and go in random order, while proxies, links,
// namespaces and states are taken away from under the manager. When that is
// over and each plan has been applied once more, what is there is what is
// planned: no more and no less.
func TestManyTenants(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	n := newNode(t)
	n.useStandin(nil, standinTargets{})
	// What ends and starts here is no news.
	n.o.Log = slog.New(slog.DiscardHandler)
	const tenants, rounds, changes, workers = 200, 5, 80, 4
	random := seed(t)
	plan := map[model.Tenant]Spec{}
	m := n.open()
	name := func(i int) model.Tenant { return model.NamespaceTenant(fmt.Sprintf("bhi-%d", i)) }
	apply := func(m *Manager, changed []model.Tenant) {
		t.Helper()
		var wg sync.WaitGroup
		work := make(chan model.Tenant)
		for range workers {
			wg.Go(func() {
				for name := range work {
					spec, ok := plan[name]
					var err error
					if ok {
						err = m.Update(t.Context(), spec)
					} else {
						err = m.Delete(t.Context(), name)
					}
					if err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}
			})
		}
		for _, name := range changed {
			work <- name
		}
		close(work)
		wg.Wait()
	}
	for round := range rounds {
		var changed []model.Tenant
		for range changes {
			name := name(random.IntN(tenants))
			if slices.Contains(changed, name) {
				continue
			}
			changed = append(changed, name)
			if _, ok := plan[name]; ok && random.IntN(3) == 0 {
				delete(plan, name)
				continue
			}
			spec := Spec{Tenant: name, MTU: 1280 + random.IntN(200), Limits: Limits{MemoryMax: int64(64+random.IntN(64)) << 20}}
			for _, g := range random.Perm(2)[:1+random.IntN(2)] {
				spec.Generations = append(spec.Generations, Generation{g, standinVersion})
			}
			plan[name] = spec
		}
		if round == 0 {
			// All of them are there at once for a moment.
			for i := range tenants {
				if _, ok := plan[name(i)]; !ok {
					plan[name(i)] = Spec{Tenant: name(i), Generations: []Generation{{0, standinVersion}}}
					changed = append(changed, name(i))
				}
			}
		}
		apply(m, changed)
		n.injectFaults(random, m, false)
		m.Close()
		n.injectFaults(random, m, true)
		m = n.open()
	}
	var all []model.Tenant
	for i := range tenants {
		all = append(all, name(i))
	}
	apply(m, all)
	for i := range tenants {
		spec, ok := plan[name(i)]
		if !ok {
			continue
		}
		n.await(m, name(i), "isn't live", func(s State) bool {
			// A proxy whose namespace was taken away is found at the next update.
			m.Update(t.Context(), spec)
			return len(s.Processes) == len(spec.Generations) && !slices.ContainsFunc(s.Processes, func(p Process) bool {
				return !p.Live || !sameNetns(p.PID, s.Netns)
			})
		})
	}
	n.wantExactly(m, plan)
	t.Logf("%d of %d tenants are planned at the end", len(plan), tenants)
	clear(plan)
	apply(m, all)
	n.wantExactly(m, plan)
}

// injectFaults takes away what a bad day takes away, while a manager watches or
// while none does.
func (n *node) injectFaults(random *rand.Rand, m *Manager, closed bool) {
	n.t.Helper()
	names := m.Tenants()
	random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for i, name := range names[:min(24, len(names))] {
		s, _ := m.State(name)
		switch i % 6 {
		case 0:
			for _, pid := range m.cgroups.pids(name.FileName()) {
				unix.Kill(pid, unix.SIGKILL)
			}
		case 1:
			if l, err := netlink.LinkByName(m.o.linkName(s.Index)); err == nil {
				netlink.LinkDel(l)
			}
		case 2:
			unix.Unmount(s.Netns, unix.MNT_DETACH)
		case 3:
			os.RemoveAll(m.o.logDir(name))
		case 4:
			// A full disk.
			if closed {
				os.Truncate(m.o.statePath(name), 20)
			}
		case 5:
			if closed {
				os.Remove(m.o.statePath(name))
			}
		}
	}
	if closed {
		os.WriteFile(filepath.Join(n.o.RunDir, "state", ".tmp-1"), nil, 0o600)
	}
}

// wantExactly compares the kernel and the disk with a plan.
func (n *node) wantExactly(m *Manager, plan map[model.Tenant]Spec) {
	n.t.Helper()
	want := map[string][]string{"cgroups": {textCgroup}, "relay folders": {}}
	var pids []int
	for name, spec := range plan {
		s, _ := m.State(name)
		file := name.FileName()
		for _, what := range []string{"tenants", "namespaces", "states", "logs", "folders", "indexes", "cgroups", "mounts"} {
			want[what] = append(want[what], file)
		}
		want["links"] = append(want["links"], m.o.linkName(s.Index))
		var generations []int
		for _, g := range spec.Generations {
			want["relay folders"] = append(want["relay folders"], fmt.Sprintf("%s/xds%d", file, g.Generation))
			generations = append(generations, g.Generation)
		}
		var have []int
		for _, p := range s.Processes {
			have = append(have, p.Generation)
			pids = append(pids, p.PID)
		}
		if !equalSets(have, generations) || s.Problem != "" || s.Limits.MemoryMax != spec.Limits.MemoryMax {
			n.t.Errorf("%s is %+v, want %+v", name, s, spec)
		}
	}
	have := map[string][]string{}
	for _, name := range m.Tenants() {
		have["tenants"] = append(have["tenants"], name.FileName())
	}
	for what, dir := range map[string]string{
		"namespaces": filepath.Join(n.o.RunDir, "netns"), "states": filepath.Join(n.o.RunDir, "state"),
		"folders": filepath.Join(n.o.RunDir, "tenants"), "logs": filepath.Join(n.o.LibDir, "log"),
	} {
		have[what] = list(n.t, dir)
	}
	for _, file := range have["folders"] {
		for _, dir := range list(n.t, filepath.Join(n.o.RunDir, "tenants", file)) {
			have["relay folders"] = append(have["relay folders"], file+"/"+dir)
		}
	}
	for _, h := range m.cgroups.hierarchies {
		entries, err := os.ReadDir(filepath.Join(h.mount, n.o.CgroupName))
		if err != nil {
			n.t.Fatal(err)
		}
		have["cgroups"] = nil
		for _, e := range entries {
			if e.IsDir() {
				have["cgroups"] = append(have["cgroups"], e.Name())
			}
		}
		n.wantSame("cgroups", have["cgroups"], want["cgroups"])
	}
	links, err := netlink.LinkList()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, n.o.LinkPrefix) {
			have["links"] = append(have["links"], l.Attrs().Name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if path := strings.Fields(line)[1]; filepath.Dir(path) == filepath.Join(n.o.RunDir, "netns") {
			have["mounts"] = append(have["mounts"], filepath.Base(path))
		}
	}
	m.indexes.mu.Lock()
	for file := range m.indexes.of {
		have["indexes"] = append(have["indexes"], file)
	}
	m.indexes.mu.Unlock()
	// A folder of logs that was taken away comes back with the next process.
	want["logs"] = slices.DeleteFunc(want["logs"], func(file string) bool { return !slices.Contains(have["logs"], file) })
	for _, what := range []string{"tenants", "namespaces", "states", "logs", "folders", "relay folders", "indexes", "links", "mounts"} {
		n.wantSame(what, have[what], want[what])
	}
	if got := n.processes(); !equalSets(got, pids) {
		n.t.Errorf("processes are %v, want %v", got, pids)
	}
}

func (n *node) wantSame(what string, have, want []string) {
	n.t.Helper()
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		n.t.Errorf("%s are %v, want %v", what, have, want)
	}
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
