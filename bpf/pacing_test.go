package bpf

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// algorithms are the congestion control of a process's connections, by the other
// end.
func algorithms(t *testing.T, pid int) map[netip.AddrPort]string {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	check(t, err)
	defer unix.Close(pidfd)
	files, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "fd"))
	check(t, err)
	found := map[netip.AddrPort]string{}
	for _, f := range files {
		number, err := strconv.Atoi(f.Name())
		check(t, err)
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if err != nil {
			continue // closed in the meantime
		}
		var peer netip.AddrPort
		switch a, _ := unix.Getpeername(fd); a := a.(type) {
		case *unix.SockaddrInet4:
			peer = at(netip.AddrFrom4(a.Addr), uint16(a.Port))
		case *unix.SockaddrInet6:
			peer = unmapped(at(netip.AddrFrom16(a.Addr), uint16(a.Port)))
		}
		if peer.IsValid() {
			found[peer], err = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			check(t, err)
		}
		unix.Close(fd)
	}
	return found
}

func TestPacing(t *testing.T) {
	m := newMesh(t)
	m.proxy1.stop()
	m.one.CgroupV2 = makeCgroup(t)
	var usual string
	m.one.do(t, func() {
		b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
		check(t, err)
		fmt.Sscan(string(b), &usual)
	})
	if usual == "reno" {
		t.Skip("the node's own algorithm is Reno: nothing would be seen")
	}
	check(t, m.d.UpdateTenant(m.one.Tenant))
	m.proxy1 = startProxyIn(t, m.one.namespace, "proxy1", m.one.CgroupV2)
	check(t, m.d.SetListeners(1, 0, m.proxy1.pid))
	serve(t, m.a.namespace, 8081)
	eachFamily(t, func(t *testing.T, family int) {
		a, remote := m.a.of(family), remoteAddresses.of(family)
		var held []heldFlow
		m.hold(&held, "from a pod", m.a.namespace, netip.AddrPort{}, at(remote, 80), "proxy1")
		m.hold(&held, "from outside", m.remote, netip.AddrPort{}, at(a, 8080), "proxy1")
		_, err := fmt.Fprintf(m.proxy1.stdin, "%s %s\n", at(remote, 0), at(a, 8081))
		check(t, err)
		want := map[netip.AddrPort]string{
			addrPortOf(held[0].LocalAddr()): "reno",
			addrPortOf(held[1].LocalAddr()): usual,
			at(a, 8081):                     "reno",
		}
		deadline := time.Now().Add(patience)
		for {
			got := algorithms(t, m.proxy1.pid)
			same := true
			for peer, algorithm := range want {
				same = same && got[peer] == algorithm
			}
			if same {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("connections to %v, want %v", got, want)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		goOn(t, "at the end", held)
	})
}
