package netfilter

import (
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// The pod's and the node's addresses on a wire.
var wirePod, wireNode = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.254")

// wire makes a pod whose veth leads to a network namespace of its own, in which do works.
func wire(t *testing.T, uid string, tenant uint16) (p steer.Pod, do func(func())) {
	t.Helper()
	namespaces := make(chan *os.File)
	work, done := make(chan func()), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		var ns *os.File
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		if err != nil {
			t.Error(err)
		}
		namespaces <- ns
		for f := range work {
			f()
			done <- struct{}{}
		}
	}()
	t.Cleanup(func() { close(work) })
	do = func(f func()) {
		work <- f
		<-done
	}
	ns := <-namespaces
	if ns == nil {
		t.FailNow()
	}
	defer ns.Close()
	host := veth(t, "pod"+uid, ns)
	address := func(a netip.Addr) *netlink.Addr {
		return &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}
	}
	check(t, errors.Join(netlink.LinkSetUp(host), netlink.AddrAdd(host, address(wireNode))))
	do(func() {
		link, err := netlink.LinkByName("pod" + uid + "x")
		if err == nil {
			err = errors.Join(netlink.LinkSetUp(link), netlink.AddrAdd(link, address(wirePod)))
		}
		if err != nil {
			t.Error(err)
			return
		}
		p.MAC = link.Attrs().HardwareAddr
	})
	p.UID, p.Tenant, p.Ifindex, p.IPs = uid, tenant, host.Attrs().Index, []netip.Addr{wirePod}
	return p, do
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s in time", what)
		}
	}
}

// rawSocket is one whose sender chooses the ports.
func rawSocket(t *testing.T, protocol int) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func datagram(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	return append(b, 0, 9, 0, 0, 'x') // without a checksum
}

// server answers datagrams to the pod's port 53, and counts them.
func server(t *testing.T, do func(func())) *atomic.Int64 {
	t.Helper()
	var conn *net.UDPConn
	var err error
	do(func() { conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 53}) })
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	answered := &atomic.Int64{}
	go func() {
		for b := make([]byte, 8); ; {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			conn.WriteToUDPAddrPort(b[:n], from)
			answered.Add(1)
		}
	}()
	return answered
}

func droppedTooFast(t *testing.T, d *Datapath) uint64 {
	t.Helper()
	all, err := d.PodCounters()
	check(t, err)
	return all["a"].Dropped.DirectTooFast
}

// flowElement is the key of a flow between a port of the pod and one of the node.
func flowElement(pod, peer uint16) []byte {
	mapped := func(a netip.Addr) []byte { b := a.As16(); b[10], b[11] = 0xff, 0xff; return b[:] }
	return key(mapped(wirePod), portKey(pod), mapped(wireNode), portKey(peer), []byte{unix.IPPROTO_UDP, 0, 0, 0})
}

func elementsOf(t *testing.T, s *nftables.Set) []nftables.SetElement {
	t.Helper()
	c, err := open(0)
	check(t, err)
	list, err := c.GetSetElements(s)
	check(t, err)
	return list
}

// A server of a tenant with a pace far below answers all of what asks it, from more ports
// than there is room for, for longer than they are remembered.
func TestAnswersHaveNoPace(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const flows, ports = maxHeard + 14464, 60000
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.DirectPerSecond = 5
		p, do := wire(t, "a", 1)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(p)))
		answered := server(t, do)
		fd, to := rawSocket(t, unix.IPPROTO_UDP), &unix.SockaddrInet4{Addr: wirePod.As4()}
		host, err := netlink.LinkByIndex(p.Ifindex)
		check(t, err)
		second := wireNode.Prev()
		check(t, netlink.AddrAdd(host, &netlink.Addr{IPNet: &net.IPNet{IP: second.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
		other := rawSocket(t, unix.IPPROTO_UDP)
		check(t, errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: wireNode.As4()}), unix.Bind(other, &unix.SockaddrInet4{Addr: second.As4()})))
		// 8,000 a second: the room is for twice as many.
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		began := time.Now()
		for i := 0; i < flows; {
			<-tick.C
			for range min(80, flows-i) {
				from := fd
				if i >= ports {
					from = other
				}
				check(t, unix.Sendto(from, datagram(uint16(1024+i%ports), 53), 0, to))
				i++
			}
			eventually(t, "answer", func() bool { return answered.Load() > int64(i-100) })
		}
		eventually(t, "last answer", func() bool { return answered.Load() >= flows-100 })
		t.Logf("%d flows in %s", flows, time.Since(began))
		if n := droppedTooFast(t, d); n > 0 {
			t.Errorf("%d answers of %d were dropped", n, answered.Load())
		}
	})
}

// What a pod begins is as much as the pace says, for longer than a second's worth lasts.
func TestPaceOfFlows(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const rate, flows = 20, 250
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.DirectPerSecond = rate
		p, do := wire(t, "a", 1)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(p)))
		began := time.Now()
		do(func() {
			fd := rawSocket(t, unix.IPPROTO_UDP)
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for i := range flows {
				<-tick.C
				if err := unix.Sendto(fd, datagram(uint16(20000+i), 9), 0, &unix.SockaddrInet4{Addr: wireNode.As4()}); err != nil {
					t.Error(err)
				}
			}
		})
		var passed, dropped int
		eventually(t, "count of all", func() bool {
			passed, dropped = len(elementsOf(t, flowsOf(1, rate).begun)), int(droppedTooFast(t, d))
			return passed+dropped == flows
		})
		took := time.Since(began)
		if most := rate + int(rate*took.Seconds()) + 1; passed > most || passed < rate {
			t.Errorf("in %s %d of %d flows passed, at most %d at %d a second", took, passed, flows, most, rate)
		}
	})
}

// What a pod has answered it may go on with after a while, which it may not with what it
// hasn't.
func TestAnsweredFlowsStay(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.DirectPerSecond = 50
		p, do := wire(t, "a", 1)
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(p)))
		answered, flows := server(t, do), flowsOf(1, 50)
		node, to := rawSocket(t, unix.IPPROTO_UDP), &unix.SockaddrInet4{Addr: wirePod.As4()}
		check(t, errors.Join(unix.Sendto(node, datagram(1001, 53), 0, to), unix.Sendto(node, datagram(1002, 54), 0, to)))
		eventually(t, "answer", func() bool { return answered.Load() == 1 && len(elementsOf(t, flows.heard)) == 2 })
		began := time.Now()
		eventually(t, "end of what the pod has heard", func() bool { return len(elementsOf(t, flows.heard)) == 0 })
		if took := time.Since(began); took > 3*heardKept {
			t.Errorf("it was remembered for %s", took)
		}
		var sent error
		do(func() {
			fd := rawSocket(t, unix.IPPROTO_UDP)
			back := &unix.SockaddrInet4{Addr: wireNode.As4()}
			sent = errors.Join(unix.Sendto(fd, datagram(53, 1001), 0, back), unix.Sendto(fd, datagram(54, 1002), 0, back))
		})
		check(t, sent)
		eventually(t, "flow that the pod begins", func() bool { return len(elementsOf(t, flows.begun)) > 0 })
		if begun := elementsOf(t, flows.begun); len(begun) != 1 || string(begun[0].Key) != string(flowElement(54, 1002)) {
			t.Errorf("the pod has begun %v", begun)
		}
		if answered := elementsOf(t, flows.answered); len(answered) != 1 || string(answered[0].Key) != string(flowElement(53, 1001)) {
			t.Errorf("the pod has answered %v", answered)
		}
	})
}

// What passes beside a tenant keeps the mark that others have given it, with a pace and
// without; to a pod with the steering's bit.
func TestMarksStay(t *testing.T) {
	inNode(t, func(t *testing.T) {
		const foreign = 0x40
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		p, do := wire(t, "a", 1)
		check(t, errors.Join(d.SetNodeAddresses([]netip.Addr{wireNode}), d.UpdateTenant(one), d.UpdatePod(p)))
		server(t, do) // an error would be one more packet of ICMP
		seen := marks(t, "poda", foreign)
		node := rawSocket(t, unix.IPPROTO_UDP)
		check(t, unix.SetsockoptInt(node, unix.SOL_SOCKET, unix.SO_MARK, foreign))
		for _, rate := range []uint32{0, 50} {
			one.Connections.DirectPerSecond = rate
			check(t, d.UpdateTenant(one))
			was := seen()
			check(t, unix.Sendto(node, datagram(1001, 53), 0, &unix.SockaddrInet4{Addr: wirePod.As4()}))
			var sent error
			do(func() {
				back := &unix.SockaddrInet4{Addr: wireNode.As4()}
				sent = errors.Join(unix.Sendto(rawSocket(t, unix.IPPROTO_UDP), datagram(2001, 9), 0, back),
					unix.Sendto(rawSocket(t, unix.IPPROTO_ICMP), []byte{8, 0, 0, 0, 0, 1, 0, 1}, 0, back),
					unix.Sendto(rawSocket(t, unix.IPPROTO_TCP), slices.Concat(datagram(2002, 9)[:4], make([]byte, 8), []byte{5 << 4, 2}, make([]byte, 6)), 0, back))
			})
			check(t, sent)
			for protocol, n := range map[string]uint64{"UDP": 2, "ICMP": 1, "TCP": 1, "to the pod": 1} {
				eventually(t, protocol+" with its mark", func() bool { return seen()[protocol] == was[protocol]+n })
			}
		}
	})
}

// marks gives what comes from a veth a mark, and counts what still has it in the node's
// input, and what goes to the veth with it and the steering's.
func marks(t *testing.T, veth string, mark uint32) (seen func() map[string]uint64) {
	t.Helper()
	c, err := open(0)
	check(t, err)
	ahead := c.AddTable(&nftables.Table{Name: "ahead", Family: nftables.TableFamilyNetdev})
	input := c.AddTable(&nftables.Table{Name: "behind", Family: nftables.TableFamilyINet})
	hook := func(table *nftables.Table, at *nftables.ChainHook, priority nftables.ChainPriority, device string) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: "c" + device + string(rune('0'+*at)), Table: table, Type: nftables.ChainTypeFilter, Hooknum: at, Priority: &priority, Device: device})
	}
	first := hook(ahead, nftables.ChainHookIngress, chainPriority-1, veth)
	c.AddRule(&nftables.Rule{Table: ahead, Chain: first, Exprs: onlyMark(mark)})
	last := hook(ahead, nftables.ChainHookEgress, chainPriority+1, veth)
	c.AddRule(&nftables.Rule{Table: ahead, Chain: last, Exprs: join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, unix.IPPROTO_UDP), markIs(DefaultMark|mark), rule{counter()})})
	in := hook(input, nftables.ChainHookInput, 0, "")
	for _, protocol := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_TCP} {
		c.AddRule(&nftables.Rule{Table: input, Chain: in, Exprs: join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, protocol), markIs(mark), rule{counter()})})
	}
	check(t, c.Flush())
	return func() map[string]uint64 {
		counted := map[string]uint64{}
		for _, of := range []*nftables.Chain{in, last} {
			rules, err := c.GetRules(of.Table, of)
			check(t, err)
			for i, r := range rules {
				name := "to the pod"
				if of == in {
					name = []string{"UDP", "ICMP", "TCP"}[i]
				}
				counted[name] = r.Exprs[len(r.Exprs)-1].(*expr.Counter).Packets
			}
		}
		return counted
	}
}

// reached are the chains of single tenants' paces that a chain leads to.
func reached(t *testing.T, from string) map[string]bool {
	t.Helper()
	c, err := open(0)
	check(t, err)
	all, ours := map[string]bool{from: true}, map[string]bool{}
	for list := []string{from}; len(list) > 0; list = list[1:] {
		rules, err := c.GetRules(steering, &nftables.Chain{Name: list[0], Table: steering})
		check(t, err)
		for _, r := range rules {
			for _, e := range r.Exprs {
				if l, is := e.(*expr.Lookup); is && l.IsDestRegSet && l.DestRegister == unix.NFT_REG_VERDICT {
					t.Errorf("a packet of chain %s goes where the map %s says", list[0], l.SetName)
				}
				v, is := e.(*expr.Verdict)
				if !is || v.Chain == "" || all[v.Chain] {
					continue
				}
				all[v.Chain] = true
				list = append(list, v.Chain)
				if slices.ContainsFunc([]uint16{1, 2}, func(tenant uint16) bool { return isDirectChain(v.Chain, tenant) }) {
					ours[v.Chain[strings.IndexByte(v.Chain, '_')+1:]] = true
				}
			}
		}
	}
	return ours
}

// A pod leads to the chains of the pace of its own tenant only, and to none without one,
// also when tenant or pace change, whichever process does it.
func TestPodsLeadToTheirPace(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one, two := tenant(t, 1), tenant(t, 2)
		two.Connections.DirectPerSecond = 7
		a, b := pod(t, "a", 1, "10.0.0.1"), pod(t, "b", 2, "10.0.0.2")
		check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two), d.UpdatePod(a), d.UpdatePod(b)))
		lead := func(after string, p steer.Pod, want ...string) {
			t.Helper()
			in, out := podChains(uint32(p.Ifindex))
			for _, chain := range []string{in, out} {
				if got := slices.Sorted(maps.Keys(reached(t, chain))); !slices.Equal(got, want) {
					t.Errorf("after %s pod %s leads to the paces %v by %s, want %v", after, p.UID, got, chain, want)
				}
			}
		}
		pace := func(perSecond uint32) {
			t.Helper()
			one.Connections.DirectPerSecond = perSecond
			check(t, d.UpdateTenant(one))
		}
		next := func() {
			t.Helper()
			check(t, d.Close())
			d, err = Open(Options{})
			check(t, err)
		}
		lead("the beginning", a)
		lead("the beginning", b, "2_7")
		pace(50)
		lead("a pace", a, "1_50")
		pace(60)
		lead("another pace", a, "1_60")
		next()
		pace(70)
		lead("the next process's pace", a, "1_70")
		check(t, d.UpdatePod(a))
		lead("the next process", a, "1_70")
		check(t, d.UpdateTenant(two))
		a.Tenant = 2
		check(t, d.MovePod(a, nil))
		lead("a move", a, "2_7")
		check(t, d.ReleasePod("a", nil))
		lead("its release", a)
		a.Tenant = 1
		check(t, d.MovePod(a, nil))
		lead("its return", a, "1_70")
		pace(0)
		lead("no pace", a)
		pace(80)
		next()
		pace(0)
		lead("the next process's end of the pace", a)
		pace(80)
		check(t, d.DeleteTenant(1))
		lead("its tenant's end", a)
		lead("all", b, "2_7")
	})
}
