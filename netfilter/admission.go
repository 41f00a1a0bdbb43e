package netfilter

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// How many connections a tenant has at a time is how many elements two sets of its
// namespace have, of which the kernel lets no rule write more than there is room for.
// What anybody opens is written into the first, and if there is no room, and the
// tenant's own pods open it, into the second: a quarter is theirs. A SYN takes room for
// the time of a handshake, and what follows it while there is no socket yet for as long
// as the connection lasts: whatever gets a socket has room.
//
// Room is free again when both ends have sent a FIN, or the tenant a RST. A peer's RST
// may be forged, so that it only shortens the time; CheckConnections, which knows the
// sockets, makes it long again where there still is one.
//
// Only rules write into these sets while rules do: see correction.
const (
	roomForAll, roomForPods = "room_", "room_pods_"
	// setsEnded are connections of which one end has said that it ends.
	setsEnded = "ended_by_"
	// handshake is for how long a SYN has room. A connection that takes longer has to
	// find it again.
	handshake = 3 * time.Second
	// halfClosed is for how long it is known that one end has sent a FIN.
	halfClosed = 10 * time.Minute
	// resetLinger is after a peer's RST: longer than from one CheckConnections to the next.
	resetLinger = checkSeldom + 5*time.Second
	// released is how long an element lasts that isn't needed any more; it takes room until
	// the kernel sweeps it. It expires and isn't deleted, because some kernels before 6.5
	// never get back the room of what rules delete.
	released = 10 * time.Millisecond
)

// Chains of connections that open, from pods and to them, and of packets that end one,
// to the tenant and from it.
const (
	roomOut, roomIn           = "room_out", "room_in"
	chainEndsIn, chainEndsOut = "ends_in", "ends_out"
)

// rooms are the sets that the bound takes, that for pods only if it has room: to the
// kernel, a size of 0 is no bound.
func (s innerState) rooms() (forAll *nftables.Set, forPods []*nftables.Set) {
	// The size of a set can't be changed, so that its name has it.
	room := func(prefix string, size uint32) *nftables.Set {
		name := prefix + strconv.Itoa(int(size))
		if s.renewed != 0 {
			name += "_renewed"
		}
		return connectionSet(name, size)
	}
	if n := s.concurrent / 4; n > 0 {
		forPods = append(forPods, room(roomForPods, n))
	}
	return room(roomForAll, s.concurrent-s.concurrent/4), forPods
}

// allRooms are both, none without a bound.
func (s innerState) allRooms() []*nftables.Set {
	if s.concurrent == 0 {
		return nil
	}
	forAll, forPods := s.rooms()
	return append(forPods, forAll)
}

// endedOf are the sets of connections of which one end has said that it ends: by who
// opened it, and by the tenant; none without a bound. The kernel takes memory for a set's
// whole size at once. A peer that doesn't answer a FIN loses its room after a minute, and
// is remembered for halfClosed: there is space for more than have room. Where even that is
// full, CheckConnections gives room back.
func endedOf(concurrent uint32) (sets []*nftables.Set) {
	const each, least = 16, 1024
	if concurrent > 0 {
		size := uint32(min(max(each*uint64(concurrent), least), maxFlows))
		for _, by := range []string{"peer_", "tenant_"} {
			sets = append(sets, connectionSet(setsEnded+by+strconv.Itoa(int(size)), size))
		}
	}
	return sets
}

// connectionSet has connections of either family for keys: address and port of who
// opened one, and then of whom to. IPv4 is written as IPv6 does it.
func connectionSet(name string, size uint32) *nftables.Set {
	return &nftables.Set{Table: inner, Name: name, HasTimeout: true, Dynamic: true, Concatenation: true, Size: size,
		KeyType: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeIP6Addr, nftables.TypeInetService)}
}

// connection loads the key of the connection that a packet to the tenant, or from it,
// is of.
func (f family) connection(toTenant bool) rule {
	peer, peerPort, own, ownPort := f.source, uint32(0), f.destination, uint32(2)
	if !toTenant {
		peer, peerPort, own, ownPort = own, ownPort, peer, peerPort
	}
	return join(f.wide(peer, regKey), transport(peerPort, 2, regKey+4), f.wide(own, regKey+5), transport(ownPort, 2, regKey+9))
}

// wide loads an address into four registers.
func (f family) wide(offset, to uint32) rule {
	if f.length == 16 {
		return network(offset, f.length, to)
	}
	return join(immediate(to, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff), network(offset, f.length, to+3))
}

// rooms are the chains that bound how many connections there are; without a bound they
// are empty.
func (f family) rooms(s innerState) []chain {
	chains := []chain{{name: roomOut + f.version}, {name: roomIn + f.version}, {name: chainEndsIn + f.version}, {name: chainEndsOut + f.version}}
	if s.concurrent > 0 {
		forAll, forPods := s.rooms()
		all, ended := s.allRooms(), endedOf(s.concurrent)
		chains[0].rules, chains[1].rules = f.takeRoom(forAll, forPods, ended), f.takeRoom(forAll, nil, ended)
		chains[2].rules, chains[3].rules = f.leaveRoom(all, ended, true), f.leaveRoom(all, ended, false)
	}
	return chains
}

// takeRoom marks a connection that finds no room.
func (f family) takeRoom(forAll *nftables.Set, forPods, ended []*nftables.Set) []rule {
	is, done := f.connection(true), verdict(expr.VerdictReturn, "")
	rules := []rule{join(ends(), done)} // opens nothing
	for _, s := range ended {
		rules = append(rules, join(opens(), is, isIn(s.Name, regKey), put(s.Name, regKey, 0, released)))
	}
	for _, step := range []struct {
		when  rule
		lasts time.Duration
	}{{opens(), handshake}, {nil, flowIdle}} {
		for _, s := range forPods {
			rules = append(rules, join(step.when, is, isIn(s.Name, regKey), put(s.Name, regKey, 0, step.lasts), done))
		}
		// Into a set that is full a rule can't write, and doesn't match.
		for _, s := range slices.Concat([]*nftables.Set{forAll}, forPods) {
			rules = append(rules, join(step.when, is, put(s.Name, regKey, 0, step.lasts), done))
		}
		rules = append(rules, join(step.when, onlyMark(tooMany), done))
	}
	return rules
}

// leaveRoom is for packets with FIN or RST.
func (f family) leaveRoom(rooms, ended []*nftables.Set, toTenant bool) (rules []rule) {
	is, done := f.connection(toTenant), verdict(expr.VerdictReturn, "")
	reset := resets()
	sent, other := ended[0].Name, ended[1].Name
	if !toTenant {
		sent, other = other, sent
	}
	for _, s := range rooms {
		release := join(put(s.Name, regKey, 0, released), put(sent, regKey, 0, released), put(other, regKey, 0, released), done)
		has := join(is, isIn(s.Name, regKey))
		rules = append(rules, join(has, isIn(other, regKey), release))
		if toTenant {
			// What is remembered doesn't outlast who can hold room for it, or peers could fill
			// the set: a FIN without a connection isn't.
			rules = append(rules,
				join(reset, has, isIn(sent, regKey), put(sent, regKey, 0, resetLinger)),
				join(reset, has, put(s.Name, regKey, 0, resetLinger), done),
				join(has, hasSocket(), put(sent, regKey, 0, halfClosed), done))
		} else {
			rules = append(rules, join(reset, has, release), join(has, put(sent, regKey, 0, halfClosed), done))
		}
	}
	return rules
}

// makeRooms makes the sets, as far as they aren't there. The library can't say how often
// the kernel looks for elements that have expired, which take room until then.
func makeRooms(netns int, s innerState) error {
	if s.concurrent == 0 {
		return nil
	}
	table := []byte(inner.Name + "\x00")
	made, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: table}})
	if err != nil {
		return err
	}
	const fieldLength = 1 // NFTA_SET_FIELD_LEN
	messages := []netlink.Message{message(unix.NFT_MSG_NEWTABLE, netlink.Create, inner, made)}
	for id, s := range s.allRooms() {
		var fields []netlink.Attribute
		for _, t := range nftables.ConcatSetTypeElements(s.KeyType) {
			length, err := netlink.MarshalAttributes([]netlink.Attribute{attr32(fieldLength, t.Bytes)})
			if err != nil {
				return err
			}
			fields = append(fields, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: length})
		}
		concatenated, err := netlink.MarshalAttributes(fields)
		if err != nil {
			return err
		}
		description, err := netlink.MarshalAttributes([]netlink.Attribute{
			attr32(unix.NFTA_SET_DESC_SIZE, s.Size),
			{Type: unix.NLA_F_NESTED | nftables.NFTA_SET_DESC_CONCAT, Data: concatenated},
		})
		if err != nil {
			return err
		}
		data, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_SET_TABLE, Data: table},
			{Type: unix.NFTA_SET_NAME, Data: []byte(s.Name + "\x00")},
			attr32(unix.NFTA_SET_ID, uint32(id+1)),
			attr32(unix.NFTA_SET_FLAGS, unix.NFT_SET_TIMEOUT|unix.NFT_SET_EVAL|nftables.NFT_SET_CONCAT),
			attr32(unix.NFTA_SET_KEY_TYPE, s.KeyType.GetNFTMagic()),
			attr32(unix.NFTA_SET_KEY_LEN, s.KeyType.Bytes),
			attr32(unix.NFTA_SET_GC_INTERVAL, uint32(sweepPeriod(s.Size).Milliseconds())),
			{Type: unix.NLA_F_NESTED | unix.NFTA_SET_DESC, Data: description},
		})
		if err != nil {
			return err
		}
		messages = append(messages, message(unix.NFT_MSG_NEWSET, netlink.Create, inner, data))
	}
	return send(netns, messages)
}

// sweepPeriod is how often the kernel is asked to give back room: until it does, what has
// ended counts. Each look costs as much as there is.
func sweepPeriod(size uint32) time.Duration {
	return min(max(time.Duration(size)*50*time.Microsecond, 10*time.Millisecond), time.Second)
}

// fillRooms writes into sets that no rule writes into yet what is open already, as far as
// there is room. They may have been made, and filled in part, by an agent that was killed.
func fillRooms(c *nftables.Conn, s innerState) error {
	for _, set := range s.allRooms() {
		c.FlushSet(set)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("empty the room for connections: %w", err)
	}
	open, err := accepted(c.NetNS)
	if err != nil {
		return err
	}
	free := map[string]int{}
	for _, set := range s.allRooms() {
		free[set.Name] = int(set.Size)
	}
	fill := map[*nftables.Set][]nftables.SetElement{}
	for _, p := range s.place(open, free) {
		fill[p.set] = append(fill[p.set], nftables.SetElement{Key: []byte(p.connection), Timeout: flowIdle})
	}
	for set, elements := range fill {
		for part := range slices.Chunk(elements, chunk) {
			if err := c.SetAddElements(set, part); err != nil {
				return fmt.Errorf("write set %s: %w", set.Name, err)
			}
			if err := c.Flush(); err != nil {
				return fmt.Errorf("write set %s: %w", set.Name, err)
			}
		}
	}
	return nil
}

// forgetRooms removes sets that aren't those of s, with what has ended there.
func forgetRooms(c *nftables.Conn, s innerState) error {
	all, err := c.GetSets(inner)
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	wanted := append(s.allRooms(), endedOf(s.concurrent)...)
	for _, s := range all {
		if (strings.HasPrefix(s.Name, roomForAll) || strings.HasPrefix(s.Name, setsEnded)) && !slices.ContainsFunc(wanted, func(w *nftables.Set) bool { return w.Name == s.Name }) {
			c.DelSet(s)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("remove the room of a former bound: %w", err)
	}
	return nil
}
