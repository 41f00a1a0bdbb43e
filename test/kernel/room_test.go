package kernel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A tenant has as many connections as it may, of which outsiders leave a quarter to its
// pods, also while its agent is away; what ends makes room at once.
func TestRoom(t *testing.T) { eachRedirection(t, testRoom) }

func testRoom(t *testing.T, l *lab.Lab) {
	const most = 8
	n := l.Node1
	var before []net.Conn
	for range most {
		before = append(before, mustOpen(t, l.B1, l.Outside, 4))
	}
	bounded := v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most}
	limit(t, n, "team-b", bounded)
	for _, h := range []*lab.Host{l.B1, l.Outside} {
		mustBeShed(t, l, h, "with as many as may be since before there was a bound")
	}
	for _, c := range before {
		lab.Check(t, c.Close())
	}

	var others, own []net.Conn
	for i := range most * 3 / 4 {
		others = append(others, mustOpen(t, l.Outside, l.B1, 4+i%2*2))
	}
	mustBeShed(t, l, l.Outside, "outsiders have three quarters")
	for i := range most / 4 {
		own = append(own, mustOpen(t, l.B1, l.Outside, 4+i%2*2))
	}
	mustBeShed(t, l, l.B1, "pods have the rest")
	flow{from: l.A1, to: l.A3}.check(t, 4) // another tenant doesn't notice

	// The kernel holds it without the agent, and gives room back.
	n.Kill()
	mustBeShed(t, l, l.B1, "without the agent")
	mustBeShed(t, l, l.Outside, "without the agent")
	for i := range most { // more often than there is room
		lab.Check(t, own[0].Close())
		own[0] = mustOpen(t, l.B1, l.Outside, 4+i%2*2)
		mustBeShed(t, l, l.B1, "its place is taken")
		mustBeShed(t, l, l.Outside, "its place is taken")
	}
	n.Start()
	n.WaitReady()
	mustBeShed(t, l, l.B1, "after the agent")
	mustBeShed(t, l, l.Outside, "after the agent")

	// One that its peer resets has ended, too.
	own[0].(*net.TCPConn).SetLinger(0)
	lab.Check(t, own[0].Close())
	own[0] = mustOpen(t, l.B1, l.Outside, 4)
	// And those that the proxy loses.
	lab.Check(t, unix.Kill(n.Running("team-b").PID, unix.SIGKILL))
	for _, c := range append(own, others...) {
		c.SetReadDeadline(time.Now().Add(lab.Patience))
		for err := error(nil); err == nil; _, err = c.Read(make([]byte, 64)) {
			if errors.Is(err, unix.ETIMEDOUT) {
				t.Error(err)
			}
		}
		c.Close()
	}
	n.WaitReady()
	for range most {
		mustOpen(t, l.B1, l.Outside, 4)
	}
	mustBeShed(t, l, l.B1, "with another process")
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
	for range most {
		mustOpen(t, l.B1, l.Outside, 4)
	}
}

// open returns a connection on which the server's greeting has come.
func open(t *testing.T, from, to *lab.Host, family int, patience time.Duration) (c net.Conn, err error) {
	t.Helper()
	from.Do(t, func() { c, err = net.DialTimeout("tcp", lab.At(to.Of(family), app.GreetPort).String(), patience) })
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(patience))
	// All of it: closing with something unread is a reset.
	if _, err = bufio.NewReader(c).ReadString('\n'); err != nil {
		c.Close()
	}
	return c, err
}

// mustOpen tries until there is room.
func mustOpen(t *testing.T, from, to *lab.Host, family int) (c net.Conn) {
	t.Helper()
	lab.Eventually(t, fmt.Sprintf("a connection from %s to %s", from.Name, to.Name), func() (err error) {
		c, err = open(t, from, to, family, time.Second)
		return err
	})
	return c
}

// mustBeShed fails if a connection of team-b, from a pod or to it, is answered, or isn't
// counted as one too many.
func mustBeShed(t *testing.T, l *lab.Lab, from *lab.Host, why string) {
	t.Helper()
	to := l.B1
	if from == l.B1 {
		to = l.Outside
	}
	for _, family := range []int{4, 6} {
		_, err := open(t, from, to, family, 300*time.Millisecond)
		if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s: a connection of IPv%d from %s ends with %v", why, family, from.Name, err)
		}
	}
}

// What a pod forges makes no room for more: not the ends of its connections, nor answers
// that nobody waits for.
func TestForgedEnds(t *testing.T) {
	const most = 4
	l := lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionNetfilter})
	limit(t, l.Node1, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most})
	const rooms, podRooms, ended = "room_3", "room_pods_1", "ended_by_peer_1024"
	// A handshake has room for 3 s.
	lab.Eventually(t, "room for a handshake", func() error {
		for _, flags := range []byte{syn, fin} {
			forge(t, l.B1, lab.At(l.B1.V4, 999), lab.At(l.Outside.V4, app.GreetPort), flags)
		}
		if _, taken := elements(t, l, rooms); taken != 1 {
			return fmt.Errorf("%d connections have it", taken)
		}
		return nil
	})
	if _, all := elements(t, l, ended); all != 0 {
		t.Error("the end of what isn't connected is remembered")
	}
	var held []net.Conn
	for range most {
		held = append(held, mustOpen(t, l.B1, l.Outside, 4))
	}
	for i, flags := range []byte{fin | ack, rst, rst | ack, syn | rst, fin} {
		for _, c := range held {
			forge(t, l.B1, c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort(), flags)
		}
		// Not for longer than there is room, which others will have.
		lab.Eventually(t, fmt.Sprintf("the ends by forged flags %#x", flags), func() error {
			if short, all := elements(t, l, ended); all != most || i == 1 && short != most {
				return fmt.Errorf("those of %d connections are remembered, of %d shortly, want %d", all, short, most)
			}
			return nil
		})
		mustBeShed(t, l, l.B1, fmt.Sprintf("with forged flags %#x", flags))
	}
	// A RST makes an end likely, and what is there all the same stays.
	lab.Eventually(t, "room for a shorter time", func() error {
		for _, c := range held { // the agent may have looked since the last
			forge(t, l.B1, c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort(), rst)
		}
		if short, all := elements(t, l, rooms, podRooms); short != most || all != most {
			return fmt.Errorf("that of %d of %d connections, want %d", short, all, most)
		}
		return nil
	})
	lab.Eventually(t, "room for as long as there are connections", func() error {
		short, all := elements(t, l, rooms, podRooms)
		if all != most {
			t.Fatalf("%d connections have room, want %d", all, most)
		}
		if short > 0 {
			return fmt.Errorf("that of %d ends soon", short)
		}
		return nil
	})
	mustBeShed(t, l, l.B1, "afterwards")
	for _, c := range held {
		lab.Check(t, c.Close())
	}
	for range most {
		mustOpen(t, l.B1, l.Outside, 4)
	}
}

// A pod that has the agent look after its room all the time, and opens as many connections
// as it can meanwhile, has no more for it.
func TestRoomUnderFlood(t *testing.T) {
	const most, flooding = 256, 10 * time.Second
	l := lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionNetfilter})
	limit(t, l.Node1, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most})
	to := lab.At(l.Outside.V4, app.GreetPort)
	var held []netip.AddrPort
	for range most {
		held = append(held, mustOpen(t, l.B1, l.Outside, 4).LocalAddr().(*net.TCPAddr).AddrPort())
	}
	until := time.Now().Add(flooding)
	sent, done := 0, make(chan error, 1)
	l.B1.Go(func() {
		done <- func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			for reset := time.Now(); time.Now().Before(until); {
				// What is shortened is made long again at the next look.
				if time.Since(reset) > 100*time.Millisecond {
					reset = time.Now()
					for _, from := range held {
						if err := sendForged(fd, from, to, rst); err != nil {
							return err
						}
					}
				}
				for range 100 {
					if err := sendForged(fd, lab.At(l.B1.V4, uint16(10_000+sent%40_000)), to, syn); err != nil {
						return err
					}
					sent++
				}
			}
			return nil
		}()
	})
	err := <-done
	// Room that had become too large was made anew at the next look, and has no more than it may.
	for line := range strings.Lines(l.Node1.AgentLog(t)) {
		if strings.Contains(line, "A tenant had more connections than there is room for") {
			t.Errorf("the agent says: %s", line)
		}
	}
	if _, taken := elements(t, l, "room_192", "room_pods_64"); taken == 0 || taken > most || err != nil || sent < 10_000 {
		t.Errorf("after %d SYNs, %v, %d connections have room, want some, and %d at most", sent, err, taken, most)
	}
}

const fin, syn, rst, ack = 1, 2, 4, 16

// forge sends a packet of a connection that its peer takes for no part of it.
func forge(t *testing.T, h *lab.Host, from, to netip.AddrPort, flags byte) {
	t.Helper()
	h.Do(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		lab.Check(t, err)
		defer unix.Close(fd)
		lab.Check(t, sendForged(fd, from, to, flags))
	})
}

func sendForged(fd int, from, to netip.AddrPort, flags byte) error {
	tcp := make([]byte, 20) // without a checksum
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12], tcp[13] = 5<<4, flags
	return unix.Sendto(fd, tcp, 0, &unix.SockaddrInet4{Addr: to.Addr().Unmap().As4()})
}

// elements returns how many connections of team-b are in sets of its proxy's namespace,
// and how many of them for less than a minute. A reading that a change cuts in two can
// show what is written anew twice, or not at all: the same twice in a row is believed.
func elements(t *testing.T, l *lab.Lab, sets ...string) (short, all int) {
	t.Helper()
	read := func() (short, all int) {
		c := &nftables.Conn{}
		for _, name := range sets {
			set, err := c.GetSetByName(&nftables.Table{Name: "bulkhead", Family: nftables.TableFamilyINet}, name)
			lab.Check(t, err)
			elements, err := c.GetSetElements(set)
			lab.Check(t, err)
			all += len(elements)
			for _, e := range elements {
				if e.Expires < time.Minute {
					short++
				}
			}
		}
		return short, all
	}
	l.Node1.Proxy("team-b").Do(t, func() {
		short, all = read()
		for s, a := read(); short != s || all != a; s, a = read() {
			short, all = s, a
		}
	})
	return short, all
}
