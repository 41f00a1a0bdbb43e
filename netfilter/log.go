package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// logGroup is the group of nfnetlink_log of all network namespaces. Others on a node
// take low numbers.
const logGroup = 0xb1d0

// Of one veth: its denials, so many as eBPF's, and its connections in the clear. What
// is behind other veths is told of by the same socket.
const (
	deniedPerSecond = 100
	directPerSecond = 1000
)

// paceKept is how long a veth's pace is remembered.
const paceKept = time.Minute

// What the rules say of a packet that they log: a prefix, and of a denial its reason
// behind it.
const (
	prefixOpened       = "opened"
	prefixAnswered     = "answered"
	prefixDirectOpened = "direct opened"
	prefixDirectClosed = "direct closed"
	prefixDenied       = "denied "
)

func deniedPrefix(reason string) string { return prefixDenied + reason }

// reasonNames are the fields of steer.Drops that the node's rules count.
var reasonNames = [dropReasons]string{dropSpoofed: "Spoofed", dropFragment: "Fragment", dropMalformed: "Malformed", dropNoTenant: "NoTenant",
	dropNotThePod: "NotThePod", dropDeliver: "Deliver", dropForeign: "Foreign", dropProtocol: "Protocol", dropMidstream: "Midstream", dropFlowsFull: "FlowsFull",
	dropUnsteered: "Unsteered", dropDirectTooFast: "DirectTooFast", dropPortsTaken: "PortsTaken"}

// connectionPrefix is for what a tenant's table counts under a port.
func connectionPrefix(port uint16) string {
	switch port {
	case plainTextPort:
		return deniedPrefix("PlainText")
	case refusedPort:
		return deniedPrefix("Refused")
	case tooFastPort:
		return deniedPrefix("TooFast")
	case tooManyPort:
		return deniedPrefix("TooMany")
	}
	return prefixOpened
}

// logged tells of the packet, if anybody listens.
func logged(prefix string) rule {
	return rule{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: logGroup, Data: []byte(prefix)}}
}

// isAnswer matches what answers a SYN.
func isAnswer() rule { return join(flags(0x17), equal(regTemp, 0x12)) }

// tell are the rules of a chain that tells of the packet as often as its veth may, and
// otherwise counts that it doesn't.
func tell(device func(uint32) rule, pace string, perSecond uint32, prefix string) []rule {
	return []rule{
		join(device(regKey), keepsPace(pace, perSecond), logged(prefix), verdict(expr.VerdictReturn, "")),
		join(device(regKey), put(setUntold, regKey, 0, 0, counter())),
	}
}

// keepsPace matches so many packets a second of each key.
func keepsPace(set string, perSecond uint32) rule {
	return put(set, regKey, 0, paceKept, &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: perSecond})
}

func tellChain(reason int, out bool) string { return "tell_" + dropChain(reason, out) }

// Of linux/netfilter/nfnetlink_log.h.
const (
	logPacket, logConfigure        = 0, 1
	logHeader, logInDev, logOutDev = 1, 4, 5
	logPayload, logPrefix          = 9, 10
	configureCommand, commandBind  = 1, 1
	configureMode, modePacket      = 2, 2
	configureThreshold             = 5
)

// logBytes is how much of a packet is told: its headers, unless somebody means to
// hide them.
const logBytes = 256

// bindLog has the socket's network namespace tell of what its rules log, each packet
// at once.
func bindLog(c *netlink.Conn) error {
	configure := func(flags netlink.HeaderFlags, attrs ...netlink.Attribute) (netlink.Message, error) {
		b, err := netlink.MarshalAttributes(attrs)
		header := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, logGroup)
		return netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_ULOG<<8 | logConfigure, Flags: netlink.Request | flags}, Data: append(header, b...)}, err
	}
	bind, err := configure(netlink.Acknowledge, netlink.Attribute{Type: configureCommand, Data: []byte{commandBind}})
	if err != nil {
		return err
	}
	if _, err := c.Execute(bind); errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EPERM) {
		return fmt.Errorf("take group %d of nfnetlink_log, which another process has: %w", logGroup, err)
	} else if err != nil {
		return fmt.Errorf("take group %d of nfnetlink_log: %w", logGroup, err)
	}
	// Not acknowledged: packets may come before.
	rest, err := configure(0, netlink.Attribute{Type: configureMode, Data: append(binary.BigEndian.AppendUint32(nil, logBytes), modePacket, 0)},
		attr32(configureThreshold, 1))
	if err != nil {
		return err
	}
	_, err = c.Send(rest)
	return err
}

// loggedPacket is what nfnetlink_log tells.
type loggedPacket struct {
	prefix   string
	from, to netip.AddrPort
	// veth is where it came in, or with egress where it went out.
	veth   uint32
	egress bool
}

// parseLog reads a message; ok is false if it isn't of a packet of TCP that can be
// read.
func parseLog(m syscall.NetlinkMessage) (p loggedPacket, ok bool) {
	if m.Header.Type != unix.NFNL_SUBSYS_ULOG<<8|logPacket || len(m.Data) < 4 {
		return p, false
	}
	device := m.Data[0] == unix.NFPROTO_NETDEV
	attrs, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return p, false
	}
	attrs.ByteOrder = binary.BigEndian
	var payload []byte
	var in, out uint32
	for attrs.Next() {
		switch attrs.Type() {
		case logHeader:
			if b := attrs.Bytes(); len(b) >= 3 {
				p.egress = device && b[2] == unix.NF_NETDEV_EGRESS
			}
		case logInDev:
			in = attrs.Uint32()
		case logOutDev:
			out = attrs.Uint32()
		case logPrefix:
			p.prefix = strings.TrimRight(attrs.String(), "\x00")
		case logPayload:
			payload = attrs.Bytes()
		}
	}
	if attrs.Err() != nil {
		return p, false
	}
	if p.veth = in; p.egress {
		p.veth = out
		payload = payload[min(ethernetHeader, len(payload)):]
	}
	p.from, p.to, ok = endsOf(payload)
	return p, ok
}

// endsOf reads the ends of a packet of TCP, from its IP header on.
func endsOf(b []byte) (from, to netip.AddrPort, ok bool) {
	if len(b) < 20 {
		return from, to, false
	}
	var source, destination netip.Addr
	var next byte
	switch b[0] >> 4 {
	case 4:
		source, _ = netip.AddrFromSlice(b[12:16])
		destination, _ = netip.AddrFromSlice(b[16:20])
		next, b = b[9], b[min(int(b[0]&0xf)*4, len(b)):]
	case 6:
		if len(b) < 40 {
			return from, to, false
		}
		source, _ = netip.AddrFromSlice(b[8:24])
		destination, _ = netip.AddrFromSlice(b[24:40])
		next, b = b[6], b[40:]
		for next == unix.IPPROTO_HOPOPTS || next == unix.IPPROTO_ROUTING || next == unix.IPPROTO_DSTOPTS || next == unix.IPPROTO_FRAGMENT {
			if len(b) < 8 {
				return from, to, false
			}
			length := 8
			if next != unix.IPPROTO_FRAGMENT {
				length += int(b[1]) * 8
			}
			next, b = b[0], b[min(length, len(b)):]
		}
	}
	if next != unix.IPPROTO_TCP || len(b) < 4 {
		return from, to, false
	}
	return netip.AddrPortFrom(source, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(destination, binary.BigEndian.Uint16(b[2:])), true
}

// kindOf is what a prefix says.
func kindOf(prefix string) (kind steer.EventKind, reason string) {
	switch reason, denied := strings.CutPrefix(prefix, prefixDenied); {
	case denied:
		return steer.Denied, reason
	case prefix == prefixDirectClosed:
		return steer.Closed, ""
	}
	return steer.Opened, ""
}
