package netfilter

import (
	"crypto/rand"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// inner is the table in a tenant's network namespace.
var inner = &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}

// Its sets, with the family's version but for setState.
const (
	setInnerPods  = "pods"
	setInnerNodes = "nodes"
	// setInnerStrict: addresses of pods that take no plain text.
	setInnerStrict = "strict"
	// setConnections counts new connections, by the pod's address and the listener's
	// port or one of the ports below, and with the unspecified address those of all.
	setConnections = "connections"
	// setState keeps what the chains were made from: stateWeight and so on.
	setState = "state"
)

// Of connections that got no listener: to nobody here, in plain text that the pod
// doesn't take, where nobody listens, beyond the tenant's pace, and beyond its room.
const (
	unsteeredPort = iota
	plainTextPort
	refusedPort
	tooFastPort
	tooManyPort
)

// Chains whose one rule marks connections beyond the pace: one for both families, or
// each would have a pace of its own.
const paceOut, paceIn = "pace_out", "pace_in"

const (
	stateWeight     = 1
	stateActive     = 2 // and the one of generation 1 behind it
	statePace       = stateActive + steer.Generations
	stateConcurrent = statePace + 1
	stateOwn        = statePace + 2
	stateSeed       = statePace + 3
	stateRenewed    = statePace + 4
)

// What chains mark with a connection that isn't taken: those above, and those of the
// room.
const tooFast, tooMany = 1, 2

// innerState is what the table says.
type innerState struct {
	pods, nodes, strict map[netip.Addr]bool
	active              [steer.Generations]bool
	weight              int
	// pace is the most new connections in a second, of each direction; 0 is no bound.
	pace uint32
	// concurrent is the most connections at a time; 0 is no bound.
	concurrent uint32
	// renewed is 0 or 1: whether the sets of the room are those of the other name. It
	// changes when one has become too large.
	renewed uint32
	// own is the priority of what the tenant sends to its own pods; 0 leaves it.
	own uint32
	// seed of the hashes that spread connections over generations and workers: random, or
	// outsiders could work out which ports lead where. It stays with the table: the ACK
	// that answers a SYN cookie must find the listener that the SYN found. 0 before the
	// first time.
	seed uint32
	// made is false before the first time.
	made bool
}

func (s innerState) equal(o innerState) bool {
	return s.active == o.active && s.weight == o.weight && s.pace == o.pace && s.sameRooms(o) && s.own == o.own && s.seed == o.seed && maps.Equal(s.pods, o.pods) && maps.Equal(s.nodes, o.nodes) && maps.Equal(s.strict, o.strict)
}

// sameRooms reports whether two states have the same sets of the room.
func (s innerState) sameRooms(o innerState) bool {
	return s.concurrent == o.concurrent && s.renewed == o.renewed
}

// addresses are what the sets of addresses have.
func (s innerState) addresses() map[string]map[netip.Addr]bool {
	return map[string]map[netip.Addr]bool{setInnerPods: s.pods, setInnerNodes: s.nodes, setInnerStrict: s.strict}
}

func innerSets() map[string]*nftables.Set {
	sets := map[string]*nftables.Set{setState: {Table: inner, Name: setState, IsMap: true, KeyType: nftables.TypeMark, DataType: nftables.TypeMark}}
	for _, f := range families {
		for _, name := range []string{setInnerPods, setInnerNodes, setInnerStrict} {
			sets[name+f.version] = &nftables.Set{Table: inner, Name: name + f.version, KeyType: f.kind, Size: maxVeths}
		}
		sets[setConnections+f.version] = &nftables.Set{Table: inner, Name: setConnections + f.version, Dynamic: true, Counter: true, Concatenation: true,
			KeyType: nftables.MustConcatSetType(f.kind, nftables.TypeInetService), Size: maxDrops}
	}
	return sets
}

// read finds out what is there, unless nothing has changed.
func (t *tenantState) read(c *nftables.Conn) error {
	gen, err := generation(c.NetNS)
	if err != nil {
		return err
	}
	if t.have.made && t.generation == gen {
		return nil
	}
	// The seed is that of sockets, too: it outlives the table.
	t.generation, t.have = gen, innerState{pods: map[netip.Addr]bool{}, nodes: map[netip.Addr]bool{}, strict: map[netip.Addr]bool{}, seed: t.have.seed}
	there, err := hasTable(c, inner)
	if err != nil || !there {
		return err
	}
	sets := innerSets()
	for _, f := range families {
		for name, addresses := range t.have.addresses() {
			elements, err := c.GetSetElements(sets[name+f.version])
			if err != nil {
				return fmt.Errorf("read set %s: %w", name+f.version, err)
			}
			for _, e := range elements {
				a, _ := netip.AddrFromSlice(e.Key)
				addresses[a] = true
			}
		}
	}
	elements, err := c.GetSetElements(sets[setState])
	if err != nil {
		return fmt.Errorf("read set %s: %w", setState, err)
	}
	for _, e := range elements {
		value := binaryutil.NativeEndian.Uint32(e.Val)
		switch k := binaryutil.NativeEndian.Uint32(e.Key); k {
		case stateWeight:
			t.have.weight = int(value)
		case stateActive, stateActive + 1:
			t.have.active[k-stateActive] = value != 0
		case statePace:
			t.have.pace = value
		case stateConcurrent:
			t.have.concurrent = value
		case stateOwn:
			t.have.own = value
		case stateSeed:
			t.have.seed = value
		case stateRenewed:
			t.have.renewed = value
		}
	}
	return nil // have.made stays false: the rules may be another version's
}

// newSeed is random, and not 0, of which the kernel would make one of its own.
func newSeed() uint32 {
	for {
		seed := make([]byte, 4)
		rand.Read(seed) // never fails
		if n := binaryutil.NativeEndian.Uint32(seed); n != 0 {
			return n
		}
	}
}

// write makes the table say what it should, in one step. What was counted stays.
func (t *tenantState) write(c *nftables.Conn, want innerState) error {
	if want.seed == 0 {
		want.seed = newSeed()
	}
	if err := makeRooms(c.NetNS, want); err != nil {
		return fmt.Errorf("make room for %d connections: %w", want.concurrent, err)
	}
	otherRooms := !want.sameRooms(t.have)
	if otherRooms && want.concurrent != 0 {
		if err := fillRooms(c, want); err != nil {
			return err
		}
	}
	// Even by another agent: rules that are new have forgotten what was taken of the pace.
	paced, err := hasRules(c, inner, paceChains(want))
	if err != nil {
		return err
	}
	c.AddTable(inner)
	sets := innerSets()
	for _, s := range slices.AppendSeq(endedOf(want.concurrent), maps.Values(sets)) {
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("write set %s: %w", s.Name, err)
		}
	}
	for _, f := range families {
		for name, addresses := range want.addresses() {
			var elements []nftables.SetElement
			for a := range addresses {
				if familyOf(a).version == f.version {
					elements = append(elements, nftables.SetElement{Key: addressKey(a)})
				}
			}
			if err := replaceElements(c, sets[name+f.version], elements); err != nil {
				return err
			}
		}
	}
	if err := t.forgetConnections(c, want); err != nil {
		return err
	}
	values := []nftables.SetElement{{Key: native(stateWeight), Val: native(uint32(want.weight))}, {Key: native(statePace), Val: native(want.pace)},
		{Key: native(stateConcurrent), Val: native(want.concurrent)}, {Key: native(stateOwn), Val: native(want.own)},
		{Key: native(stateSeed), Val: native(want.seed)}, {Key: native(stateRenewed), Val: native(want.renewed)}}
	for g, active := range want.active {
		value := uint32(0)
		if active {
			value = 1
		}
		values = append(values, nftables.SetElement{Key: native(uint32(stateActive + g)), Val: native(value)})
	}
	if err := replaceElements(c, sets[setState], values); err != nil {
		return err
	}
	prerouting := c.AddChain(&nftables.Chain{Name: "prerouting", Table: inner, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle})
	chains := innerChains(want)
	for _, ch := range chains {
		c.AddChain(&nftables.Chain{Name: ch.name, Table: inner})
	}
	output := c.AddChain(&nftables.Chain{Name: "output", Table: inner, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle})
	for _, ch := range append(chains, chain{prerouting.Name, preroutingRules(t.ifindex, want)}, chain{output.Name, outputRules(want)}) {
		if (ch.name == paceOut || ch.name == paceIn) && paced {
			continue
		}
		of := &nftables.Chain{Name: ch.name, Table: inner}
		c.FlushChain(of)
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: inner, Chain: of, Exprs: r})
		}
	}
	if len(outputRules(want)) == 0 {
		c.DelChain(output) // so that packets needn't pass it
	}
	if !t.have.made {
		if err := forgetChains(c, append(chains, chain{name: prerouting.Name}, chain{name: output.Name})); err != nil {
			return err
		}
	}
	t.generation = 0
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write its table %s: %w", TableName, err)
	}
	if otherRooms || !t.have.made {
		if err := forgetRooms(c, want); err != nil {
			return err
		}
	}
	want.made, t.have.made = true, false
	gen, err := generation(c.NetNS)
	if err != nil {
		return err
	}
	t.have, t.generation = want, gen
	return nil
}

// forgetChains removes chains that aren't known, another version's: none of the sets that
// their rules name could be removed.
func forgetChains(c *nftables.Conn, known []chain) error {
	have, err := c.ListChainsOfTableFamily(inner.Family)
	if err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	have = slices.DeleteFunc(have, func(h *nftables.Chain) bool {
		return h.Table.Name != inner.Name || slices.ContainsFunc(known, func(k chain) bool { return k.name == h.Name })
	})
	for _, h := range have {
		c.FlushChain(&nftables.Chain{Name: h.Name, Table: inner})
	}
	// Behind that, as one may lead to another.
	for _, h := range have {
		c.DelChain(&nftables.Chain{Name: h.Name, Table: inner})
	}
	return nil
}

// forgetConnections forgets what was counted of pods that aren't here any more: another
// may get the address.
func (t *tenantState) forgetConnections(c *nftables.Conn, want innerState) error {
	gone := false
	for a := range t.have.pods {
		gone = gone || !want.pods[a]
	}
	if !gone {
		return nil
	}
	sets := innerSets()
	for _, f := range families {
		set := sets[setConnections+f.version]
		elements, err := c.GetSetElements(set)
		if err != nil {
			return fmt.Errorf("read counted connections: %w", err)
		}
		elements = slices.DeleteFunc(elements, func(e nftables.SetElement) bool {
			a, _ := netip.AddrFromSlice(e.Key[:f.length])
			return a.IsUnspecified() || want.pods[a]
		})
		for part := range slices.Chunk(elements, chunk) {
			for i := range part {
				part[i] = nftables.SetElement{Key: part[i].Key}
			}
			if err := c.SetDeleteElements(set, part); err != nil {
				return fmt.Errorf("forget counted connections: %w", err)
			}
		}
	}
	return nil
}

func replaceElements(c *nftables.Conn, s *nftables.Set, elements []nftables.SetElement) error {
	c.FlushSet(s)
	for len(elements) > 0 {
		n := min(len(elements), chunk)
		if err := c.SetAddElements(s, elements[:n]); err != nil {
			return fmt.Errorf("write set %s: %w", s.Name, err)
		}
		elements = elements[n:]
	}
	return nil
}

func preroutingRules(ifindex int, s innerState) []rule {
	rules := []rule{
		join(iif(regTemp), differs(regTemp, native(uint32(ifindex))...), accept()),
		join(meta(expr.MetaKeyL4PROTO, regTemp), differs(regTemp, unix.IPPROTO_TCP), accept()),
	}
	if s.concurrent > 0 {
		for _, f := range families {
			rules = append(rules, join(f.is(), ends(), jump(chainEndsIn+f.version)))
		}
	}
	// What has a connection goes to it: Envoy's own ones, too.
	rules = append(rules, join(isAnswer(), hasSocket(), logged(prefixAnswered)), join(hasSocket(), accept()))
	for _, f := range families {
		rules = append(rules, join(f.is(), goTo("steer"+f.version)))
	}
	return append(rules, drop())
}

// hasSocket matches packets of a connection that has a socket, when its handshake is over.
func hasSocket() rule {
	return join(rule{&expr.Socket{Key: expr.SocketKeyWildcard, Register: regTemp}}, equal(regTemp, 0))
}

// outputRules are for what the tenant sends; none where nothing is to be done.
func outputRules(s innerState) (rules []rule) {
	for _, f := range families {
		if s.own != 0 {
			rules = append(rules, join(f.is(), network(f.destination, f.length, regKey), isIn(setInnerPods+f.version, regKey), setPriority(s.own)))
		}
		if s.concurrent > 0 {
			rules = append(rules, join(f.is(), isTCP(nil), ends(), jump(chainEndsOut+f.version)))
		}
	}
	if s.concurrent > 0 {
		rules = append(rules, correctionRules(s)...)
	}
	return rules
}

// is matches packets of the family.
func (f family) is() rule {
	return join(meta(expr.MetaKeyNFPROTO, regTemp), equal(regTemp, f.proto))
}

// hasRules is true where the kernel has the rules of chains, and no others in them. Only of
// expressions that it gives back as they were written.
func hasRules(c *nftables.Conn, table *nftables.Table, chains []chain) (bool, error) {
	for _, ch := range chains {
		have, err := c.GetRules(table, &nftables.Chain{Name: ch.name, Table: table})
		if err != nil {
			return false, fmt.Errorf("read chain %s: %w", ch.name, err)
		}
		if !slices.EqualFunc(have, ch.rules, func(h *nftables.Rule, r rule) bool { return reflect.DeepEqual(rule(h.Exprs), r) }) {
			return false, nil
		}
	}
	return true, nil
}

// paceChains mark what is beyond the pace.
func paceChains(s innerState) (chains []chain) {
	for _, name := range []string{paceOut, paceIn} {
		var rules []rule
		if s.pace > 0 {
			// Like eBPF's: a second's worth at once, after a rest.
			rules = append(rules, join(rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(s.pace), Unit: expr.LimitTimeSecond, Burst: s.pace, Over: true}}, onlyMark(tooFast)))
		}
		chains = append(chains, chain{name, rules})
	}
	return chains
}

// innerChains find the listener, and in there the generation.
func innerChains(s innerState) []chain {
	chains := paceChains(s)
	for _, f := range families {
		v := f.version
		source, destination := network(f.source, f.length, regKey), network(f.destination, f.length, regKey)
		ownPod, foreign := join(source, isIn(setInnerPods+v, regKey)), join(source, isNotIn(setInnerPods+v, regKey))
		outbound := join(ownPod, transport(2, 2, regTemp), differs(regTemp, big16(portInbound)...))
		toInbound := join(transport(2, 2, regTemp), equal(regTemp, big16(portInbound)...))
		paced := func(by string, when rule) (rules []rule) {
			if s.pace > 0 {
				rules = []rule{onlyMark(0), join(opens(), when, jump(by)), join(when, markIs(tooFast), goTo(by+v))}
			}
			return rules
		}
		// What isn't paced takes no room either.
		admitted := func(by, room string, when rule) (rules []rule) {
			rules = paced(by, when)
			if s.concurrent > 0 {
				rules = append(rules, onlyMark(0), join(when, jump(room+v)), join(when, markIs(tooMany), goTo("full_"+room+v)))
			}
			return rules
		}
		steering := append(admitted(paceOut, roomOut, outbound), join(outbound, goTo("outbound"+v)),
			join(destination, isNotIn(setInnerPods+v, regKey), goTo("unsteered"+v)),
			// Before there is a connection, so that not even a greeting gets out.
			join(transport(2, 2, regTemp), differs(regTemp, big16(portInbound)...), destination, isIn(setInnerStrict+v, regKey), goTo("strict"+v)))
		// A tunnel between two of its own pods begins in here: it has to be let in.
		if s.concurrent > 0 {
			steering = append(steering, join(ownPod, jump(roomOut+v)), onlyMark(0))
		}
		steering = append(steering, admitted(paceIn, roomIn, foreign)...)
		chains = append(chains, chain{"steer" + v, append(steering,
			join(toInbound, goTo("inbound"+v)),
			// Envoy can't keep that source: it is the node's own.
			join(source, isIn(setInnerNodes+v, regKey), goTo("nodeplain"+v)),
			goTo("plain"+v),
		)})
		for l := range steer.Listeners {
			chains = append(chains, f.listener(l, s)...)
		}
		chains = append(chains,
			chain{"strict" + v, append(f.count(destination, plainTextPort), refuse()...)},
			chain{paceOut + v, append(f.count(source, tooFastPort), drop())},
			chain{paceIn + v, append(f.count(destination, tooFastPort), drop())},
			chain{"full_" + roomOut + v, append(f.count(source, tooManyPort), drop())},
			chain{"full_" + roomIn + v, append(f.count(destination, tooManyPort), drop())},
			chain{"unsteered" + v, append(f.count(nil, unsteeredPort), drop())})
		chains = append(chains, f.rooms(s)...)
	}
	return chains
}

// chainOf is the name of a listener's chain, without the family's version.
func chainOf(l steer.Listener) string {
	return [steer.Listeners]string{"outbound", "inbound", "plain", "nodeplain"}[l]
}

// count counts a connection of the pod whose address is loaded, if one is, and for
// all, and tells of it, if it is a pod's.
func (f family) count(pod rule, port uint16) (rules []rule) {
	everyone := immediate(regKey, make([]byte, f.length)...)
	for _, whose := range []rule{pod, everyone} {
		if whose != nil {
			rules = append(rules, join(opens(), whose, immediate(regKey+f.words(), portKey(port)...), put(setConnections+f.version, regKey, 0, 0, counter())))
		}
	}
	if pod != nil {
		rules = append(rules, join(opens(), logged(connectionPrefix(port))))
	}
	return rules
}

// listener are the chains of one listener: which generation gets a connection, and
// what is counted.
func (f family) listener(l steer.Listener, s innerState) []chain {
	v := f.version
	pod := network(f.destination, f.length, regKey)
	if l == steer.Outbound {
		pod = network(f.source, f.length, regKey)
	}
	var rules []rule
	var chains []chain
	take := func(generation int, when rule) {
		port := l.PortOf(generation)
		rules = append(rules, join(when, immediate(regTemp, big16(port)...),
			rule{&expr.TProxy{Family: f.proto, TableFamily: unix.NFPROTO_INET, RegPort: regTemp}}, goTo("took_"+strconv.Itoa(int(port))+"_"+v)))
	}
	if s.active[1] && s.weight > 0 {
		n := f.words()
		take(1, join(network(f.source, f.length, regKey), transport(0, 2, regKey+n), rule{
			&expr.Hash{SourceRegister: regKey, DestRegister: regTemp, Length: f.length + 4, Modulus: 100, Seed: s.seed, Type: expr.HashTypeJenkins},
			&expr.Byteorder{SourceRegister: regTemp, DestRegister: regTemp, Op: expr.ByteorderHton, Len: 4, Size: 4},
			&expr.Cmp{Op: expr.CmpOpLt, Register: regTemp, Data: []byte{0, 0, 0, byte(s.weight)}},
		}))
	}
	// Without a socket that takes it, a rule doesn't match: the other generation is
	// asked.
	for generation, active := range s.active {
		if active {
			take(generation, nil)
		}
	}
	rules = append(append(rules, f.count(pod, refusedPort)...), refuse()...)
	for generation := range steer.Generations {
		port := l.PortOf(generation)
		chains = append(chains, chain{"took_" + strconv.Itoa(int(port)) + "_" + v, append(f.count(pod, port), accept())})
	}
	return append(chains, chain{chainOf(l) + v, rules})
}

// refuse leaves it to the kernel to refuse what has no socket. Envoy's own may be
// there, and are not to be found in any other way.
func refuse() (rules []rule) {
	for generation := range steer.Generations {
		for l := range steer.Listeners {
			rules = append(rules, join(transport(2, 2, regTemp), equal(regTemp, big16(l.PortOf(generation))...), drop()))
		}
	}
	return append(rules, accept())
}
