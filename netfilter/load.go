package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	routes "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// How often a tenant's room is compared with its sockets: seldom, and more often when
// more than half of it is taken.
const (
	checkSeldom = 10 * time.Second
	checkOften  = time.Second
	// overfullLeast is how far at least a set is beyond its size when it is replaced.
	overfullLeast = 16
)

// Connections is how many connections a tenant's processes have accepted and not
// closed. Those that both ends have said goodbye to aren't among them.
func (d *Datapath) Connections(index uint16) (n int64, err error) {
	d.mu.Lock()
	t := d.tenants[index]
	d.mu.Unlock()
	if t == nil {
		return 0, fmt.Errorf("connections of tenant %d: %w", index, steer.ErrUnknownTenant)
	}
	err = inTenant(t.netns, func(ns int) error {
		all, err := accepted(ns)
		n = int64(len(all))
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("connections of tenant %d: %w", index, err)
	}
	return n, nil
}

// CheckConnections compares the room that a tenant's connections take with the sockets
// in its network namespace, and corrects what is wrong: room that nobody has any more,
// after a peer's RST, say, and connections without any, from before there was a bound. A
// set that has grown beyond its size, which no rule holds to it any more, is replaced.
// It returns when to call it again.
func (d *Datapath) CheckConnections(index uint16, netns string) (again time.Duration, err error) {
	s := d.roomsOf(index, netns)
	if s.concurrent == 0 {
		return checkSeldom, nil
	}
	again = checkSeldom
	// Without the lock: everybody would wait for who has many connections.
	err = inTenant(netns, func(ns int) error {
		c, err := open(ns)
		if err != nil {
			return err
		}
		found, err := checkRooms(c, s)
		if !d.hasRooms(index, netns, s) {
			again = checkOften
			return nil
		}
		if err != nil {
			return err
		}
		if found.connections > int(s.concurrent/2) {
			again = checkOften
		}
		if found.overfull {
			again = checkOften
			return d.renewRooms(index, s, found.connections)
		}
		return d.correctRooms(index, netns, ns, s, found.wrong)
	})
	if err != nil {
		return again, fmt.Errorf("check connections of tenant %d: %w", index, err)
	}
	return again, nil
}

// roomsOf is what a tenant's table says while the tenant has a network namespace, as a path.
func (d *Datapath) roomsOf(index uint16, netns string) (s innerState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.tenants[index]; t != nil && t.netns == netns {
		s = t.have
	}
	return s
}

// hasRooms reports whether a tenant still has the sets that it had.
func (d *Datapath) hasRooms(index uint16, netns string, was innerState) bool {
	return d.roomsOf(index, netns).sameRooms(was)
}

// correctRooms has the rules of a tenant correct its sets, unless it has others by now.
func (d *Datapath) correctRooms(index uint16, netns string, ns int, was innerState, wrong []correction) error {
	err := correct(ns, wrong)
	// The rules may have gone with the bound, or the tenant, just now.
	if errors.Is(err, errNotTaken) && !d.hasRooms(index, netns, was) {
		return nil
	}
	return err
}

// renewRooms has a tenant's rules write into other sets, into which the connections that
// are open are written first.
func (d *Datapath) renewRooms(index uint16, was innerState, connections int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.tenants[index]; t == nil || !t.have.sameRooms(was) {
		return nil
	}
	d.log.Warn("A tenant had more connections than there is room for; its room is made anew", "tenant", index, "connections", connections, "most", was.concurrent)
	return d.setState(index, func(s *innerState) { s.renewed = 1 - was.renewed })
}

// roomCheck is what checkRooms has found.
type roomCheck struct {
	// connections had room, or have a socket, if those are more.
	connections int
	wrong       []correction
	// overfull: a set is beyond its size.
	overfull bool
}

// checkRooms finds out what is wrong. Rules write at the same time: it may be right
// afterwards, and the other way round, until the next time. Room that is taken away too
// early is found again by the next packet, or at the next time.
func checkRooms(c *nftables.Conn, s innerState) (found roomCheck, err error) {
	have, free := map[string]time.Duration{}, map[string]int{}
	for _, set := range s.allRooms() {
		elements, err := c.GetSetElements(set)
		if err != nil {
			return found, fmt.Errorf("read set %s: %w", set.Name, err)
		}
		before := len(have)
		for _, e := range elements {
			have[string(e.Key)] = e.Expires
		}
		taken := len(have) - before
		free[set.Name] = int(set.Size) - taken
		// What comes while it is read is read beside what has gone since.
		found.overfull = found.overfull || taken > int(set.Size+set.Size/8+overfullLeast)
	}
	// Read later than the room, so that what gets a socket meanwhile keeps it.
	sockets, err := accepted(c.NetNS)
	if err != nil {
		return found, err
	}
	found.connections = max(len(have), len(sockets))
	for k, expires := range have {
		switch {
		case !sockets[k] && expires > handshake:
			found.wrong = append(found.wrong, correction{correctNobodys, k})
		case sockets[k] && expires < flowIdle/2:
			found.wrong = append(found.wrong, correction{correctOthers, k})
		}
		delete(sockets, k)
	}
	for _, p := range s.place(sockets, free) {
		what := byte(correctOthers)
		if p.own {
			what = correctPods
		}
		found.wrong = append(found.wrong, correction{what, p.connection})
	}
	return found, nil
}

// opened reports whether one of the tenant's own pods opened a connection.
func (s innerState) opened(key []byte) bool {
	a, _ := netip.AddrFromSlice(key[:16])
	return s.pods[a.Unmap()]
}

// accepted returns the connections, as keys of connectionSet, that were accepted in a
// network namespace by sockets that are transparent: such listen that SetListeners has
// made so, and nobody in there can. Of one that both ends have sent a FIN of nothing is
// returned.
func accepted(netns int) (map[string]bool, error) {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer c.Close()
	// struct inet_diag_req_v2, and before the attributes struct inet_diag_msg. A proxy
	// listens on [::], so that what comes by IPv4 is in the list of IPv6, too.
	const requestLength, answerLength = 56, 72
	request := make([]byte, requestLength)
	request[0], request[1] = unix.AF_INET6, unix.IPPROTO_TCP
	states := uint32(1<<routes.TCP_ESTABLISHED | 1<<routes.TCP_FIN_WAIT1 | 1<<routes.TCP_FIN_WAIT2 | 1<<routes.TCP_CLOSE_WAIT)
	copy(request[4:], native(states))
	answers, err := c.Execute(netlink.Message{Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump}, Data: request})
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	all := map[string]bool{}
	for _, m := range answers {
		if len(m.Data) < answerLength {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(m.Data[answerLength:])
		if err != nil {
			return nil, fmt.Errorf("read a socket: %w", err)
		}
		// Its own port and the peer's, its own address and the peer's.
		id := m.Data[4:]
		for attrs.Next() {
			const transparent = 1 << 5 // of struct inet_diag_sockopt's first byte
			if b := attrs.Bytes(); attrs.Type() == routes.INET_DIAG_SOCKOPT && len(b) > 0 && b[0]&transparent != 0 {
				port := binary.BigEndian.Uint16
				all[string(key(id[20:36], portKey(port(id[2:])), id[4:20], portKey(port(id))))] = true
			}
		}
		if err := attrs.Err(); err != nil {
			return nil, fmt.Errorf("read a socket: %w", err)
		}
	}
	return all, nil
}
