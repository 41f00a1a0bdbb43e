package netfilter

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

const flagFIN, flagSYN, flagRST, flagACK = 1, 2, 4, 16

// far is a veth's end that isn't the node's: it sends and gets TCP of any addresses and
// ports.
type far struct {
	t           *testing.T
	fd, ifindex int
	got         []segment
	frames      [][]byte // those of got
}

type segment struct {
	from, to netip.AddrPort
	flags    byte
}

func (s segment) back(flags byte) segment { return segment{s.to, s.from, flags} }

// farOfTenant and farOfPod set a veth up.
func farOfTenant(t *testing.T, of steer.Tenant) (f *far) {
	t.Helper()
	host, err := netlink.LinkByIndex(of.HostIfindex)
	check(t, err)
	check(t, netlink.LinkSetUp(host))
	inNetns(t, of.Netns, func() error {
		f, err = newFar(t, host.Attrs().Name+"x")
		return err
	})
	return f
}

func farOfPod(t *testing.T, p steer.Pod) *far {
	t.Helper()
	host, err := netlink.LinkByIndex(p.Ifindex)
	check(t, err)
	check(t, netlink.LinkSetUp(host))
	f, err := newFar(t, host.Attrs().Name+"x")
	check(t, err)
	return f
}

func newFar(t *testing.T, name string) (*far, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	all := binary.NativeEndian.Uint16(big16(unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &far{t: t, fd: fd, ifindex: link.Attrs().Index},
		errors.Join(netlink.LinkSetUp(link), unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}))
}

func (f *far) send(s segment) {
	f.t.Helper()
	check(f.t, unix.Sendto(f.fd, s.frame(), 0, &unix.SockaddrLinklayer{Ifindex: f.ifindex}))
}

// frame is for one host, and has correct checksums: the kernel answers no other.
func (s segment) frame() []byte {
	tcp := binary.BigEndian.AppendUint16(big16(s.from.Port()), s.to.Port())
	tcp = append(tcp, []byte{3: 1, 8: 5 << 4, 9: s.flags, 15: 0}...)
	source, destination := s.from.Addr().AsSlice(), s.to.Addr().AsSlice()
	binary.BigEndian.PutUint16(tcp[16:], checksum(source, destination, []byte{0, unix.IPPROTO_TCP, 0, byte(len(tcp))}, tcp))
	etherType, ip := uint16(unix.ETH_P_IPV6), slices.Concat([]byte{0: 6 << 4, 5: byte(len(tcp)), 6: unix.IPPROTO_TCP, 7: 64}, source, destination)
	if s.from.Addr().Is4() {
		etherType, ip = unix.ETH_P_IP, slices.Concat([]byte{0: 4<<4 | 5, 3: byte(20 + len(tcp)), 8: 64, 9: unix.IPPROTO_TCP, 11: 0}, source, destination)
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	}
	return slices.Concat([]byte{2, 0, 0, 0, 0, 2}, []byte{2, 0, 0, 0, 0, 1}, big16(etherType), ip, tcp)
}

func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for b := slices.Concat(parts...); len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// has reports how often a segment has come, beside flags for congestion control.
func (f *far) has(s segment) (n int) {
	f.t.Helper()
	for b := make([]byte, 2048); ; {
		length, from, err := unix.Recvfrom(f.fd, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		check(f.t, err)
		if at, ok := from.(*unix.SockaddrLinklayer); !ok || at.Pkttype == unix.PACKET_OUTGOING || length < ethernetHeader {
			continue
		}
		ip := b[ethernetHeader:length]
		from4, to4, ok := endsOf(ip)
		if !ok {
			continue
		}
		header := 40
		if from4.Addr().Is4() {
			header = 20
		}
		f.got = append(f.got, segment{from4, to4, ip[header+13]})
		f.frames = append(f.frames, slices.Clone(b[:length]))
	}
	for _, got := range f.got {
		if got == s {
			n++
		}
	}
	return n
}

// gets waits for a segment that hasn't come before.
func (f *far) gets(what string, s segment, send func()) {
	f.t.Helper()
	before := f.has(s)
	send()
	eventually(f.t, what, func() bool { return f.has(s) > before })
}

// ports are a pod that has left tenant 1 for tenant 2, a pod of tenant 2, and tenants 1
// to 3, with their far ends.
type ports struct {
	d       *Datapath
	a, b    steer.Pod
	pod     *far
	tenants [4]*far
	// held are connections of the pod with tenant 1, clear one in the clear: of the pod's
	// end and of the peer's.
	held, clear []model.Flow
}

func flowsAt(addressOf func(string) string, pairs ...[2]string) (list []model.Flow) {
	for _, p := range pairs {
		list = append(list, model.Flow{Pod: netip.MustParseAddrPort(addressOf(p[0])), Peer: netip.MustParseAddrPort(addressOf(p[1]))})
	}
	return list
}

// addressOf replaces the names of hosts.
func (f family) addressOf(at string) string {
	hosts := map[byte]string{'a': "10.0.0.1", 'b': "10.0.0.2", 'c': "10.0.0.9"}
	if f.version == "6" {
		hosts = map[byte]string{'a': "[fd00::1]", 'b': "[fd00::2]", 'c': "[fd00::9]"}
	}
	return hosts[at[0]] + at[1:]
}

func (f family) segment(from, to string, flags byte) segment {
	return segment{netip.MustParseAddrPort(f.addressOf(from)), netip.MustParseAddrPort(f.addressOf(to)), flags}
}

// eachFamily calls f with such pods.
func eachFamily(t *testing.T, test func(t *testing.T, f family, p ports)) {
	for _, f := range families {
		t.Run("IPv"+f.version, func(t *testing.T) {
			inNode(t, func(t *testing.T) {
				d, err := Open(Options{})
				check(t, err)
				p := ports{d: d}
				for index := uint16(1); index <= 3; index++ {
					of := tenant(t, index)
					check(t, d.UpdateTenant(of))
					p.tenants[index] = farOfTenant(t, of)
				}
				p.a = pod(t, "a", 1, netip.MustParseAddrPort(f.addressOf("a:1")).Addr().String())
				p.b = pod(t, "b", 2, netip.MustParseAddrPort(f.addressOf("b:1")).Addr().String())
				p.pod = farOfPod(t, p.a)
				p.clear = flowsAt(f.addressOf, [2]string{"a:3306", "c:7000"})
				p.held = flowsAt(f.addressOf, [2]string{"a:80", "c:5000"}, [2]string{"a:40000", "c:5432"}, [2]string{"a:80", "b:6000"}, [2]string{"a:40001", "b:80"})
				stay := func(flows []model.Flow) model.FlowReader {
					return func(uint16) ([]model.Flow, error) { return flows, nil }
				}
				check(t, errors.Join(d.UpdatePod(p.b), d.MovePod(p.a, stay(p.clear))))
				p.a.Tenant = 2
				check(t, d.MovePod(p.a, stay(p.held)))
				test(t, f, p)
			})
		})
	}
}

func (p ports) dropped(t *testing.T, tenant uint16) steer.Drops {
	t.Helper()
	all, err := p.d.Counters()
	check(t, err)
	return all[tenant].Dropped
}

// A tenant is told at once that it can't have the ports of a connection that stayed
// elsewhere, where it could have had others; nobody else is told.
func TestTakenPortsAreRefused(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		refused := map[uint16]uint64{}
		for _, c := range []struct {
			what     string
			tenant   uint16
			from, to string
		}{
			{"delivers to the pod that it has", 2, "c:5000", "a:80"},
			{"sends as the pod that it has", 2, "a:40000", "c:5432"},
			{"delivers what its other pod has sent", 2, "b:6000", "a:80"},
			{"sends to who is called in the clear", 2, "a:3306", "c:7000"},
			{"delivers to the pod that it had, in the clear", 1, "c:7000", "a:3306"},
			{"sends as the pod that it had, in the clear", 1, "a:3306", "c:7000"},
		} {
			s := f.segment(c.from, c.to, flagSYN)
			p.tenants[c.tenant].gets("refusal for who "+c.what, s.back(flagRST|flagACK), func() { p.tenants[c.tenant].send(s) })
			refused[c.tenant]++
			if n := p.pod.has(s); n > 0 {
				t.Errorf("who %s reaches the pod", c.what)
			}
		}
		for tenant, want := range refused {
			if d := p.dropped(t, tenant); d.PortsTaken != want || d.Foreign != 0 {
				t.Errorf("tenant %d: dropped are %+v, want %d for taken ports", tenant, d, want)
			}
		}

		// Free ports, its own, and those that its pod has at the other end.
		for _, c := range []struct {
			tenant   uint16
			from, to string
		}{{2, "c:5001", "a:80"}, {1, "c:5000", "a:80"}, {1, "c:5002", "a:80"}, {2, "b:80", "a:40002"}} {
			s := f.segment(c.from, c.to, flagSYN)
			p.pod.gets("connection to the pod", s, func() { p.tenants[c.tenant].send(s) })
		}
		b := farOfPod(t, p.b)
		s := f.segment("a:40001", "b:80", flagSYN)
		b.gets("connection from a pod's taken port to the tenant's other pod", s, func() { p.tenants[2].send(s) })

		// Not to who has nothing to do with the pod, nor in the middle of a connection.
		foreign := uint64(0)
		for _, c := range []struct {
			tenant   uint16
			from, to string
			flags    byte
		}{
			{3, "c:5000", "a:80", flagSYN}, {3, "a:40000", "c:5432", flagSYN}, {3, "c:7000", "a:3306", flagSYN},
			{2, "c:5000", "a:80", flagACK}, {2, "a:40000", "c:5432", flagSYN | flagACK},
		} {
			p.tenants[c.tenant].send(f.segment(c.from, c.to, c.flags))
			foreign++
		}
		eventually(t, "count of what is foreign", func() bool {
			return p.dropped(t, 2).Foreign+p.dropped(t, 3).Foreign == foreign
		})
		if d2, d3 := p.dropped(t, 2), p.dropped(t, 3); d2.PortsTaken != refused[2] || d3.PortsTaken != 0 {
			t.Errorf("%d and %d more are refused", d2.PortsTaken-refused[2], d3.PortsTaken)
		}
		if n := len(p.tenants[3].got); n > 0 {
			t.Errorf("who has nothing to do with the pod gets %d answers", n)
		}
	})
}

// What a pod opens goes to its tenant, whatever the tenant that it has left has with
// these ports; but a SYN goes where it went before, and what is in the clear stays there.
func TestPodTakesItsPorts(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		written := func() map[model.Flow]uint16 {
			t.Helper()
			flows, err := p.d.flows(false)
			check(t, err)
			of := map[model.Flow]uint16{}
			for _, f := range flows {
				of[f.Flow] = f.tenant
			}
			return of
		}
		mustBe := func(when string, taken ...model.Flow) {
			t.Helper()
			have := written()
			for _, flow := range p.held {
				if of, ok := have[flow]; ok == slices.Contains(taken, flow) || ok && of != 1 {
					t.Errorf("%s: %v is tenant %d's, %v", when, flow, of, ok)
				}
			}
			if of, ok := have[p.clear[0]]; !ok || of != 0 {
				t.Errorf("%s: what is in the clear is tenant %d's, %v", when, of, ok)
			}
		}
		mustBe("in the beginning")
		ack := f.segment("a:40000", "c:5432", flagACK)
		p.tenants[1].gets("packet of what stayed", ack, func() { p.pod.send(ack) })
		mustBe("in the middle")
		syn := f.segment("a:40000", "c:5432", flagSYN)
		p.tenants[2].gets("new connection with the ports of another", syn, func() { p.pod.send(syn) })
		p.tenants[2].gets("its next packet", ack, func() { p.pod.send(ack) })
		mustBe("with a new connection", p.held[1])
		if n := p.tenants[1].has(syn); n > 0 {
			t.Errorf("the former tenant gets %d SYNs", n)
		}
		answer := syn.back(flagSYN | flagACK)
		p.pod.gets("answer", answer, func() { p.tenants[2].send(answer) })

		clear := f.segment("a:3306", "c:7000", flagSYN)
		p.pod.send(clear)
		// Behind it, so that it is through.
		syn = f.segment("a:40009", "c:5432", flagSYN)
		p.tenants[2].gets("new connection", syn, func() { p.pod.send(syn) })
		if n := p.tenants[1].has(clear) + p.tenants[2].has(clear); n > 0 {
			t.Errorf("tenants get %d SYNs with ports that are in the clear", n)
		}
		mustBe("with a SYN in the clear", p.held[1])

		// On its way while the pod moves.
		late := f.segment("a:40010", "c:5432", flagSYN)
		p.a.Tenant = 3
		check(t, p.d.MovePod(p.a, func(uint16) ([]model.Flow, error) {
			p.tenants[2].gets("SYN of a pod that moves", late, func() { p.pod.send(late) })
			return nil, nil
		}))
		p.tenants[2].gets("SYN that is sent again", late, func() { p.pod.send(late) })
		p.tenants[3].gets("new connection", syn, func() { p.pod.send(syn) })
		if n := p.tenants[3].has(late); n > 0 {
			t.Errorf("the pod's tenant gets %d SYNs that went to its former one before", n)
		}
		// It has ended, and the former tenant takes up its ports.
		check(t, p.d.deleteFlows(func(of storedFlow) bool { return of.Pod == late.from }))
		own := late.back(flagSYN)
		p.pod.gets("connection of a former tenant", own, func() { p.tenants[2].send(own) })
		p.tenants[3].gets("SYN with ports that the former tenant has taken up", late, func() { p.pod.send(late) })
	})
}

// What has ended at a former tenant is remembered for a while, on either side of it: it
// goes on to open what may still come of that.
func TestEndedFlowsOfAFormerTenantStay(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		wire, err := newFar(t, "poda")
		check(t, err)
		// keeps is of the flow of a packet to the pod.
		keeps := func(when string, s segment, least, most time.Duration) {
			t.Helper()
			expires := writtenDown(t, p.d, s.to.Addr())[model.Flow{Pod: s.to, Peer: s.from}]
			if expires <= least || expires > most {
				t.Errorf("%s: kept for %s, want %s to %s", when, expires, least, most)
			}
		}
		for _, c := range []struct {
			what     string
			from, to string
			send     *far // to the pod
			gets     *far // what is sent there
			back     func(segment)
		}{
			{"the pod has with it", "c:5000", "a:80", p.tenants[1], p.pod, func(s segment) {
				p.tenants[1].gets("end of the pod's", s, func() { p.pod.send(s) })
			}},
			{"it has as the pod", "c:5432", "a:40000", wire, p.tenants[1], func(s segment) {
				p.tenants[1].send(s)
				eventually(t, "end of the tenant's", func() bool {
					ended := p.d.sets[setEnded+f.version]
					return slices.ContainsFunc(elementsOf(t, ended), func(e nftables.SetElement) bool {
						return string(e.Key) == string(flowKey(model.Flow{Pod: s.from, Peer: s.to}))
					})
				})
			}},
		} {
			end := f.segment(c.from, c.to, flagFIN|flagACK)
			c.gets.gets("end of the peer's", end, func() { c.send.send(end) })
			keeps("half of what "+c.what, end, alone, endedLinger)
			c.back(end.back(flagFIN | flagACK))
			last := f.segment(c.from, c.to, flagACK)
			c.gets.gets("last packet", last, func() { c.send.send(last) })
			keeps("what "+c.what, end, alone, endedLinger)
		}
	})
}

// A pod that dials the tunnels' port without end is refused at a pace, and leaves room for
// refusals of others.
func TestRefusalsHaveAPace(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		const dials = 8 * refusedPerSecond
		began := time.Now()
		refused := func() (n int) {
			p.pod.has(segment{})
			for _, s := range p.pod.got {
				if s.flags == flagRST|flagACK && s.from.Port() == portInbound {
					n++
				}
			}
			return n
		}
		for i := range dials {
			p.pod.send(f.segment("a:"+strconv.Itoa(5000+i), "c:15008", flagSYN))
		}
		eventually(t, "count of all dials", func() bool {
			all, err := p.d.PodCounters()
			check(t, err)
			return all["a"].Dropped.Unsteered == dials
		})
		b := farOfPod(t, p.b)
		other := f.segment("b:5000", "c:15008", flagSYN)
		b.gets("refusal for another pod", other.back(flagRST|flagACK), func() { b.send(other) })
		eventually(t, "refusals of the first second", func() bool { return refused() >= refusedPerSecond })
		most := refusedPerSecond + int(time.Since(began).Seconds()*refusedPerSecond) + 1
		if n := refused(); n > most {
			t.Errorf("%d of %d dials are refused, want %d at most", n, dials, most)
		}
	})
}
