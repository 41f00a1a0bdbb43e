package podnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestPodOf(t *testing.T) {
	const uid = "0f8c1a2b-3d4e-4f50-8123-456789abcdef"
	wanted := map[string]string{"pod" + uid: uid, "pod" + strings.ReplaceAll(uid, "-", "_"): uid}
	for in, want := range map[string]string{
		"0::/kubepods/burstable/pod" + uid + "/4f2a":                     uid,
		"11:memory:/kubepods/pod" + uid + "/x\n10:pids:/\n":              uid,
		"3:cpuset:/\n0::/node2/kubepods/besteffort/pod" + uid + "/a/b\n": uid,
		"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f8c1a2b_3d4e_4f50_8123_456789abcdef.slice/cri-containerd-1.scope":                              uid,
		"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod0f8c1a2b_3d4e_4f50_8123_456789abcdef.slice/x":                                                        uid,
		"0::/docker/4f2a/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod0f8c1a2b_3d4e_4f50_8123_456789abcdef.slice/x": uid,
		"0::/xkubepods/pod" + uid + "/x": "",
		"0::/kubepods.slice/kubepods-pod0f8c1a2b_3d4e_4f50_8123_456789abcdef.slice/cri-containerd-1.scope": uid,
		"0::/kubepods/burstable/pod" + uid + "0/4f2a":                                                      "",
		// What another pod makes below its own cgroup.
		"0::/kubepods/burstable/pod1a/4f2a/pod" + uid:                                                                     "",
		"0::/kubepods.slice/kubepods-pod1a.slice/x/kubepods-pod" + uid + ".slice/y":                                       "",
		"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1a.slice/x/kubelet-kubepods-pod" + uid + ".slice/y": "",
		"4:memory:/kubepods/pod1a/x\n0::/kubepods/pod" + uid + "/x\n":                                                     "",
		"0::/user.slice/pod" + uid[:8]:                                                                                    "",
		"0::/x-pod" + uid + ".slice":                                                                                      "",
		"":                                                                                                                "",
		"garbage":                                                                                                         "",
		"0::/pod" + strings.Repeat("a", 1<<16):                                                                            "",
	} {
		if got := podOf(in, wanted); got != want {
			t.Errorf("podOf(%.200q) = %q, want %q", in, got, want)
		}
	}
}

// TestFind uses a made-up procfs, whose links are as the kernel writes them.
func TestFind(t *testing.T) {
	const uid = "0f8c1a2b-3d4e-4f50-8123-456789abcdef"
	proc := t.TempDir()
	process := func(name, cgroup, ns string, started int) {
		dir := filepath.Join(proc, name)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o755), os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o644),
			os.WriteFile(filepath.Join(dir, "stat"), fmt.Appendf(nil, "%s (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 %d 1 1", name, started), 0o644),
			os.Symlink("net:["+ns+"]", filepath.Join(dir, "ns/net"))); err != nil {
			t.Fatal(err)
		}
	}
	process("self", "0::/", "1", 1)
	process("7", "0::/kubepods/pod"+uid+"/a", "1", 5) // hostNetwork
	process("9", "0::/kubepods/pod"+uid+"/b", "42", 20)
	process("12", "0::/kubepods/pod"+uid+"/c", "42", 10)
	process("13", "0::/kubepods/podother/c", "43", 1)
	if err := os.Mkdir(filepath.Join(proc, "14"), 0o755); err != nil { // just ended
		t.Fatal(err)
	}
	got, err := Find(proc, []string{uid, "absent"})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Process{12, filepath.Join(proc, "12/ns/net"), 42}); len(got) != 1 || got[uid] != want {
		t.Errorf("found %+v, want %+v", got, want)
	}
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v: %s", args, err, out)
	}
}

func TestInspect(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	ns := fmt.Sprintf("bh-podnet-%d", os.Getpid())
	host := fmt.Sprintf("bhp%d", os.Getpid()%100000)
	ip(t, "netns", "add", ns)
	t.Cleanup(func() { ip(t, "netns", "del", ns) })
	ip(t, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", ns)
	ip(t, "-n", ns, "addr", "add", "10.77.0.9/32", "dev", "eth0")
	ip(t, "-n", ns, "addr", "add", "fd77::9/128", "dev", "eth0", "nodad")
	ip(t, "-n", ns, "link", "set", "eth0", "up", "mtu", "1400")
	ip(t, "link", "set", host, "up")
	path := "/run/netns/" + ns
	n, err := Inspect(path, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	if want := []netip.Addr{netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("fd77::9")}; !slices.Equal(n.IPs, want) || n.Ifname != host || n.MTU != 1400 {
		t.Errorf("%+v, want %v behind %s with MTU 1400", n, want, host)
	}
	if _, err := Inspect(path, "eth1"); !errors.Is(err, ErrGone) {
		t.Errorf("no such interface: %v", err)
	}
	if _, err := Inspect(path+"x", "eth0"); !errors.Is(err, ErrGone) {
		t.Errorf("no such namespace: %v", err)
	}
	if _, err := Inspect(path, "lo"); !errors.Is(err, ErrUnsupported) {
		t.Errorf("loopback: %v", err)
	}
	// A veth whose other end is in a third namespace.
	ip(t, "-n", ns, "link", "add", "inner", "type", "veth", "peer", "name", "inner2")
	if _, err := Inspect(path, "inner"); err == nil {
		t.Error("a veth within the namespace passes for a pod's")
	}
}

// What IPVS has of Services isn't the node: connections to it go through proxies.
func TestServicesAreNotTheNode(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	// Its thread ends with the test, in a network namespace of its own.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	ip(t, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
	ip(t, "addr", "add", "10.77.1.1/24", "dev", "eth0")
	ip(t, "addr", "add", "10.77.1.3/32", "dev", "eth0")
	for i, name := range []string{"kube-ipvs0", "kube-dummy-if"} {
		ip(t, "link", "add", name, "type", "veth", "peer", "name", fmt.Sprint("peer", i)) // not every kernel has dummies
		ip(t, "addr", "add", fmt.Sprintf("10.96.%d.1/32", i), "dev", name)
		ip(t, "addr", "add", fmt.Sprintf("fd96::%d/128", i+1), "dev", name, "nodad")
		// The externalIP of a Service; the node's own stays its own.
		ip(t, "addr", "add", "10.77.1.3/32", "dev", name)
	}
	all := func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) }
	rename := func(from, to string) {
		ip(t, "link", "set", from, "down")
		ip(t, "link", "set", from, "name", to)
	}
	for _, c := range []struct {
		name string
		list func() ([]netlink.Addr, error)
	}{
		{"they are there", all},
		{"one goes after it was read", func() ([]netlink.Addr, error) {
			a, err := all()
			rename("kube-ipvs0", "gone")
			return a, err
		}},
		{"one comes before it is read", func() ([]netlink.Addr, error) {
			rename("gone", "kube-ipvs0")
			return all()
		}},
	} {
		a, err := nodeAddresses(c.list)
		if err != nil {
			t.Fatal(err)
		}
		if want := []netip.Addr{netip.MustParseAddr("10.77.1.1"), netip.MustParseAddr("10.77.1.3")}; !slices.Equal(a, want) {
			t.Errorf("%s: the node's addresses are %v, want %v", c.name, a, want)
		}
	}
}

// Other pods' interfaces come and go while the list is read.
func TestListsThatChange(t *testing.T) {
	address := []netlink.Addr{{IPNet: &net.IPNet{IP: net.IPv4(10, 77, 1, 1), Mask: net.CIDRMask(32, 32)}}}
	times := 0
	interrupted := func() ([]netlink.Addr, error) {
		times++
		if times < 5 {
			return nil, netlink.ErrDumpInterrupted
		}
		return address, nil
	}
	if a, err := nodeAddresses(interrupted); err != nil || !slices.Equal(a, []netip.Addr{netip.MustParseAddr("10.77.1.1")}) {
		t.Errorf("the list that changed four times: %v, %v", a, err)
	}
	times = -1000
	if a, err := nodeAddresses(interrupted); !errors.Is(err, netlink.ErrDumpInterrupted) {
		t.Errorf("the list that is never whole: %v, %v", a, err)
	}
}

func TestWatchNodeAddresses(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	dev := fmt.Sprintf("bhd%d", os.Getpid()%100000)
	ip(t, "link", "add", dev, "type", "veth", "peer", "name", dev+"p")
	t.Cleanup(func() { ip(t, "link", "del", dev) })
	ctx, cancel := context.WithCancel(context.Background())
	seen, done := make(chan []netip.Addr, 64), make(chan struct{})
	fail := errors.New("once")
	go func() {
		defer close(done)
		WatchNodeAddresses(ctx, func(a []netip.Addr) error {
			if err := fail; err != nil {
				fail = nil
				return err
			}
			seen <- a
			return nil
		}, func(err error) { t.Log(err) })
	}()
	wait := func(want bool) {
		t.Helper()
		for end := time.After(time.Minute); ; {
			select {
			case a := <-seen:
				if slices.Contains(a, netip.MustParseAddr("10.77.1.1")) == want {
					return
				}
			case <-end:
				t.Fatalf("address present = %t wasn't seen", want)
			}
		}
	}
	wait(false)
	ip(t, "addr", "add", "10.77.1.1/32", "dev", dev)
	wait(true)
	ip(t, "addr", "del", "10.77.1.1/32", "dev", dev)
	wait(false)
	cancel()
	<-done
}
