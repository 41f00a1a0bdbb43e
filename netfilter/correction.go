package netfilter

import (
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A correction is what CheckConnections has found out about a connection's room. It isn't
// written by a transaction, but told to the rules by a packet, so that they write it: what
// a transaction adds the kernel counts before it takes off what the same one deletes, newer
// ones before they look whether there is room, and until then a set is beyond its size.
// Rules are held to a size that is reached, and not to one that is passed, so that with a
// SYN at that moment a set would grow without bound.
type correction struct {
	what byte
	// connection is a key of connectionSet.
	connection string
}

const (
	// correctNobodys: nobody has that room any more.
	correctNobodys = iota + 1
	// correctOthers and correctPods: what has room has it for as long as a connection lasts,
	// and what has none gets it. Anybody opened it, or the tenant's pods.
	correctOthers
	correctPods
)

// correctionMark is that of corrections. Only what is sent in the tenant's namespace passes
// the hook output, and no proxy in there may mark what it sends: that takes CAP_NET_ADMIN or
// CAP_NET_RAW in the user namespace that owns it, the node's.
const correctionMark = 0x100

// correctionRules do what corrections say, and accept whatever is none: they come last. They
// have no chain of their own: a version that doesn't know it would leave it as it is, and
// could then remove none of the sets that it names.
func correctionRules(s innerState) (rules []rule) {
	const header, what, is = 8, 1, 40 // UDP's, and of what follows it
	key, done := transport(header+what, is, regKey), drop()
	when := func(what byte) rule { return join(transport(header, 1, regTemp), equal(regTemp, what)) }
	add := func(r ...rule) { rules = append(rules, join(r...)) }
	forAll, forPods := s.rooms()
	add(meta(expr.MetaKeyL4PROTO, regTemp), differs(regTemp, unix.IPPROTO_UDP), accept())
	add(theMark(regTemp), differs(regTemp, native(correctionMark)...), accept())
	for _, set := range s.allRooms() {
		add(when(correctNobodys), key, isIn(set.Name, regKey), put(set.Name, regKey, 0, released), done)
	}
	add(when(correctNobodys), done)
	for _, set := range forPods {
		add(key, isIn(set.Name, regKey), put(set.Name, regKey, 0, flowIdle), done)
	}
	add(key, put(forAll.Name, regKey, 0, flowIdle), done)
	for _, set := range forPods {
		add(when(correctPods), key, put(set.Name, regKey, 0, flowIdle), done)
	}
	add(done)
	return rules
}

// errNotTaken is of a correction that passed: no rule does what it says.
var errNotTaken = errors.New("no rule takes it")

// correct tells the rules of a network namespace. It returns an error that wraps
// errNotTaken if there are none.
func correct(netns int, all []correction) error {
	if len(all) == 0 {
		return nil
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- sendCorrections(netns, all)
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("tell rules of connections: %w", err)
	}
	return nil
}

func sendCorrections(netns int, all []correction) error {
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, correctionMark); err != nil {
		return fmt.Errorf("mark packets: %w", err)
	}
	const discard = 9
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: discard}); err != nil {
		return fmt.Errorf("connect to loopback: %w", err)
	}
	for _, c := range all {
		// The rules drop what they have read, of which the kernel tells who sent it.
		switch _, err := unix.Write(fd, append([]byte{c.what}, c.connection...)); {
		case err == nil:
			return errNotTaken
		case !errors.Is(err, unix.EPERM):
			return fmt.Errorf("send to loopback: %w", err)
		}
	}
	return nil
}

// placed is a connection, and the set with room for it.
type placed struct {
	connection string
	own        bool
	set        *nftables.Set
}

// place finds room for connections in sets, of which free says how much is left, by name.
// In what is the pods', others' have none.
func (s innerState) place(connections map[string]bool, free map[string]int) (found []placed) {
	forAll, forPods := s.rooms()
	for _, own := range []bool{false, true} {
		sets := []*nftables.Set{forAll}
		if own {
			sets = append(sets, forPods...)
		}
		for k := range connections {
			if s.opened([]byte(k)) != own {
				continue
			}
			if i := slices.IndexFunc(sets, func(set *nftables.Set) bool { return free[set.Name] > 0 }); i >= 0 {
				free[sets[i].Name]--
				found = append(found, placed{k, own, sets[i]})
			}
		}
	}
	return found
}
