package isolation

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a tenant's process is, told by the kernel.
func TestSandbox(t *testing.T) {
	n := newNode(t)
	m := n.open()
	limits := Limits{CPUWeight: 200, CPUMillis: 500, MemoryHigh: 192 << 20, MemoryMax: 256 << 20, Pids: 64}
	a := n.run(m, tenantA, limits)
	b := n.run(m, tenantB, Limits{})

	t.Run("namespaces", func(t *testing.T) {
		for _, ns := range []string{"net", "mnt", "pid", "ipc", "uts", "cgroup"} {
			inodes := map[string]bool{}
			for _, pid := range []int{os.Getpid(), a.PID, b.PID} {
				link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
				if err != nil {
					t.Fatal(err)
				}
				inodes[link] = true
			}
			if len(inodes) != 3 {
				t.Errorf("%s namespaces are shared: %v", ns, inodes)
			}
		}
	})
	t.Run("privileges", func(t *testing.T) {
		stateA, _ := m.State(tenantA)
		stateB, _ := m.State(tenantB)
		if stateA.UID == stateB.UID {
			t.Error("both have one uid")
		}
		for _, s := range []State{stateA, stateB} {
			status := procStatus(t, s.Processes[0].PID)
			uid := fmt.Sprint(s.UID)
			for key, want := range map[string]string{
				"Uid": uid + " " + uid + " " + uid + " " + uid, "Gid": uid + " " + uid + " " + uid + " " + uid, "Groups": "",
				"CapInh": noCaps, "CapPrm": noCaps, "CapEff": noCaps, "CapBnd": noCaps, "CapAmb": noCaps,
				"NoNewPrivs": "1", "Seccomp": "2", "Seccomp_filters": "3", "NSpid": fmt.Sprint(s.Processes[0].PID, " 1"),
			} {
				if status[key] != want {
					t.Errorf("%s: %s is %q, want %q", s.Tenant, key, status[key], want)
				}
			}
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.Processes[0].PID))
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range fds {
				target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", s.Processes[0].PID, fd.Name()))
				if fd.Name() != "0" && strings.HasPrefix(target, "/") && !strings.HasSuffix(target, ".log") && !strings.HasPrefix(target, "/dev/std") {
					t.Errorf("%s has %s open", s.Tenant, target)
				}
			}
		}
	})
	t.Run("limits", func(t *testing.T) {
		s, _ := m.State(tenantA)
		if s.Limits != limits || s.Problem != "" {
			t.Errorf("limits are %+v, want %+v; problem %q", s.Limits, limits, s.Problem)
		}
		other, _ := m.State(tenantB)
		if want := (Limits{CPUWeight: 100, Pids: 256}); other.Limits != want {
			t.Errorf("limits of the other are %+v, want %+v", other.Limits, want)
		}
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.PID))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			if !strings.HasSuffix(strings.TrimSpace(line), "/"+n.o.CgroupName+"/bhi-a") {
				t.Errorf("not in a cgroup of the tenant: %s", line)
			}
		}
		if s.CgroupV2 != "" && !slices.Contains(mustProcs(t, s.CgroupV2), a.PID) {
			t.Errorf("not in %s", s.CgroupV2)
		}
		if got := procLimit(t, a.PID, "Max core file size"); got != "0" {
			t.Errorf("core size %s", got)
		}
		if got := procLimit(t, a.PID, "Max file size"); got != fmt.Sprint(LogLimit) {
			t.Errorf("file size %s", got)
		}
		u, err := m.Usage(tenantA)
		if err != nil || u.CPU == 0 || u.Memory == 0 || u.PSS < 1<<20 || u.Threads < 2 {
			t.Errorf("usage %+v, %v", u, err)
		}
	})
	t.Run("root", func(t *testing.T) {
		root := fmt.Sprintf("/proc/%d/root", a.PID)
		var have []string
		err := filepath.WalkDir(root+"/", func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				have = append(have, strings.TrimPrefix(path, root+"/"))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		want := []string{
			"dev/stderr", "dev/stdout", "envoy", "etc/envoy.json",
			"lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libdl.so.2", "lib/x86_64-linux-gnu/libm.so.6",
			"lib/x86_64-linux-gnu/libpthread.so.0", "lib/x86_64-linux-gnu/librt.so.1", "lib64/ld-linux-x86-64.so.2",
			"run/xds/xds.sock",
		}
		if !slices.Equal(have, want) {
			t.Errorf("root holds %v, want %v", have, want)
		}
		// By root, whom only the mount's flags stop.
		for _, path := range []string{"x", "etc/x", "run/xds/x", "lib/x", "dev/x"} {
			if f, err := os.Create(filepath.Join(root, path)); !errors.Is(err, unix.EROFS) {
				f.Close()
				t.Errorf("creating /%s: %v", path, err)
			}
		}
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", a.PID))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(mounts)) {
			f := strings.Fields(line)
			writable := f[4] == "/dev/stdout" || f[4] == "/dev/stderr"
			if !strings.Contains(f[5], "nosuid,nodev") || strings.HasPrefix(f[5], "ro") == writable {
				t.Errorf("mount %s has flags %s", f[4], f[5])
			}
			if strings.Contains(line, "master:") || strings.Contains(line, "shared:") {
				t.Errorf("mount %s is shared", f[4])
			}
		}
		stateA, _ := m.State(tenantA)
		stateB, _ := m.State(tenantB)
		if _, err := os.Stat(filepath.Join(root, filepath.Dir(stateB.XDSSocket(1)))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the other's xDS folder: %v", err)
		}
		if !sameInode(t, filepath.Join(root, "run/xds"), filepath.Dir(stateA.XDSSocket(1))) {
			t.Error("/run/xds is another folder")
		}
	})
	t.Run("network", func(t *testing.T) {
		s, _ := m.State(tenantA)
		for cmd, want := range map[string][]string{
			"ip addr show dev eth0":        {"inet 169.254.96.1/32", "inet6 fd69:8::1/128", "mtu 1400", s.TenantMAC.String(), "state UP"},
			"ip rule":                      {"1:\tfrom all to 127.0.0.0/8 lookup local", "2:\tfrom all iif eth0 lookup local", "3:\tfrom all lookup main", "4:\tfrom all lookup local"},
			"ip -6 rule":                   {"1:\tfrom all to fe80::/10 lookup local", "2:\tfrom all iif eth0 lookup local", "3:\tfrom all lookup main", "4:\tfrom all lookup local"},
			"ip route":                     {"default via 169.254.1.1 dev eth0"},
			"ip -6 route":                  {"default via fe80::1 dev eth0"},
			"ip route show table local":    {"local default dev lo"},
			"ip -6 route show table local": {"local default dev lo"},
			"ip neigh":                     {"169.254.1.1 dev eth0 lladdr " + s.HostMAC.String() + " PERMANENT", "fe80::1 dev eth0 lladdr " + s.HostMAC.String()},
			"sysctl net.ipv6.ip_nonlocal_bind net.ipv4.conf.all.rp_filter net.ipv4.ip_local_port_range": {"bind = 1", "rp_filter = 0", "1024\t65535"},
		} {
			out, err := exec.Command("nsenter", append([]string{"--net=" + s.Netns}, strings.Fields(cmd)...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v %s", cmd, err, out)
			}
			for _, w := range want {
				if !strings.Contains(string(out), w) {
					t.Errorf("%s lacks %q:\n%s", cmd, w, out)
				}
			}
			if strings.HasSuffix(cmd, "rule") && strings.Contains(string(out), "0:\t") {
				t.Errorf("%s still has rule 0:\n%s", cmd, out)
			}
		}
		// Again is the same.
		again, err := m.Prepare(t.Context(), tenantA, 1400)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(s.Bulkhead) {
			t.Errorf("preparing again: %+v, want %+v; %v", again, s.Bulkhead, err)
		}
	})
	t.Run("admin", func(t *testing.T) {
		body, err := m.Admin(t.Context(), tenantA, 1, "/server_info")
		if err != nil || !strings.Contains(string(body), "bhi-a/1") {
			t.Errorf("%v: %s", err, body)
		}
	})
}

const noCaps = "0000000000000000"

func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	table := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		table[key] = strings.Join(strings.Fields(value), " ")
	}
	return table
}

func procLimit(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.Fields(rest)[0]
		}
	}
	return ""
}

func mustProcs(t *testing.T, dir string) []int {
	t.Helper()
	pids, err := procs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

func sameInode(t *testing.T, a, b string) bool {
	t.Helper()
	one, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	two, err := os.Stat(b)
	if err != nil {
		t.Fatal(err)
	}
	return os.SameFile(one, two)
}
