package netfilter

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// connectionOf is the key of one between two hosts that don't exist.
func connectionOf(n uint32) string {
	a := slices.Concat(make([]byte, 10), []byte{0xff, 0xff, 10}, binary.BigEndian.AppendUint32(nil, n)[1:])
	return string(key(a, portKey(1), a, portKey(80)))
}

func tellRules(t *testing.T, of steer.Tenant, all ...correction) error {
	t.Helper()
	return inTenant(of.Netns, func(ns int) error { return correct(ns, all) })
}

// Rules do what they are told as far as there is room, and leave to each set what is its.
func TestCorrections(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		check(t, d.UpdateTenant(one))
		if err := tellRules(t, one, correction{correctOthers, connectionOf(0)}); !errors.Is(err, errNotTaken) {
			t.Errorf("rules without a bound are told: %v", err)
		}
		one.Connections.Concurrent = 8
		check(t, d.UpdateTenant(one))
		forAll, forPods := innerState{concurrent: 8}.rooms()
		told := func(what byte, from, to uint32) {
			t.Helper()
			var all []correction
			for n := from; n < to; n++ {
				all = append(all, correction{what, connectionOf(n)})
			}
			check(t, tellRules(t, one, all...))
		}
		are := func(inAll, inPods int) {
			t.Helper()
			eventually(t, "room for as many", func() bool {
				have := rooms(t, one)
				return have[forAll.Name] == inAll && have[forPods[0].Name] == inPods
			})
		}
		told(correctOthers, 0, 10)
		are(6, 0)
		told(correctPods, 10, 20)
		are(6, 2)
		told(correctOthers, 5, 11)
		are(6, 2)
		told(correctNobodys, 0, 30)
		are(0, 0)
		eventually(t, "end of what has room no more", func() (swept bool) {
			inside(t, one, func(c *nftables.Conn) {
				for n, set := range []*nftables.Set{forAll, forPods[0]} {
					check(t, c.SetAddElements(set, []nftables.SetElement{{Key: []byte(connectionOf(uint32(n))), Timeout: 5 * time.Minute}}))
				}
				swept = c.Flush() == nil
			})
			return swept
		})
		told(correctOthers, 0, 2)
		are(1, 1)
		inside(t, one, func(c *nftables.Conn) {
			for _, set := range []*nftables.Set{forAll, forPods[0]} {
				elements, err := c.GetSetElements(set)
				check(t, err)
				if len(elements) != 1 || elements[0].Expires < flowIdle/2 {
					t.Errorf("%s has %+v", set.Name, elements)
				}
			}
		})
	})
}

// That rules have gone just now with their bound, or with the tenant, is no error; that they
// are missing is.
func TestCorrectionsWithoutRules(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.Concurrent = 8
		check(t, d.UpdateTenant(one))
		openAccepted(t, one, 1)
		was := d.roomsOf(1, one.Netns)
		inside(t, one, func(c *nftables.Conn) {
			c.FlushChain(&nftables.Chain{Name: "output", Table: inner})
			check(t, c.Flush())
		})
		if _, err := d.CheckConnections(1, one.Netns); !errors.Is(err, errNotTaken) || strings.Contains(err.Error(), "%!") {
			t.Errorf("a check without rules: %v", err)
		}
		late := func() error {
			return inTenant(one.Netns, func(ns int) error {
				return d.correctRooms(1, one.Netns, ns, was, []correction{{correctOthers, connectionOf(0)}})
			})
		}
		one.Connections.Concurrent = 0
		check(t, d.UpdateTenant(one))
		if err := late(); err != nil {
			t.Errorf("the bound has gone: %v", err)
		}
		check(t, d.DeleteTenant(1))
		if err := late(); err != nil {
			t.Errorf("the tenant has gone: %v", err)
		}
	})
}

// sendMarked sends a datagram from the thread's network namespace, with a mark or 0.
func sendMarked(to *unix.SockaddrInet4, mark int, datagram []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
			return err
		}
	}
	return unix.Sendto(fd, datagram, 0, to)
}

// Nobody else corrects anything: not who sends the same in the tenant's namespace, where
// proxies can't mark it, nor who sends it there, with the mark or without.
func TestOthersCorrectNothing(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.Concurrent = 8
		check(t, d.UpdateTenant(one))
		check(t, tellRules(t, one, correction{correctOthers, connectionOf(0)}))

		near, far := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 9}, &unix.SockaddrInet4{Addr: [4]byte{10, 9, 0, 2}, Port: 9}
		up := func(index int, address string) error {
			link, err := netlink.LinkByIndex(index)
			if err != nil {
				return err
			}
			a, err := netlink.ParseAddr(address)
			return errors.Join(err, netlink.LinkSetUp(link), netlink.AddrAdd(link, a))
		}
		check(t, up(one.HostIfindex, "10.9.0.1/24"))
		var heard *net.UDPConn
		inNetns(t, one.Netns, func() (err error) {
			if err := up(one.TenantIfindex, "10.9.0.2/24"); err != nil {
				return err
			}
			heard, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 9})
			return err
		})
		defer heard.Close()

		among, elsewhere := func(f func() error) { inNetns(t, one.Netns, f) }, func(f func() error) { check(t, f()) }
		for i, from := range []struct {
			name string
			in   func(func() error)
			to   *unix.SockaddrInet4
			mark int
		}{
			{"the tenant's namespace, without a mark", among, near, 0},
			{"the tenant's namespace, with another mark", among, near, correctionMark << 1},
			{"elsewhere, without a mark", elsewhere, far, 0},
			{"elsewhere, with the mark", elsewhere, far, correctionMark},
		} {
			for _, said := range []string{string(rune(correctOthers)) + connectionOf(uint32(i+1)), string(rune(correctNobodys)) + connectionOf(0)} {
				eventually(t, "datagram from "+from.name, func() bool {
					var sent error
					from.in(func() error { sent = sendMarked(from.to, from.mark, []byte(said)); return nil })
					check(t, heard.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
					b := make([]byte, len(said)+1)
					n, err := heard.Read(b)
					return sent == nil && err == nil && string(b[:n]) == said
				})
			}
		}
		var elements []nftables.SetElement
		inside(t, one, func(c *nftables.Conn) {
			forAll, forPods := innerState{concurrent: 8}.rooms()
			for _, set := range append(forPods, forAll) {
				more, err := c.GetSetElements(set)
				check(t, err)
				elements = append(elements, more...)
			}
		})
		if len(elements) != 1 || string(elements[0].Key) != connectionOf(0) || elements[0].Expires < flowIdle/2 {
			t.Errorf("room is that of %+v", elements)
		}

		// The thread is a proxy's now, which ends with the function.
		inNetns(t, one.Netns, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			none := [2]unix.CapUserData{}
			if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
				return err
			}
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, correctionMark); !errors.Is(err, unix.EPERM) {
				return fmt.Errorf("without capabilities packets are marked: %v", err)
			}
			return nil
		})
	})
}

// openAccepted opens connections in a tenant's namespace to a socket as proxies listen with.
func openAccepted(t *testing.T, of steer.Tenant, n int) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- inTenant(of.Netns, func(ns int) error {
			if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
				return err
			}
			transparent := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1) }), err)
			}}
			l, err := transparent.Listen(context.Background(), "tcp", "[::]:0")
			if err != nil {
				return err
			}
			defer l.Close()
			to := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: l.Addr().(*net.TCPAddr).Port}
			for range n {
				c, err := net.DialTCP("tcp", nil, to)
				if err != nil {
					return err
				}
				t.Cleanup(func() { c.Close() })
				in, err := l.Accept()
				if err != nil {
					return err
				}
				t.Cleanup(func() { in.Close() })
			}
			return nil
		})
	}()
	check(t, <-done)
}

// A set that has come to have more than its size is replaced by one that has what is
// open, and that rules are held to, by whichever agent.
func TestRoomIsRenewed(t *testing.T) {
	inNode(t, func(t *testing.T) {
		var log bytes.Buffer
		options := Options{Log: slog.New(slog.NewTextHandler(&log, nil))}
		d, err := Open(options)
		check(t, err)
		one := tenant(t, 1)
		one.Connections.Concurrent = 8
		check(t, d.UpdateTenant(one))
		openAccepted(t, one, 3)
		for round, names := range [][]string{{"room_6", "room_6_renewed", "room_pods_2_renewed"}, {"room_6_renewed", "room_6", "room_pods_2"}} {
			was, renewed, renewedPods := names[0], names[1], names[2]
			overfill(t, one, was)
			// An agent was killed while it filled the other.
			inside(t, one, func(c *nftables.Conn) {
				half := connectionSet(renewed, 6)
				check(t, c.AddSet(half, nil))
				for n := range uint32(6) {
					check(t, c.SetAddElements(half, []nftables.SetElement{{Key: []byte(connectionOf(n)), Timeout: flowIdle}}))
				}
				check(t, c.Flush())
			})
			log.Reset()
			if again, err := d.CheckConnections(1, one.Netns); err != nil || again != checkOften {
				t.Errorf("the next look at a set that is too large is due in %s, %v", again, err)
			}
			if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "tenant=1") {
				t.Errorf("the log says %q", log.String())
			}
			want := []string{"ended_by_peer_1024", "ended_by_tenant_1024", renewed, renewedPods}
			is := func(when string, connections int) {
				t.Helper()
				have := rooms(t, one)
				if names := slices.Sorted(maps.Keys(have)); !slices.Equal(names, want) || have[renewed] != connections {
					t.Errorf("%s, round %d: there are %v, want %d connections in %v", when, round, have, connections, want)
				}
			}
			is("renewed", 3)
			told := func() {
				t.Helper()
				var all []correction
				for n := range uint32(20) {
					all = append(all, correction{correctOthers, connectionOf(1000 + n)})
				}
				check(t, tellRules(t, one, all...))
			}
			told()
			is("filled", 6)
			// This agent is killed before it has removed the former set.
			inside(t, one, func(c *nftables.Conn) {
				check(t, c.AddSet(connectionSet(was, 6), nil))
				check(t, c.Flush())
			})
			check(t, d.Close())
			d, err = Open(options)
			check(t, err)
			check(t, d.UpdateTenant(one))
			is("another agent", 6)
			told()
			is("filled by another agent", 6)
		}
	})
}

// overfill has a set with more than its size take the place of one. The rules that name the
// former go, too, or the kernel wouldn't let go of it.
func overfill(t *testing.T, of steer.Tenant, name string) {
	t.Helper()
	inside(t, of, func(c *nftables.Conn) {
		chains, err := c.ListChainsOfTableFamily(inner.Family)
		check(t, err)
		for _, ch := range chains {
			c.FlushChain(ch)
		}
		c.DelSet(connectionSet(name, 6))
		check(t, c.Flush())
		larger := connectionSet(name, 64)
		check(t, c.AddSet(larger, nil))
		for n := range uint32(6 + overfullLeast + 1) {
			check(t, c.SetAddElements(larger, []nftables.SetElement{{Key: []byte(connectionOf(n)), Timeout: flowIdle}}))
		}
		check(t, c.Flush())
	})
}

// What is open since before there was a bound, or came when there was no room for it, has
// room as soon as there is some.
func TestRoomForWhatIsOpen(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(pod(t, "a", 1, "127.0.0.1"))))
		openAccepted(t, one, 3)
		one.Connections.Concurrent = 5
		check(t, d.UpdateTenant(one))
		if have := rooms(t, one); have["room_4"] != 3 {
			t.Errorf("before any look there are %v", have)
		}
		openAccepted(t, one, 2)
		_, err = d.CheckConnections(1, one.Netns)
		check(t, err)
		if have := rooms(t, one); have["room_4"] != 4 || have["room_pods_1"] != 1 {
			t.Errorf("afterwards there are %v", have)
		}
	})
}
