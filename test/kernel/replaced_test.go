package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// A pod goes without a word while its connections, and with them its proxy's tunnels,
// are open; one of another service account has its addresses at once. Nothing of
// the new one goes by the name of the former, whose tunnels are still there to be
// taken for it.
func TestReplacedByAnotherIdentity(t *testing.T) {
	const held = 40
	l := lab.New(t)
	echo(t, l.B2.Namespace, echoPort)
	old := l.A1
	// By the pod's address, and by a service's, whose tunnels begin elsewhere.
	ways := []struct {
		to        netip.AddrPort
		authority netip.AddrPort
		talk      func(net.Conn) error
	}{
		{lab.At(l.B2.V4, echoPort), lab.At(l.B2.V4, echoPort), exchange},
		{lab.At(l.B2.V6, echoPort), lab.At(l.B2.V6, echoPort), exchange},
		{lab.At(l.B2.VIP.V4, app.GreetPort), lab.At(l.B2.V4, app.GreetPort), greeted},
		{lab.At(l.B2.VIP.V6, app.GreetPort), lab.At(l.B2.V6, app.GreetPort), greeted},
	}
	dial := func(h *lab.Host, to netip.AddrPort, patience time.Duration) (conn net.Conn, err error) {
		done := make(chan struct{})
		h.Go(func() {
			defer close(done)
			conn, err = net.DialTimeout("tcp", to.String(), patience)
		})
		<-done
		return conn, err
	}
	for i := range held {
		w := ways[i%len(ways)]
		c, err := dial(old, w.to, lab.Patience)
		lab.Check(t, err)
		defer c.Close()
		lab.Check(t, w.talk(c))
	}
	client, server := l.Node1.Proxy(old.Tenant.String()), l.Node2.Proxy(l.B2.Tenant.String())
	open := func() map[netip.AddrPort]bool {
		t.Helper()
		found := map[netip.AddrPort]bool{}
		for _, tunnel := range established(t, server) {
			if tunnel.from.Port() == xds.PortInbound && l.B2.Has(tunnel.from.Addr()) && old.Has(tunnel.to.Addr()) {
				found[tunnel.to] = true
			}
		}
		return found
	}
	// What is sent again later would meet the next pod's kernel, before it is steered,
	// which answers with a reset.
	lab.Eventually(t, "what was sent to be acknowledged", func() error {
		for _, c := range append(established(t, client), established(t, server)...) {
			if c.unacknowledged > 0 {
				return fmt.Errorf("%d bytes from %s to %s aren't", c.unacknowledged, c.from, c.to)
			}
		}
		return nil
	})
	former := open()
	if len(former) < len(ways) {
		t.Fatalf("%d ways have tunnels from %v", len(ways), former)
	}

	next := l.ReplacePod(old, "a1next", "billing")
	replaced := time.Now().Truncate(time.Millisecond)
	// seen counts the new pod's connections by authority, address and who the peer
	// says it is: a connection of the former one has begun before.
	type passed struct{ authority, source, peer string }
	seen := func() map[passed]int {
		count := map[passed]int{}
		for _, line := range l.Node2.AccessLog(l.B2.Tenant.String()) {
			began, err := time.Parse(time.RFC3339, line["time"])
			lab.Check(t, err)
			if line["bulkhead"] == "inbound" && !began.Before(replaced) {
				count[passed{line["authority"], line["source"], line["peer"]}]++
			}
		}
		return count
	}
	want := map[passed]bool{}
	for _, w := range ways {
		source := next.V4
		if w.to.Addr().Is6() {
			source = next.V6
		}
		want[passed{w.authority.String(), source.String(), next.Identity.String()}] = true
	}
	// From its first moment on, and until all ways have come through the mesh often.
	for deadline, through := time.Now().Add(lab.Patience), false; !through; {
		for i := range 40 {
			w := ways[i%len(ways)]
			c, err := dial(next, w.to, time.Second)
			if err != nil {
				continue // its network has just begun
			}
			w.talk(c) // as well
			c.Close()
		}
		count := seen()
		for p := range count {
			if !want[p] {
				t.Fatalf("a connection of %s came as %+v", next.Identity, p)
			}
		}
		through = true
		for p := range want {
			through = through && count[p] >= 25
		}
		if !through && time.Now().After(deadline) {
			t.Fatalf("connections of %s: %v", next.Identity, count)
		}
	}
	// The former pod's tunnels were there to be taken all the time.
	now := open()
	for tunnel := range former {
		if !now[tunnel] {
			t.Errorf("the former pod's tunnel from %s is gone: nothing could have been mistaken; now there are %v", tunnel, now)
		}
	}
	if len(now) < len(former)+len(ways) {
		t.Errorf("the new pod has no tunnels of its own: %v before, %v now", former, now)
	}
}

// greeted reads what the server says first.
func greeted(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(lab.Patience)); err != nil {
		return err
	}
	_, err := bufio.NewReader(c).ReadSlice('\n')
	return err
}

type connection struct {
	from, to       netip.AddrPort
	unacknowledged uint32 // bytes
}

// established are a network namespace's connections.
func established(t *testing.T, n *lab.Namespace) (found []connection) {
	t.Helper()
	n.Do(t, func() {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			for errors.Is(err, netlink.ErrDumpInterrupted) {
				sockets, err = netlink.SocketDiagTCP(family)
			}
			lab.Check(t, err)
			for _, s := range sockets {
				if s.State != netlink.TCP_ESTABLISHED {
					continue
				}
				from, _ := netip.AddrFromSlice(s.ID.Source)
				to, _ := netip.AddrFromSlice(s.ID.Destination)
				found = append(found, connection{lab.At(from.Unmap(), s.ID.SourcePort), lab.At(to.Unmap(), s.ID.DestinationPort), s.WQueue})
			}
		}
	})
	return found
}
