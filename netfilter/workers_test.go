package netfilter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// inNetns runs f on a thread of its own in a network namespace.
func inNetns(t *testing.T, path string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		fd, err := os.Open(path)
		if err == nil {
			defer fd.Close()
			err = unix.Setns(int(fd.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	check(t, <-done)
}

// acceptors stand for Envoy's workers: each has a socket of its own for a port, twice
// as while a listener changes, and tells its number when it accepts. They end with the
// test.
func acceptors(t *testing.T, port uint16, workers int) (<-chan int, error) {
	c := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }), err)
	}}
	c.SetMultipathTCP(false)
	accepted := make(chan int)
	for worker := range workers {
		l, err := c.Listen(context.Background(), "tcp", fmt.Sprintf("[::]:%d", port))
		if err != nil {
			return nil, err
		}
		twice, err := l.(*net.TCPListener).File()
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		t.Cleanup(func() {
			l.Close()
			twice.Close()
		})
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
				accepted <- worker
			}
		}()
	}
	return accepted, nil
}

// What a pod opens to one destination goes to one worker, also by an ACK that answers a
// SYN cookie; to all destinations together go all workers, and tunnels from one peer do.
func TestWorkers(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const workers, destinations, each = 3, 48, 4
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		check(t, d.UpdateTenant(one))
		address := func(family, i int) netip.Addr {
			if family == 4 {
				return netip.AddrFrom4([4]byte{127, 0, 1, byte(i)})
			}
			return netip.AddrFrom16([16]byte{0xfd, 15: byte(i)})
		}
		accepted := map[uint16]<-chan int{}
		inNetns(t, one.Netns, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(lo); err != nil {
				return err
			}
			for i := range destinations + 1 {
				ip := &net.IPNet{IP: address(6, i).AsSlice(), Mask: net.CIDRMask(128, 128)}
				if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
					return err
				}
			}
			for generation := range steer.Generations {
				for l := range steer.Listeners {
					if accepted[l.PortOf(generation)], err = acceptors(t, l.PortOf(generation), workers); err != nil {
						return err
					}
				}
			}
			return nil
		})
		for generation := range steer.Generations {
			check(t, d.SetListeners(1, generation, os.Getpid()))
		}
		check(t, d.SetListeners(1, 0, os.Getpid())) // as by the next agent
		met := func(family int, cookies string, port uint16, i int) map[int]int {
			got := map[int]int{}
			inNetns(t, one.Netns, func() error {
				if err := os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte(cookies), 0o644); err != nil {
					return err
				}
				for range each {
					dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(address(family, 0), 0))}
					c, err := dialer.Dial("tcp", netip.AddrPortFrom(address(family, i), port).String())
					if err != nil {
						return err
					}
					got[<-accepted[port]]++
					c.Close()
				}
				return nil
			})
			return got
		}
		for _, family := range []int{4, 6} {
			for _, cookies := range []string{"1", "2"} {
				for generation := range steer.Generations {
					all := map[int]int{}
					for i := range destinations {
						got := met(family, cookies, steer.Outbound.PortOf(generation), i+1)
						if len(got) != 1 {
							t.Errorf("IPv%d, cookies %s, generation %d: to one destination went workers %v", family, cookies, generation, got)
						}
						for worker := range got {
							all[worker]++
						}
					}
					for worker := range workers {
						if all[worker] < 2 { // of 16; by chance once in a million runs
							t.Errorf("IPv%d, generation %d: workers have %v destinations", family, generation, all)
							break
						}
					}
					tunnels := map[int]int{}
					for range destinations {
						for worker, n := range met(family, cookies, steer.Inbound.PortOf(generation), 1) {
							tunnels[worker] += n
						}
					}
					if len(tunnels) != workers {
						t.Errorf("IPv%d, generation %d: tunnels of one peer go to workers %v", family, generation, tunnels)
					}
				}
			}
		}
		// Which destination goes where depends on the seed, which is the next agent's, too.
		spread := func() (workers []int) {
			for i := range destinations {
				for worker := range met(4, "1", steer.Outbound.Port(), i+1) {
					workers = append(workers, worker)
				}
			}
			return workers
		}
		before := spread()
		check(t, d.Close())
		d, err = Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(one), d.SetListeners(1, 0, os.Getpid())))
		if after := spread(); !slices.Equal(after, before) {
			t.Errorf("destinations went to workers %v, with the next agent to %v", before, after)
		}
		check(t, d.setState(1, func(s *innerState) { s.seed++ }))
		check(t, d.SetListeners(1, 0, os.Getpid()))
		if after := spread(); slices.Equal(after, before) {
			t.Errorf("destinations go to workers %v with either seed", before)
		}
	})
}
