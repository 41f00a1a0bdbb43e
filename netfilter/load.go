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
)

// Connections is how many connections a tenant's processes have accepted and not
// closed. Those that both ends have said goodbye to aren't among them.
func (d *Datapath) Connections(index uint16) (n int64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.tenants[index]
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
// after a peer's RST, say, and connections without any, from before there was a bound.
// It returns when to call it again.
func (d *Datapath) CheckConnections(index uint16, netns string) (again time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.tenants[index]
	if t == nil || t.have.concurrent == 0 {
		return checkSeldom, nil
	}
	again = checkSeldom
	err = inTenant(netns, func(ns int) error {
		c, err := open(ns)
		if err != nil {
			return err
		}
		before, err := generation(ns)
		if err != nil {
			return err
		}
		n, changes, err := checkRooms(c, t.have)
		if n > int(t.have.concurrent/2) {
			again = checkOften
		}
		if err != nil {
			return err
		}
		// Its own changes are no reason to write the rules anew.
		if after, err := generation(ns); err == nil && t.generation == before && after == before+changes {
			t.generation = after
		}
		return nil
	})
	if err != nil {
		return again, fmt.Errorf("check connections of tenant %d: %w", index, err)
	}
	return again, nil
}

// checkRooms returns how many connections had room, or have a socket, if that is more,
// and how many changes it made. Rules write at the same time: what is wrong now may be right afterwards, and the other
// way round, until the next time. Room that is taken away too early is found again by
// the next packet, or at the next time.
func checkRooms(c *nftables.Conn, s innerState) (n int, changes uint32, err error) {
	type place struct {
		set     *nftables.Set
		expires time.Duration
	}
	forAll, forPods := roomsOf(s.concurrent)
	have, free := map[string]place{}, map[*nftables.Set]int{}
	for _, set := range append(forPods, forAll) {
		elements, err := c.GetSetElements(set)
		if err != nil {
			return 0, 0, fmt.Errorf("read set %s: %w", set.Name, err)
		}
		free[set] = int(set.Size) - len(elements)
		for _, e := range elements {
			have[string(e.Key)] = place{set, e.Expires}
		}
	}
	// Read later than the room, so that what gets a socket meanwhile keeps it.
	sockets, err := accepted(c.NetNS)
	if err != nil {
		return 0, 0, err
	}
	n = max(len(have), len(sockets))
	gone, kept := map[*nftables.Set][]nftables.SetElement{}, map[*nftables.Set][]nftables.SetElement{}
	for k, p := range have {
		switch e := (nftables.SetElement{Key: []byte(k)}); {
		case !sockets[k] && p.expires > handshake:
			gone[p.set] = append(gone[p.set], e)
			free[p.set]++
		case sockets[k] && p.expires < flowIdle/2:
			kept[p.set] = append(kept[p.set], e)
		}
	}
	missing := map[*nftables.Set][]nftables.SetElement{}
	// Others' connections have no room in what is the pods'.
	for _, own := range []bool{false, true} {
		for k := range sockets {
			if _, ok := have[k]; ok || s.opened([]byte(k)) != own {
				continue
			}
			to := forAll
			if own && free[forAll] <= 0 && len(forPods) > 0 {
				to = forPods[0]
			}
			if free[to] > 0 {
				free[to]--
				missing[to] = append(missing[to], nftables.SetElement{Key: []byte(k), Timeout: flowIdle})
			}
		}
	}
	for _, set := range append(forPods, forAll) {
		for i := range kept[set] {
			kept[set][i].Timeout = flowIdle
		}
		for _, step := range []struct{ del, add []nftables.SetElement }{{gone[set], nil}, {kept[set], kept[set]}, {nil, missing[set]}} {
			made, err := replaceConnections(c, set, step.del, step.add)
			changes += made
			if err != nil {
				return n, changes, err
			}
		}
	}
	return n, changes, nil
}

// opened reports whether one of the tenant's own pods opened a connection.
func (s innerState) opened(key []byte) bool {
	a, _ := netip.AddrFromSlice(key[:16])
	return s.pods[a.Unmap()]
}

// replaceConnections does what it can of a change, in steps, and returns how many it
// made: an element may have gone by itself, or the room been taken.
func replaceConnections(c *nftables.Conn, set *nftables.Set, del, add []nftables.SetElement) (made uint32, err error) {
	for len(del)+len(add) > 0 {
		d, a := min(len(del), chunk), min(len(add), chunk)
		if d > 0 {
			if err := c.SetDeleteElements(set, del[:d]); err != nil {
				return made, fmt.Errorf("write set %s: %w", set.Name, err)
			}
		}
		if a > 0 {
			if err := c.SetAddElements(set, add[:a]); err != nil {
				return made, fmt.Errorf("write set %s: %w", set.Name, err)
			}
		}
		switch err := c.Flush(); {
		case err == nil:
			made++
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENFILE):
			return made, fmt.Errorf("write set %s: %w", set.Name, err)
		}
		del, add = del[d:], add[a:]
	}
	return made, nil
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
