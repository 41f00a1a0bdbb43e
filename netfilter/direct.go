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
// a beginning, and SYNs that are excluded. Only the pods' own chains lead there: the
// kernel walks through all that a packet of a pod can come to with each change, so that
// what all share may not lead to the chains of every tenant.
//
// Each tenant that has a pace has sets of its own, so that none can fill another's: of
// what its pods have begun, and of what others have, which pods may answer. Whatever finds
// no room in there counts with each packet.
//
// A flow is what conntrack takes for one, so that the veth isn't in its key: who forges a
// source begins nothing where the entry is there.
const (
	// setHeard are flows of others that nobody may have answered: anybody fills it, so that
	// they don't stay for long. What a pod answers goes into setAnswered, and passes without
	// if there is no room.
	setBegun, setHeard, setAnswered = "begun_", "heard_", "answered_"
	leastBegun, mostBegun           = 65536, maxFlows
	maxHeard, maxAnswered           = 65536, 16384
	// begunKept is after a flow's last packet, about as long as conntrack keeps it.
	begunKept    = time.Minute
	heardKept    = 3 * time.Second
	answeredKept = 30 * time.Second

	// Of a tenant, one of each for each family, and one pace: its index and the pace are
	// behind it.
	chainBegins, chainCounts, chainExcludes, chainAnswers, chainPace = "begins", "counts", "excludes", "answers", "pace"
)

// flowSet has flows of either family for keys: the pod's address and port, the peer's,
// and the protocol.
func flowSet(name string, size uint32) *nftables.Set {
	return &nftables.Set{Table: steering, Name: name, HasTimeout: true, Dynamic: true, Concatenation: true, Size: size,
		KeyType: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeIP6Addr, nftables.TypeInetService, nftables.TypeInetProto)}
}

// pacedFlows are a tenant's sets.
type pacedFlows struct{ begun, heard, answered *nftables.Set }

// flowsOf are the sets of a tenant with a pace: there is room for what can begin while it
// is remembered.
func flowsOf(tenant uint16, perSecond uint32) pacedFlows {
	n := strconv.Itoa(int(tenant))
	// A second's worth more comes at once, and the kernel sweeps once a second.
	most, begun := uint64(perSecond)*uint64(begunKept/time.Second+2), uint32(leastBegun)
	for begun < mostBegun && uint64(begun) < most {
		begun *= 2
	}
	// The size of a set can't be changed, so that its name has it.
	return pacedFlows{flowSet(setBegun+n+"_"+strconv.Itoa(int(begun)), begun), flowSet(setHeard+n, maxHeard), flowSet(setAnswered+n, maxAnswered)}
}

func isFlowSet(name string) bool {
	return slices.ContainsFunc([]string{setBegun, setHeard, setAnswered}, func(of string) bool { return strings.HasPrefix(name, of) })
}

func (p pacedFlows) all() []*nftables.Set { return []*nftables.Set{p.begun, p.heard, p.answered} }

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

// besideOut is for what passes beside the tenant of a pod without a pace.
func (f family) besideOut() chain {
	return chain{chainBesideOut + f.version, []rule{f.isExcluded(goTo(chainExempted + f.version)), accept()}}
}

// isExcluded matches, of what passes beside a tenant, TCP that isn't for the node.
func (f family) isExcluded(then rule) rule {
	return isTCP(join(network(f.destination, f.length, regKey), isNotIn(setNode+f.version, regKey), then))
}

// paceChain drops what is too fast of what a tenant's pods begin beside it, for all
// protocols and both families together.
func paceChain(tenant uint16, perSecond uint32) chain {
	// Like eBPF's: a second's worth at once, after a rest.
	return chain{directChain(chainPace, tenant) + "_" + strconv.Itoa(int(perSecond)), []rule{join(
		rule{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(perSecond), Unit: expr.LimitTimeSecond, Burst: perSecond, Over: true}},
		goTo(dropChain(dropDirectTooFast, false)))}}
}

func directChain(kind string, tenant uint16) string { return kind + "_" + strconv.Itoa(int(tenant)) }

// direct are the chains of what a tenant's pods begin, of what of it counts, of what is
// excluded, and of what they get. None changes the packet's mark.
func (f family) direct(tenant uint16, perSecond uint32) (begins, counts, excludes, answers chain) {
	flows := flowsOf(tenant, perSecond)
	begun, heard, answered := flows.begun.Name, flows.heard.Name, flows.answered.Name
	named := func(kind string) string { return f.directChain(kind, tenant, perSecond) }
	begins.name, counts.name, excludes.name, answers.name = named(chainBegins), named(chainCounts), named(chainExcludes), named(chainAnswers)
	pace := jump(paceChain(tenant, perSecond).name)
	isICMP := join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, f.icmp))
	isAnswer := join(isICMP, transport(0, 1, regTemp))
	for _, request := range f.requests {
		isAnswer = join(isAnswer, differs(regTemp, request))
	}
	begins.rules = []rule{f.isExcluded(goTo(excludes.name)), f.isLater(accept()), join(isAnswer, accept()),
		join(isTCP(nil), opens(), goTo(counts.name))} // a SYN begins another one in any case
	counts.rules = []rule{pace}
	excludes.rules = []rule{pace, goTo(chainExempted + f.version)}
	answers.rules = []rule{f.isLater(accept()), join(isICMP, accept())}
	for _, k := range f.kinds() {
		is := f.flowOf(k, true)
		if k.isAnswered {
			begins.rules = append(begins.rules,
				join(is, isIn(answered, regKey), put(answered, regKey, 0, answeredKept), accept()),
				join(is, isIn(heard, regKey), put(answered, regKey, 0, answeredKept), accept()),
				join(is, isIn(heard, regKey), accept()))
		}
		begins.rules = append(begins.rules, join(is, isIn(begun, regKey), put(begun, regKey, 0, begunKept), accept()))
		counts.rules = append(counts.rules, join(is, put(begun, regKey, 0, begunKept), accept()))
		if !k.isAnswered {
			continue
		}
		is = f.flowOf(k, false)
		answers.rules = append(answers.rules,
			join(is, isIn(begun, regKey), put(begun, regKey, 0, begunKept), accept()),
			join(is, isIn(answered, regKey), put(answered, regKey, 0, answeredKept), accept()),
			join(is, put(heard, regKey, 0, heardKept), accept()))
	}
	begins.rules = append(begins.rules, goTo(counts.name))
	counts.rules = append(counts.rules, accept())
	answers.rules = append(answers.rules, accept())
	return begins, counts, excludes, answers
}

func (f family) directChain(kind string, tenant uint16, perSecond uint32) string {
	return directChain(kind+f.version, tenant) + "_" + strconv.Itoa(int(perSecond))
}

// pace makes what a tenant's pods begin beside it keep a pace, or with 0 leaves it alone.
func (c *change) pace(tenant uint16, perSecond uint32) {
	for name := range c.snap.chains {
		if isDirectChain(name, tenant) {
			c.unhook(name)
		}
	}
	wanted := map[string]bool{}
	if perSecond > 0 {
		for _, s := range flowsOf(tenant, perSecond).all() {
			c.made = append(c.made, s)
			wanted[s.Name] = true
		}
		pace := paceChain(tenant, perSecond)
		c.stateful[pace.name] = true
		c.branch(pace)
		for _, f := range families {
			begins, counts, excludes, answers := f.direct(tenant, perSecond)
			for _, of := range []chain{begins, counts, excludes, answers} {
				c.branch(of)
			}
		}
	}
	for name, s := range c.snap.flows {
		if !wanted[name] && isOfTenant(name, tenant, setBegun, setHeard, setAnswered) {
			c.unmade = append(c.unmade, s)
		}
	}
	// Others are led when they have a pod.
	if account := tenantAccount(tenant); c.snap.chains[chainSends+account] {
		c.lead(account, tenant, perSecond)
	}
}

// isDirectChain reports whether a chain is a tenant's, whatever the pace.
func isDirectChain(name string, tenant uint16) bool {
	kinds := []string{chainPace + "_"}
	for _, f := range families {
		for _, kind := range []string{chainBegins, chainCounts, chainExcludes, chainAnswers} {
			kinds = append(kinds, kind+f.version+"_")
		}
	}
	return isOfTenant(name, tenant, kinds...)
}

// isOfTenant reports whether behind one of the beginnings of a name is a tenant's index.
func isOfTenant(name string, tenant uint16, beginnings ...string) bool {
	return slices.ContainsFunc(beginnings, func(beginning string) bool {
		index, ok := strings.CutPrefix(name, beginning)
		index, _, _ = strings.Cut(index, "_")
		return ok && index == strconv.Itoa(int(tenant))
	})
}

// paceOf is the pace that the tables have for a tenant, 0 for none.
func (s *snapshot) paceOf(tenant uint16) uint32 {
	for name := range s.chains {
		if rate, ok := strings.CutPrefix(name, directChain(chainPace, tenant)+"_"); ok {
			if n, err := strconv.ParseUint(rate, 10, 32); err == nil {
				return uint32(n)
			}
		}
	}
	return 0
}
