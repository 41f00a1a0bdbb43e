package netfilter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// sendFrame sends what isn't just a segment; it may be dropped.
func (f *far) sendFrame(frame []byte) {
	f.t.Helper()
	if err := unix.Sendto(f.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: f.ifindex}); !errors.Is(err, unix.ENOBUFS) {
		check(f.t, err)
	}
}

// withTCP is a segment's frame with another TCP header, or data behind it, and correct
// checksums.
func (s segment) withTCP(change func(tcp []byte) []byte) []byte {
	frame := s.frame()
	header := 40
	if s.from.Addr().Is4() {
		header = 20
	}
	ip := frame[ethernetHeader : ethernetHeader+header]
	tcp := change(bytes.Clone(frame[ethernetHeader+header:]))
	length := len(tcp)
	if s.from.Addr().Is4() {
		length += header
		binary.BigEndian.PutUint16(ip[2:], uint16(length))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(length))
	}
	tcp[16], tcp[17] = 0, 0
	even := append(bytes.Clone(tcp), make([]byte, len(tcp)%2)...)
	binary.BigEndian.PutUint16(tcp[16:], checksum(s.from.Addr().AsSlice(), s.to.Addr().AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(tcp))}, even))
	return append(frame[:ethernetHeader+header:ethernetHeader+header], tcp...)
}

// The peer of a connection in the clear can have it end so that nothing tells of it but the
// pod's kernel: that one is asked before the next with its ports.
func TestBeginsAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		wire, err := newFar(t, "poda")
		check(t, err)
		syn := f.segment("c:7000", "a:3306", flagSYN)
		question := f.segment("c:7000", "a:3306", flagACK)
		written := func() bool {
			return writtenDown(t, p.d, syn.to.Addr())[model.Flow{Pod: syn.to, Peer: syn.from}] > endedLinger
		}
		for _, options := range []int{0, 20, 40} {
			of := func(flags byte, acknowledged uint32) []byte {
				return syn.withTCP(func(tcp []byte) []byte {
					binary.BigEndian.PutUint32(tcp[4:], 0xfffefdfc)
					binary.BigEndian.PutUint32(tcp[8:], acknowledged)
					tcp[12], tcp[13] = byte(5+options/4)<<4, flags
					return append(tcp, bytes.Repeat([]byte{1}, options)...)
				})
			}
			p.pod.gets("question", question, func() { wire.sendFrame(of(flagSYN|0xc0, 0x01020304)) })
			if got, want := p.pod.frames[len(p.pod.frames)-1], of(flagACK, 0); !bytes.Equal(got, want) {
				t.Errorf("the pod is asked by %x, want %x", got, want)
			}
		}
		// Of data a connection would take what fits.
		before := p.dropped(t, 2).Midstream
		for i, data := range []string{"x", "xx", "xxxx"} {
			wire.sendFrame(syn.withTCP(func(tcp []byte) []byte { return append(tcp, data...) }))
			eventually(t, "drop of a SYN with data", func() bool { return p.dropped(t, 2).Midstream == before+uint64(i)+1 })
		}
		if n := p.pod.has(syn); n > 0 {
			t.Errorf("the pod gets %d SYNs", n)
		}
		if n := p.pod.has(question); n != 3 {
			t.Errorf("the pod is asked %d times, want 3", n)
		}

		// It lives: the peer, if it has none, resets.
		answer := question.back(flagACK)
		wire.gets("answer of a connection", answer, func() { p.pod.send(answer) })
		if !written() {
			t.Error("what a SYN asked for has ended")
		}
		// It doesn't, and the next is a new one.
		reset := question.back(flagRST)
		wire.gets("reset of the pod's kernel", reset, func() { p.pod.send(reset) })
		p.tenants[2].gets("new connection", syn, func() { wire.send(syn) })
		if n := p.pod.has(syn); n > 0 {
			t.Errorf("the pod gets %d SYNs behind its reset", n)
		}
	})
}

// Whose SYN was lost, or the answer, sends it again: it goes where the first one went, until
// something else has come.
func TestSYNComesAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family, p ports) {
		wire, err := newFar(t, "poda")
		check(t, err)
		exclude := func(exclusions ...steer.Exclusion) {
			t.Helper()
			p.a.Exclusions = exclusions
			check(t, p.d.UpdatePod(p.a))
		}
		inbound := steer.Exclusion{Port: 8080, Inbound: true}
		// Of the peer's.
		syn, last := f.segment("c:7001", "a:8080", flagSYN), f.segment("c:7001", "a:8080", flagACK)
		eventually(t, "SYN that comes again", func() bool { // a busy machine may take too long
			exclude(inbound)
			wire.send(syn)
			exclude()
			before := p.pod.has(syn)
			wire.send(syn)
			return p.pod.has(syn) > before
		})
		exclude(inbound, steer.Exclusion{Port: 7002})
		p.pod.gets("SYN that comes once more", syn, func() { wire.send(syn) })
		answer := syn.back(flagSYN | flagACK)
		wire.gets("answer", answer, func() { p.pod.send(answer) })
		p.pod.gets("SYN whose answer was lost", syn, func() { wire.send(syn) })
		p.pod.gets("end of the handshake", last, func() { wire.send(last) })
		asked := func(when string) {
			t.Helper()
			for _, e := range elementsOf(t, p.d.sets[setBeginning+f.version]) {
				if string(e.Key) == string(flowKey(model.Flow{Pod: syn.to, Peer: syn.from})) && e.Expires > time.Second {
					t.Errorf("%s: a SYN may come again for %s", when, e.Expires)
				}
			}
			before := p.pod.has(last)
			eventually(t, "question "+when, func() bool {
				wire.send(syn)
				return p.pod.has(last) > before
			})
		}
		asked("when it has begun")

		// Of the pod's: both may call at once.
		syn, last = f.segment("c:7002", "a:40020", flagSYN), f.segment("c:7002", "a:40020", flagACK)
		wire.gets("SYN of the pod's", syn.back(flagSYN), func() { p.pod.send(syn.back(flagSYN)) })
		p.pod.gets("SYN of who is called", syn, func() { wire.send(syn) })
		answer = f.segment("c:7002", "a:40020", flagSYN|flagACK)
		p.pod.gets("answer to the pod's", answer, func() { wire.send(answer) })
		asked("when the pod's has been answered")

		// It was sent too long ago.
		syn, last = f.segment("c:7003", "a:8080", flagSYN), f.segment("c:7003", "a:8080", flagACK)
		key := []nftables.SetElement{{Key: flowKey(model.Flow{Pod: syn.to, Peer: syn.from})}}
		eventually(t, "question when it is late", func() bool {
			wire.send(syn)
			c, err := open(0)
			check(t, err)
			check(t, c.SetDeleteElements(p.d.sets[setBeginning+f.version], key))
			if err := c.Flush(); !errors.Is(err, unix.ENOENT) {
				check(t, err)
			}
			wire.send(syn)
			return p.pod.has(last) > 0
		})
	})
}
