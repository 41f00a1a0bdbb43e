package isolation

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What comes much faster than it may is held back for a tenth of a second and then
// dropped: who sends it doesn't wait longer for an answer than that, and the node doesn't
// keep it.
func TestIngressWaitsForAMoment(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	const (
		rate, flood = 2 << 20, 16 << 20
		// kept is what may pass at once, and what may wait.
		kept = 128<<10 + 512<<10
	)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	inOwnNetns(t, func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "node", 1500
		check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "tenant"}))
		node, err := netlink.LinkByName("node")
		check(err)
		tenant, err := netlink.LinkByName("tenant")
		check(err)
		check(errors.Join(netlink.LinkSetUp(node), netlink.LinkSetUp(tenant)))
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		check(err)
		defer h.Close()
		if have, err := shapeIngress(h, node.Attrs().Index, rate); err != nil || have != rate {
			t.Fatalf("it is bounded to %d, %v", have, err)
		}

		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		check(err)
		defer unix.Close(fd)
		// The queue is to be full, and not the socket.
		check(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4*flood))
		frame := make([]byte, 1400)
		copy(frame, tenant.Attrs().HardwareAddr)
		copy(frame[6:], node.Attrs().HardwareAddr)
		frame[12], frame[13] = 0x88, 0xb5 // of nobody
		received := func() int64 {
			t.Helper()
			l, err := netlink.LinkByName("tenant")
			check(err)
			return int64(l.Attrs().Statistics.RxBytes)
		}
		before, begun := received(), time.Now()
		for range flood / len(frame) {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: node.Attrs().Index}); err != nil && err != unix.ENOBUFS {
				t.Fatal(err)
			}
		}
		most := 2*kept + int64(rate*time.Since(begun).Seconds())
		got := int64(0)
		for last := time.Now(); time.Since(last) < time.Second; time.Sleep(10 * time.Millisecond) {
			if now := received() - before; now != got {
				got, last = now, time.Now()
			}
		}
		if got < kept/2 || got > most {
			t.Errorf("of %d bytes at once %d came, of which %d may be kept, at most %d", flood, got, kept, most)
		}
	})
}

// inOwnNetns calls f in a network namespace that ends with it; f may call t.Fatal.
func inOwnNetns(t *testing.T, f func()) {
	t.Helper()
	made := make(chan error, 1)
	go func() {
		defer close(made)
		runtime.LockOSThread() // never unlocked: the namespace ends with the thread
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- err
			return
		}
		f()
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
}
