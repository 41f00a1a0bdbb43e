package netfilter

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What pods begin beside their tenant is paced by chains of the tenant: flows of other
// protocols than TCP, TCP to the node itself, of which conntrack takes more than SYNs for
// a beginning, and SYNs that are excluded. Each tenant that has a pace has sets of its
// own, so that none can fill another's: of what its pods have begun, and of what others
// have, which pods may answer. Whatever finds no room in there counts with each packet.
//
// A flow is what conntrack takes for one, so that the veth isn't in its key: who forges a
// source begins nothing where the entry is there.
const (
	setBegun, setAnswered = "begun_", "answered_"
	maxBegun, maxAnswered = 65536, 16384
	// begunKept is after a flow's last packet, about as long as conntrack keeps it.
	begunKept    = time.Minute
	answeredKept = 30 * time.Second

	// What a pod sends beside its tenant goes through the first of each family, what it
	// gets through the second.
	chainBesideOut, chainBesideIn = "beside_out", "beside_in"
	// Of a tenant, the first three for each family: its index is behind it, and where the
	// pace is in it, the pace.
	chainBegins, chainCounts, chainAnswers, chainPace = "begins", "counts", "answers", "pace"
	// markTooFast is no tenant's.
	markTooFast = 1 << 16
)

// flowSet has flows of either family for keys: the pod's address and port, the peer's,
// and the protocol.
func flowSet(name string, size uint32) *nftables.Set {
	return &nftables.Set{Table: steering, Name: name, HasTimeout: true, Dynamic: true, Concatenation: true, Size: size,
		KeyType: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeInetProto)}
}

func directSets(tenant uint16) (begun, answered *nftables.Set) {
	n := strconv.Itoa(int(tenant))
	return flowSet(setBegun+n, maxBegun), flowSet(setAnswered+n, maxAnswered)
}

// kind is one of packets, by what conntrack tells their flows apart besides ends and
// protocol: what the pod's side of a key has, and its peer's.
type kind struct {
	is         rule
	pod, peer  func(to uint32) rule
	isAnswered bool // by packets with the two the other way round
}

func (f family) kinds() []kind {
	protocol := meta(expr.MetaKeyL4PROTO, regTemp)
	at := func(offset uint32) func(uint32) rule {
		return func(to uint32) rule { return transport(offset, 2, to) }
	}
	none := func(to uint32) rule { return immediate(to, 0, 0, 0, 0) }
	gre := join(protocol, equal(regTemp, unix.IPPROTO_GRE))
	greVersion := join(transport(1, 1, regTemp), masked(regTemp, []byte{7}, []byte{0}))
	return []kind{
		{join(protocol, isIn(setPorted, regTemp)), at(0), at(2), true},
		// The identifier of a request, and its type and code.
		{join(protocol, equal(regTemp, f.icmp)), at(4), at(0), false},
		// PPTP's calls.
		{join(gre, greVersion, equal(regTemp, 1)), none, at(6), false},
		{join(gre, greVersion, differs(regTemp, 1)), none, none, true},
		{join(protocol, differs(regTemp, f.icmp), differs(regTemp, unix.IPPROTO_GRE), isNotIn(setPorted, regTemp)), none, none, true},
	}
}

// flowOf loads the key of the flow of a packet of a kind.
func (f family) flowOf(k kind, podIsSource bool) rule {
	pod, podPort, peer, peerPort := f.source, k.pod, f.destination, k.peer
	if !podIsSource {
		pod, podPort, peer, peerPort = peer, peerPort, pod, podPort
	}
	return join(k.is, f.wide(pod, regKey), podPort(regKey+4), f.wide(peer, regKey+5), peerPort(regKey+9), meta(expr.MetaKeyL4PROTO, regKey+10))
}

// isLater matches fragments without the headers behind IP's. Without the first, which has
// them, nothing is put together.
func (f family) isLater(then rule) rule { return f.fragment(0x1fff, 0xfff8, then) }

// besideOut is the chain of what a pod sends beside its tenant.
func (f family) besideOut() chain {
	answers := join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, f.icmp), transport(0, 1, regTemp))
	for _, request := range f.requests {
		answers = join(answers, differs(regTemp, request))
	}
	return chain{chainBesideOut + f.version, append(append([]rule{f.isLater(accept()), join(answers, accept())}, ofTenant(iif, setBegins+f.version)...), onlyMark(0), accept())}
}

// besideIn remembers what a pod gets beside its tenant, and may answer.
func (f family) besideIn() chain {
	isICMP := join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, f.icmp))
	return chain{chainBesideIn + f.version, append([]rule{f.isLater(back()), join(isICMP, back())}, ofTenant(oif, setAnswers+f.version)...)}
}

// ofTenant leads to where a map says for the tenant of the pod, and then on.
func ofTenant(device func(uint32) rule, to string) []rule {
	return []rule{
		onlyMark(0),
		join(device(regKey), find(setPods, regKey, regFound), markFound()),
		join(theMark(regKey), find(to, regKey, unix.NFT_REG_VERDICT)),
	}
}

// paced are the rules that drop a pod's packet that is too fast for the tenant of the
// mark, and leave the mark as it is otherwise.
func paced() []rule {
	return []rule{join(theMark(regKey), find(setPaces, regKey, unix.NFT_REG_VERDICT)), dropTooFast()}
}

func dropTooFast() rule { return join(markIs(markTooFast), goTo(dropChain(dropDirectTooFast, false))) }

// paceChain marks what is too fast of what a tenant's pods begin beside it, for all
// protocols and both families together.
func paceChain(tenant uint16, perSecond uint32) chain {
	// Like eBPF's: a second's worth at once, after a rest.
	return chain{directChain(chainPace, tenant) + "_" + strconv.Itoa(int(perSecond)), []rule{join(
		rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: perSecond, Over: true}}, onlyMark(markTooFast))}}
}

func directChain(kind string, tenant uint16) string { return kind + "_" + strconv.Itoa(int(tenant)) }

// direct are the chains of what a tenant's pods begin, of what of it counts, and of what
// they get. The kernel walks through all that a pod's packets can come to with each
// change, so they are short.
func (f family) direct(tenant uint16, perSecond uint32) (begins, counts, answers chain) {
	begun, answered := directSets(tenant)
	rate := "_" + strconv.Itoa(int(perSecond))
	begins.name, counts.name = directChain(chainBegins+f.version, tenant)+rate, directChain(chainCounts+f.version, tenant)+rate
	answers.name = directChain(chainAnswers+f.version, tenant)
	passes := join(onlyMark(0), accept())
	// A SYN begins another one in any case.
	begins.rules = []rule{join(isTCP(nil), opens(), goTo(counts.name))}
	counts.rules = []rule{jump(paceChain(tenant, perSecond).name), dropTooFast()}
	for _, k := range f.kinds() {
		is := f.flowOf(k, true)
		begins.rules = append(begins.rules,
			join(is, isIn(answered.Name, regKey), put(answered.Name, regKey, 0, answeredKept), passes),
			join(is, isIn(begun.Name, regKey), put(begun.Name, regKey, 0, begunKept), passes))
		counts.rules = append(counts.rules, join(is, put(begun.Name, regKey, 0, begunKept), passes))
		if !k.isAnswered {
			continue
		}
		is = f.flowOf(k, false)
		answers.rules = append(answers.rules,
			join(is, isIn(begun.Name, regKey), put(begun.Name, regKey, 0, begunKept), back()),
			join(is, put(answered.Name, regKey, 0, answeredKept), back()))
	}
	begins.rules = append(begins.rules, goTo(counts.name))
	counts.rules = append(counts.rules, passes)
	return begins, counts, answers
}

// pace makes what a tenant's pods begin beside it keep a pace, or with 0 leaves it alone.
func (c *change) pace(tenant uint16, perSecond uint32) {
	k, there := native(uint32(tenant)), false
	for name := range c.snap.chains {
		if isDirectChain(name, tenant) {
			there = true
			c.unhook(name)
		}
	}
	c.delete(setPaces, k)
	for _, f := range families {
		c.delete(setBegins+f.version, k)
		c.delete(setAnswers+f.version, k)
	}
	begun, answered := directSets(tenant)
	if perSecond == 0 {
		if there {
			c.unmade = append(c.unmade, begun, answered)
		}
		return
	}
	c.made = append(c.made, begun, answered)
	lead := func(set string, kind expr.VerdictKind, to chain) {
		c.branch(to)
		c.set(set, k, &element{verdict: &expr.Verdict{Kind: kind, Chain: to.name}, comment: to.name})
	}
	pace := paceChain(tenant, perSecond)
	c.stateful[pace.name] = true
	lead(setPaces, expr.VerdictJump, pace)
	for _, f := range families {
		begins, counts, answers := f.direct(tenant, perSecond)
		c.branch(counts)
		lead(setBegins+f.version, expr.VerdictGoto, begins)
		lead(setAnswers+f.version, expr.VerdictGoto, answers)
	}
}

// isDirectChain reports whether a chain is a tenant's, whatever the pace.
func isDirectChain(name string, tenant uint16) bool {
	kinds := []string{chainPace}
	for _, f := range families {
		kinds = append(kinds, chainBegins+f.version, chainCounts+f.version, chainAnswers+f.version)
	}
	return slices.ContainsFunc(kinds, func(kind string) bool {
		of := directChain(kind, tenant)
		return name == of || strings.HasPrefix(name, of+"_")
	})
}

// paceOf is the pace that the tables have for a tenant, 0 for none.
func (s *snapshot) paceOf(tenant uint16) uint32 {
	e := s.sets[setPaces][string(native(uint32(tenant)))]
	n, err := strconv.ParseUint(e.comment[strings.LastIndexByte(e.comment, '_')+1:], 10, 32)
	if err != nil {
		return 0 // none is there: nobody else writes into it
	}
	return uint32(n)
}
