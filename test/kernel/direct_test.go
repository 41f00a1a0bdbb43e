package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// echoDatagrams sends back what comes to a UDP port of a host.
func echoDatagrams(t *testing.T, h *lab.Host, port int) {
	t.Helper()
	var c *net.UDPConn
	h.Do(t, func() {
		var err error
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: port})
		lab.Check(t, err)
	})
	t.Cleanup(func() { c.Close() })
	go func() {
		for b := make([]byte, 64); ; {
			size, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:size], from)
		}
	}()
}

// datagrams is a UDP socket, with a source port of its own.
func datagrams(t *testing.T, h *lab.Host, to netip.AddrPort) (c net.Conn) {
	t.Helper()
	h.Do(t, func() {
		var err error
		c, err = net.Dial("udp", to.String())
		lab.Check(t, err)
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// comesBack reports whether a datagram is sent back.
func comesBack(t *testing.T, c net.Conn, within time.Duration) bool {
	t.Helper()
	lab.Check(t, c.SetDeadline(time.Now().Add(within)))
	_, err := c.Write([]byte("x"))
	lab.Check(t, err)
	_, err = c.Read(make([]byte, 1))
	return err == nil
}

// sendOther sends a payload of a protocol behind an IP header of the kernel's.
func sendOther(t *testing.T, h *lab.Host, protocol int, to netip.Addr, payload []byte) {
	t.Helper()
	h.Do(t, func() {
		family, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{})
		if to.Is4() {
			address.(*unix.SockaddrInet4).Addr = to.As4()
		} else {
			family, address = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		lab.Check(t, err)
		defer unix.Close(fd)
		lab.Check(t, unix.Sendto(fd, payload, 0, address))
	})
}

// segment sends a TCP header, whose checksum is wrong: nobody answers.
func segment(t *testing.T, h *lab.Host, to netip.Addr, from, port uint16, flags byte) {
	t.Helper()
	sendOther(t, h, unix.IPPROTO_TCP, to, []byte{byte(from >> 8), byte(from), byte(port >> 8), byte(port), 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 255, 255, 0, 0, 0, 0})
}

// Of what pods begin beside their proxy each kind keeps to the pace, and what has begun,
// and what they answer, goes on beyond it.
func TestDirectPace(t *testing.T) { eachRedirection(t, testDirectPace) }

func testDirectPace(t *testing.T, l *lab.Lab) {
	const rate, excluded = 20, 9200
	n := l.Node1
	n.Exclusions = map[string][]v1alpha1.Exclusion{"b1": {{Direction: v1alpha1.DirectionOutbound, Port: excluded}}}
	limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30, NewDirect: rate})
	lab.Eventually(t, "the exclusion", func() error {
		if pods := n.Tenant("team-b").Pods; len(pods) != 1 || len(pods[0].Excluded) != 1 {
			return fmt.Errorf("the pods are %+v", pods)
		}
		return nil
	})
	echoDatagrams(t, l.Outside, 5300)
	echoDatagrams(t, l.B1, 5301)
	echo(t, n.Namespace, 5302)
	echo(t, l.B1.Namespace, 5303)
	dropped := func() int { return int(n.Tenant("team-b").Drops["directTooFast"]) }
	syn := func(h *lab.Host, to netip.AddrPort) {
		h.Do(t, func() {
			d := net.Dialer{Timeout: time.Millisecond}
			if c, err := d.Dial("tcp", to.String()); err == nil {
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		})
	}
	eachFamily(t, func(t *testing.T, family int) {
		to := lab.At(l.Outside.Of(family), 5300)
		first := datagrams(t, l.B1, to)
		lab.Eventually(t, "a flow beside the proxy", func() error {
			if !comesBack(t, first, 50*time.Millisecond) {
				return fmt.Errorf("nothing comes back")
			}
			return nil
		})
		var toNode net.Conn
		lab.Eventually(t, "a connection to the node", func() (err error) {
			l.B1.Do(t, func() { toNode, err = net.DialTimeout("tcp", lab.At(n.Of(family), 5302).String(), 50*time.Millisecond) })
			return err
		})
		defer toNode.Close()
		echo := map[int]struct {
			protocol int
			kind     byte
		}{4: {unix.IPPROTO_ICMP, 8}, 6: {unix.IPPROTO_ICMPV6, 128}}[family]
		for name, send := range map[string]func(i int){
			"datagrams": func(int) { datagrams(t, l.B1, to).Write([]byte("x")) },
			"SCTP": func(i int) {
				sendOther(t, l.B1, unix.IPPROTO_SCTP, to.Addr(), []byte{byte(i >> 8), byte(i), 0, 1, 0, 0, 0, 0, 0, 0, 0, 0})
			},
			"echo requests": func(i int) {
				sendOther(t, l.B1, echo.protocol, to.Addr(), []byte{echo.kind, 0, 0, 0, byte(i >> 8), byte(i), 0, 0})
			},
			"codes of an echo request": func(i int) {
				sendOther(t, l.B1, echo.protocol, to.Addr(), []byte{echo.kind, byte(i), 0, 0, 0, 0, 0, 0})
			},
			"PPTP's calls": func(i int) {
				sendOther(t, l.B1, unix.IPPROTO_GRE, to.Addr(), []byte{0x20, 1, 0x88, 0x0b, 0, 0, byte(i >> 8), byte(i)})
			},
			"SYNs from one port to the node": func(int) { segment(t, l.B1, n.Of(family), 20000, excluded+1, 0x02) },
			"ACKs to the node":               func(i int) { segment(t, l.B1, n.Of(family), uint16(20000+i), excluded+1, 0x10) },
			"a protocol without ports": func(i int) {
				b := to.Addr().AsSlice()
				b[len(b)-1] = byte(100 + i)
				other, _ := netip.AddrFromSlice(b)
				sendOther(t, l.B1, 253, other, []byte("0123456789"))
			},
			"SYNs to the node":       func(int) { syn(l.B1, lab.At(n.Of(family), excluded+1)) },
			"SYNs that are excluded": func(int) { syn(l.B1, lab.At(l.Outside.Of(family), excluded)) },
		} {
			time.Sleep(4 * time.Second / rate) // the first pass, and their likes aren't new
			was, sent := dropped(), 0
			lab.Eventually(t, name+" that are too fast", func() error {
				for range 6 * rate {
					send(sent)
					sent++
				}
				if n := dropped() - was; n < rate {
					return fmt.Errorf("of %d %d were dropped", sent, n)
				}
				return nil
			})
			// A flow that is silent for a minute counts again.
			if !comesBack(t, first, lab.Patience) || !comesBack(t, toNode, lab.Patience) {
				t.Fatalf("after %s a flow that had begun doesn't pass", name)
			}
		}
		was := dropped()
		for i := range 3 * rate {
			if !comesBack(t, first, lab.Patience) || !comesBack(t, toNode, lab.Patience) {
				t.Fatalf("packet %d of flows that had begun doesn't pass", i+1)
			}
		}
		for i := range 3 * rate {
			if !comesBack(t, datagrams(t, l.Outside, lab.At(l.B1.Of(family), 5301)), lab.Patience) {
				t.Fatalf("the pod doesn't answer flow %d that another one began", i+1)
			}
		}
		for i := range 3 * rate {
			n.Do(t, func() {
				c, err := net.DialTimeout("tcp", lab.At(l.B1.Of(family), 5303).String(), lab.Patience)
				if err != nil {
					t.Fatalf("the pod doesn't answer connection %d of the node: %v", i+1, err)
				}
				defer c.Close()
				if !comesBack(t, c, lab.Patience) {
					t.Fatalf("the pod doesn't answer what comes by connection %d of the node", i+1)
				}
			})
		}
		if n := dropped() - was; n != 0 {
			t.Errorf("%d packets of flows that had begun were dropped", n)
		}
	})

	// What is excluded is paced before it counts, and the bypass isn't paced.
	const opened = 6 * rate
	counted := func() (passed, dropped int) {
		i := n.Tenant("team-b")
		return int(i.Excluded + i.Bypassed), int(i.Drops["directTooFast"])
	}
	open := func(port uint16, check func(passed, dropped int, took time.Duration) error) {
		t.Helper()
		time.Sleep(4 * time.Second / rate) // some pass
		passed, dropped := counted()
		begun := time.Now()
		for i := range opened {
			segment(t, l.B1, l.Outside.V4, uint16(20000+i), port, 0x02)
		}
		var took time.Duration
		lab.Eventually(t, "what passes in the clear", func() error {
			p, d := counted()
			if p, d = p-passed, d-dropped; took == 0 && p+d >= opened {
				took = time.Since(begun) // until the kernel had looked at the last
			}
			return check(p, d, took)
		})
	}
	open(excluded, func(passed, dropped int, took time.Duration) error {
		if most := int(rate*(1+took.Seconds())) + 1; passed+dropped != opened || passed == 0 || passed > most {
			return fmt.Errorf("%d connections were excluded and %d dropped, of %d and at most %d", passed, dropped, opened, most)
		}
		return nil
	})
	n.Namespaces = []v1alpha1.NodeNamespace{{Name: "team-b", EmergencyBypass: true}}
	n.WritePlan()
	lab.Eventually(t, "the bypass", func() error {
		if pods := n.Tenant("team-b").Pods; len(pods) != 1 || !pods[0].Bypass {
			return fmt.Errorf("the pods are %+v", pods)
		}
		return nil
	})
	open(excluded+2, func(passed, dropped int, _ time.Duration) error {
		if passed != opened || dropped != 0 {
			return fmt.Errorf("%d connections passed the proxy by and %d were dropped, of %d", passed, dropped, opened)
		}
		return nil
	})

	// Agents come and go, and none of them gives another second's worth.
	const agents, flows = 4, 300
	stop, sent := make(chan struct{}), make(chan int)
	was, began := dropped(), time.Now()
	l.B1.Go(func() {
		tick := time.NewTicker(time.Second / flows) // the load is bounded
		defer tick.Stop()
		to := net.UDPAddrFromAddrPort(lab.At(l.Outside.V4, 5300))
		// Of a port of its own each: chance would have some be flows that had begun.
		for n, port := 0, 10000; ; port = 10000 + (port+1-10000)%20000 {
			select {
			case <-stop:
				sent <- n
				return
			case <-tick.C:
			}
			if c, err := net.DialUDP("udp", &net.UDPAddr{Port: port}, to); err == nil {
				if _, err := c.Write([]byte("x")); err == nil {
					n++
				}
				c.Close()
			}
		}
	})
	for range agents {
		n.Kill()
		n.Start()
		n.WaitReady()
	}
	close(stop)
	flooded, took := <-sent, time.Since(began)
	most := int(rate*(1+took.Seconds())) + 1
	lab.Eventually(t, "a pace that is kept", func() error {
		if passed := flooded - (dropped() - was); passed > most || flooded < 2*most {
			return fmt.Errorf("over %d agents %d of %d flows passed in %s, at most %d", agents, passed, flooded, took, most)
		}
		return nil
	})
}
