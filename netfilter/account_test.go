package netfilter

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// nobody has this address.
var nobody = netip.MustParseAddr("203.0.113.1")

// clearPod is a pod of which all that it opens, and all that is opened to it, passes in
// the clear, with an address of its own, and a raw socket of it for TCP.
func clearPod(t *testing.T, uid string, tenant uint16, address string) (p steer.Pod, fd int) {
	t.Helper()
	p, do := wire(t, uid, tenant)
	a := netip.MustParseAddr(address)
	host, err := netlink.LinkByIndex(p.Ifindex)
	check(t, err)
	// Packets don't wait for neighbours.
	neighbour := func(link netlink.Link, a netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
		return &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac}
	}
	check(t, errors.Join(netlink.NeighSet(neighbour(host, a, p.MAC)),
		netlink.RouteReplace(&netlink.Route{LinkIndex: p.Ifindex, Dst: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK})))
	p.IPs = []netip.Addr{a}
	p.Exclusions = []steer.Exclusion{{}, {Inbound: true}}
	do(func() {
		var link netlink.Link
		if link, err = netlink.LinkByName("pod" + uid + "x"); err != nil {
			return
		}
		err = errors.Join(netlink.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}),
			netlink.NeighSet(neighbour(link, wireNode, host.Attrs().HardwareAddr)),
			netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: wireNode.AsSlice()}),
			// Of other pods.
			netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: wireNode.AsSlice(), Dst: &net.IPNet{IP: net.IPv4(10, 0, 0, 0), Mask: net.CIDRMask(25, 32)}}))
		if err == nil {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		}
	})
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return p, fd
}

// badSegment is one of TCP, whose checksum is wrong: no host answers it.
func badSegment(from, to netip.AddrPort, flags byte) []byte {
	b := make([]byte, 40)
	b[0], b[3], b[8], b[9] = 4<<4|5, 40, 64, unix.IPPROTO_TCP
	copy(b[12:], from.Addr().AsSlice())
	copy(b[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[20:], from.Port())
	binary.BigEndian.PutUint16(b[22:], to.Port())
	b[32], b[33] = 5<<4, flags
	return b
}

// sendSegment sends one by a raw socket.
func sendSegment(t *testing.T, fd int, from, to netip.AddrPort, flags byte) {
	t.Helper()
	for b := badSegment(from, to, flags); ; {
		err := unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
		if !errors.Is(err, unix.ENOBUFS) {
			check(t, err)
			return
		}
	}
}

func writtenDown(t *testing.T, d *Datapath, of netip.Addr) (flows map[model.Flow]time.Duration) {
	t.Helper()
	all, err := d.flows(false)
	check(t, err)
	flows = map[model.Flow]time.Duration{}
	for _, f := range all {
		if f.Pod.Addr() == of {
			flows[f.Flow] = f.expires
		}
	}
	return flows
}

// A pod that opens as many flows as it can, and goes on in each although nobody answers,
// takes no room of another tenant's, holds nobody up, and keeps none of them.
func TestFlowsOfATenantAreBounded(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2))))
		a, fromA := clearPod(t, "a", 1, "10.0.0.1")
		b, fromB := clearPod(t, "b", 2, "10.0.0.2")
		check(t, errors.Join(d.UpdatePod(a), d.UpdatePod(b)))
		full := func(uid string) uint64 {
			all, err := d.PodCounters()
			check(t, err)
			return all[uid].Dropped.FlowsFull
		}
		opened := 0
		var last time.Time // when the last of them began
		send := func(i int, flags byte) {
			sendSegment(t, fromA, netip.AddrPortFrom(a.IPs[0], uint16(1024+i)), netip.AddrPortFrom(nobody, 80), flags)
		}
		eventually(t, "drop for want of room", func() bool {
			for range maxKept / 4 {
				send(opened, flagSYN)
				opened++
			}
			last = time.Now()
			return full("a") > 0
		})
		for i := range opened {
			send(i, flagACK)
		}
		if n := len(elementsOf(t, keptSet("1"))); n > maxKept {
			t.Errorf("an account has %d flows, want %d at most", n, maxKept)
		}
		flows := writtenDown(t, d, a.IPs[0])
		// On a busy machine they may all be forgotten by now.
		if len(flows) > maxKept || len(flows) == 0 && time.Since(last) < alone/2 {
			t.Errorf("%d flows of a pod are written down, want %d at most", len(flows), maxKept)
		}
		for f, expires := range flows {
			if expires > alone {
				t.Fatalf("%v, which nobody has answered, is kept for %s", f, expires)
			}
		}
		eventually(t, "flow of the other tenant", func() bool {
			sendSegment(t, fromB, netip.AddrPortFrom(b.IPs[0], 5000), netip.AddrPortFrom(nobody, 80), flagSYN)
			return len(writtenDown(t, d, b.IPs[0])) == 1
		})
		if n := full("b"); n != 0 {
			t.Errorf("%d flows of the other tenant were dropped", n)
		}
		b.Tenant = 1
		check(t, d.MovePod(b, func(uint16) ([]model.Flow, error) {
			return []model.Flow{{Pod: netip.AddrPortFrom(b.IPs[0], 5001), Peer: netip.AddrPortFrom(nobody, 80)}}, nil
		}))
		if n := len(writtenDown(t, d, b.IPs[0])); n < 1 {
			t.Errorf("%d flows of a pod that has moved are written down", n)
		}
		// There is room again for the pod itself, too.
		eventually(t, "room for a flow", func() bool {
			sendSegment(t, fromA, netip.AddrPortFrom(a.IPs[0], 1023), netip.AddrPortFrom(nobody, 80), flagSYN)
			_, ok := writtenDown(t, d, a.IPs[0])[model.Flow{Pod: netip.AddrPortFrom(a.IPs[0], 1023), Peer: netip.AddrPortFrom(nobody, 80)}]
			return ok
		})
	})
}

// What a process of the node answers for a service keeps a flow, too.
func TestTheNodeKeepsAFlow(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, d.UpdateTenant(tenant(t, 1)))
		p, fromPod := clearPod(t, "a", 1, "10.0.0.1")
		check(t, d.UpdatePod(p))
		fromNode, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		check(t, err)
		t.Cleanup(func() { unix.Close(fromNode) })
		pod, peer := netip.AddrPortFrom(p.IPs[0], 5000), netip.AddrPortFrom(nobody, 80)
		kept := func() time.Duration { return writtenDown(t, d, pod.Addr())[model.Flow{Pod: pod, Peer: peer}] }
		sendSegment(t, fromPod, pod, peer, flagSYN)
		eventually(t, "flow", func() bool { return kept() > 0 })
		sendSegment(t, fromNode, peer, pod, flagSYN|flagACK)
		eventually(t, "flow that is kept", func() bool { return kept() > endedLinger })
		sendSegment(t, fromNode, peer, pod, flagFIN|flagACK)
		eventually(t, "flow that its peer has ended", func() bool { lasts := kept(); return lasts > alone && lasts <= endedLinger })
	})
}

// What comes to the pod keeps a flow, and so do both ends' ends; what the pod sends
// doesn't.
func TestWhoKeepsAFlow(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, d.UpdateTenant(tenant(t, 1)))
		p, fromPod := clearPod(t, "a", 1, "10.0.0.1")
		check(t, d.UpdatePod(p))
		// What the node's stack sends would be the node's own.
		fromPeer, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		t.Cleanup(func() { unix.Close(fromPeer) })
		veth := &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(big16(unix.ETH_P_IP)), Ifindex: p.Ifindex, Halen: 6}
		copy(veth.Addr[:], p.MAC)
		type step struct {
			pod   bool
			flags byte
			// How long the flow is kept from then on.
			most, least time.Duration
		}
		short, half, long := []time.Duration{alone, 0}, []time.Duration{endedLinger, alone}, []time.Duration{flowIdle, endedLinger}
		from := func(pod bool, flags byte, kept []time.Duration) step { return step{pod, flags, kept[0], kept[1]} }
		for i, steps := range [][]step{
			{from(true, flagSYN, short), from(true, flagACK, short), from(false, flagSYN|flagACK, long), from(true, flagACK, long),
				from(true, flagFIN|flagACK, long), from(false, flagACK, half), from(false, flagFIN|flagACK, short), from(true, flagACK, short)},
			{from(true, flagSYN, short), from(false, flagSYN|flagACK, long), from(false, flagFIN|flagACK, half), from(true, flagACK, half),
				from(true, flagFIN|flagACK, half), from(false, flagACK, short), from(true, flagSYN, short), from(false, flagSYN|flagACK, long)},
			{from(true, flagSYN, short), from(false, flagSYN|flagACK, long), from(true, flagRST, short), from(false, flagACK, half)},
			{from(true, flagSYN, short), from(false, flagSYN|flagACK, long), from(false, flagRST, half), from(true, flagACK, half), from(false, flagACK, half)},
			{from(true, flagSYN, short), from(true, flagFIN|flagACK, short), from(true, flagRST, short)},
			{from(false, flagSYN, short), from(true, flagSYN|flagACK, short), from(false, flagACK, long), from(true, flagFIN|flagACK, long), from(false, flagFIN|flagACK, short)},
		} {
			pod, peer := netip.AddrPortFrom(p.IPs[0], uint16(5000+i)), netip.AddrPortFrom(nobody, 80)
			for j, s := range steps {
				if s.pod {
					sendSegment(t, fromPod, pod, peer, s.flags)
				} else {
					check(t, unix.Sendto(fromPeer, badSegment(peer, pod, s.flags), 0, veth))
				}
				var expires time.Duration
				var ok bool
				for until := time.Now().Add(5 * time.Second); ; {
					expires, ok = writtenDown(t, d, pod.Addr())[model.Flow{Pod: pod, Peer: peer}]
					if ok && expires <= s.most && expires > s.least || time.Now().After(until) {
						break
					}
				}
				if !ok || expires > s.most || expires <= s.least {
					t.Errorf("case %d, after packet %d: kept for %s, %v, want %s to %s", i, j, expires, ok, s.least, s.most)
				}
			}
		}
		flows := writtenDown(t, d, p.IPs[0])
		for _, set := range []string{setEnded, setPeerEnded} {
			for _, e := range elementsOf(t, d.sets[set+"4"]) {
				flow := families[0].parseFlow(e.Key)
				if kept := flows[flow]; e.Expires > kept+time.Second {
					t.Errorf("that %v has ended is remembered for %s, itself for %s", flow, e.Expires, kept)
				}
			}
		}
		// What is over goes from both, and meanwhile from one of them.
		eventually(t, "account of the flows that are written down", func() bool {
			return len(elementsOf(t, keptSet("1"))) == len(writtenDown(t, d, p.IPs[0]))
		})
	})
}

// accounts are those that the node's table has sets and chains of.
func accounts(t *testing.T) (names []string) {
	t.Helper()
	c, err := open(0)
	check(t, err)
	sets, err := c.GetSets(steering)
	check(t, err)
	for _, s := range sets {
		if name, ok := strings.CutPrefix(s.Name, setKept); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	chains, err := c.ListChainsOfTableFamily(steering.Family)
	check(t, err)
	for _, ch := range chains {
		if name, ok := accountOfChain(ch.Name); ok && !slices.Contains(names, name) {
			t.Errorf("chain %s is of no account", ch.Name)
		}
	}
	return names
}

// leads returns the only rule's verdict of a chain.
func leads(t *testing.T, name string) string {
	t.Helper()
	c, err := open(0)
	check(t, err)
	rules, err := c.GetRules(steering, &nftables.Chain{Name: name, Table: steering})
	check(t, err)
	if len(rules) != 1 || len(rules[0].Exprs) != 1 {
		t.Fatalf("chain %s has %d rules", name, len(rules))
	}
	v, ok := rules[0].Exprs[0].(*expr.Verdict)
	if !ok {
		t.Fatalf("chain %s has a %T", name, rules[0].Exprs[0])
	}
	return v.Chain
}

// Accounts are there while a pod or a tenant has them, a pod's chains lead to its own also
// if a former version had them lead elsewhere, and what a pod had is taken out with it.
func TestAccounts(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one, two := tenant(t, 1), tenant(t, 2)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two)))
		p, fd := clearPod(t, "a", 1, "10.0.0.1")
		in, out := podChains(uint32(p.Ifindex))
		own := accountOf(uint32(p.Ifindex), 0)
		want := func(when, account string, all ...string) {
			t.Helper()
			if got := accounts(t); !slices.Equal(got, all) {
				t.Errorf("%s: accounts %v, want %v", when, got, all)
			}
			if account == "" {
				return
			}
			if i, o := leads(t, in), leads(t, out); i != chainSends+account || o != chainGets+account {
				t.Errorf("%s: the pod's chains lead to %s and %s", when, i, o)
			}
		}
		want("without pods", "", "1", "2")
		check(t, d.UpdatePod(p))
		want("with a pod", "1", "1", "2")
		sendSegment(t, fd, netip.AddrPortFrom(p.IPs[0], 5000), netip.AddrPortFrom(nobody, 80), flagSYN)
		eventually(t, "charged flow", func() bool { return len(elementsOf(t, keptSet("1"))) == 1 })
		p.Tenant = 2
		check(t, d.MovePod(p, nil))
		want("in another tenant", "2", "1", "2")
		check(t, d.ReleasePod("a", nil))
		want("without a tenant", own, "1", "2", own)
		sendSegment(t, fd, netip.AddrPortFrom(p.IPs[0], 5001), netip.AddrPortFrom(nobody, 80), flagSYN)
		eventually(t, "flow that is charged to the pod itself", func() bool { return len(elementsOf(t, keptSet(own))) == 1 })
		check(t, errors.Join(d.DeleteTenant(2), d.Close()))

		// Of a former version.
		c, err := open(0)
		check(t, err)
		former := c.AddChain(&nftables.Chain{Name: "former", Table: steering})
		for _, name := range []string{in, out} {
			of := &nftables.Chain{Name: name, Table: steering}
			c.FlushChain(of)
			c.AddRule(&nftables.Rule{Table: steering, Chain: of, Exprs: goTo(former.Name)})
		}
		check(t, c.Flush())
		if d, err = Open(Options{}); err != nil {
			t.Fatal(err)
		}
		want("with another process", own, "1", own)
		p.Tenant = 1
		check(t, d.MovePod(p, nil))
		want("back", "1", "1")
		check(t, d.DeletePod("a"))
		if n := len(elementsOf(t, keptSet("1"))); n != 0 {
			t.Errorf("%d flows of a pod that is gone are charged", n)
		}
		check(t, d.DeleteTenant(1))
		want("in the end", "")
		if n := len(d.written); n != 0 {
			t.Errorf("%d chains that are gone are remembered", n)
		}
	})
}

// An agent makes the chains of all accounts anew when it starts, however many tenants its
// node has.
func TestManyAccounts(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const tenants = 200 // each set takes 256 KiB
		d, err := Open(Options{})
		check(t, err)
		var pods []nftables.SetElement
		for i := range uint32(tenants) {
			pods = append(pods, nftables.SetElement{Key: native(1000 + i), Val: native(1 + i), Comment: "pod"})
		}
		c, err := open(0)
		check(t, err)
		check(t, errors.Join(c.SetAddElements(d.sets[setPods], pods), c.Flush(), d.Close()))
		for _, when := range []string{"made", "made anew"} {
			d, err := Open(Options{})
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if n := len(accounts(t)); n != tenants {
				t.Errorf("%s: %d accounts, want %d", when, n, tenants)
			}
			check(t, d.Close())
		}
	})
}

// What a pod opens from the tunnels' port takes room of its own tenant only.
func TestDialledIsBounded(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2))))
		a, fromA := clearPod(t, "a", 1, "10.0.0.3")
		b, fromB := clearPod(t, "b", 2, "10.0.0.2")
		a.Exclusions, b.Exclusions = nil, nil
		check(t, errors.Join(d.UpdatePod(a), d.UpdatePod(b)))
		has := func(account string) int { return len(elementsOf(t, dialledSet(account))) }
		sent := 0
		eventually(t, "full set", func() bool {
			for range 2 * maxDialled {
				sendSegment(t, fromA, netip.AddrPortFrom(a.IPs[0], portInbound), netip.AddrPortFrom(b.IPs[0], uint16(1+sent)), flagSYN)
				sent++
			}
			return has("1") >= maxDialled
		})
		eventually(t, "call of the other tenant's", func() bool {
			sendSegment(t, fromB, netip.AddrPortFrom(b.IPs[0], portInbound), netip.AddrPortFrom(a.IPs[0], 80), flagSYN)
			return has("2") == 1
		})
		if n := has("1"); n != maxDialled {
			t.Errorf("%d calls have room, want %d", n, maxDialled)
		}
		check(t, d.DeletePod("a"))
		if n := has("1"); n != 0 {
			t.Errorf("%d calls of a pod that is gone have room", n)
		}
	})
}
