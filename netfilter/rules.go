package netfilter

import (
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// How long a flow that is written down is kept after the last packet that came to the
// pod: while it goes on, and when one end has ended it.
const (
	flowIdle    = 2*time.Hour + 10*time.Minute
	endedLinger = 70 * time.Second
	// alone is after a SYN that nobody has answered, and in the clear when both ends have
	// ended a flow, or its pod has by a RST.
	alone = 10 * time.Second
	// dialledLinger is for the answer to a SYN from the tunnels' port.
	dialledLinger = 130 * time.Second
	// refusedLinger is for the answer to a SYN to get to the pod.
	refusedLinger = time.Second
)

const (
	portInbound = 15008

	// Of each family.
	chainFromPod = "from_pod"
	chainToPod   = "to_pod"
	// What passes beside the tenant, and what is to be written down, these let back to where
	// they were called.
	chainSteerFrom = "steer_from_pod"
	chainSteerTo   = "steer_to_pod"
	chainBesideOut = "beside_out"
	// chainExempted is of SYNs that are excluded, when they have kept the pace.
	chainExempted   = "out_exempted"
	chainFromTenant = "from_tenant"
	// chainDialled is of what a tenant answers to a pod that has called from the tunnels' port.
	chainDialled = "from_tenant_dialled"
	// chainBack sends a packet back to the tenant that it came from.
	chainBack = "back_to_tenant"
	// chainRefuse answers a pod's SYN as a host does that has no listener, chainTaken a
	// tenant's.
	chainRefuse, chainTaken = "refuse", "ports_taken"

	// chainAgain is of peers' SYNs with the ports of what passes in the clear.
	chainAgain = "in_again"

	// chainWrapped drops packets in others, but those of pods that aren't in the mesh (any
	// more).
	chainWrapped = "wrapped"

	// Of a packet's mark, in from_tenant only: whether its source and destination
	// are pods that the tenant may speak for, or to.
	markFrom, markTo = 1, 2
)

// chain is a chain's rules.
type chain struct {
	name  string
	rules []rule
}

// hostChains are the chains that all veths share. pass is the bit of the mark that
// says that a packet is for the pod itself, own the priority of what tenants' own pods
// send them.
func hostChains(pass, own uint32) []chain {
	var chains []chain
	for reason := 1; reason < dropReasons; reason++ {
		for _, out := range []bool{false, true} {
			device := iif
			if out {
				device = oif
			}
			rules := append(counted(reason, device), join(isTCP(nil), opens(), jump(tellChain(reason, out))), drop()) // also where there is no room to count
			chains = append(chains, chain{dropChain(reason, out), rules},
				chain{tellChain(reason, out), tell(device, setDeniedPace, deniedPerSecond, deniedPrefix(reasonNames[reason]))})
		}
	}
	for _, way := range []struct {
		name   string
		device func(uint32) rule
	}{{"out", iif}, {"in", oif}} {
		chains = append(chains, chain{"tell_direct_" + way.name, tell(way.device, setDirectPace, directPerSecond, prefixDirectOpened)},
			chain{"tell_direct_ends_" + way.name, tell(way.device, setDirectPace, directPerSecond, prefixDirectClosed)})
	}
	chains = append(chains,
		chain{chainSteerFrom, byProtocol(chainFromPod, accept())},
		chain{chainSteerTo, byProtocol(chainToPod, accept())},
		chain{chainFromTenant, append([]rule{join(meta(expr.MetaKeyPROTOCOL, regTemp), equal(regTemp, big16(unix.ETH_P_ARP)...), accept())},
			byProtocol(chainFromTenant, goTo(dropChain(dropMalformed, false)))...)},
		chain{chainBack, []rule{
			join(iif(regKey), find(setTenantOf, regKey, regFound), markFound()), join(setPriority(own), forward()), goTo(dropChain(dropNoTenant, false)),
		}},
		chain{chainWrapped, []rule{
			onlyMark(1), join(iif(regKey), find(setPods, regKey, regFound), markFound()),
			join(markIs(0), back()), goTo(dropChain(dropProtocol, false)),
		}},
		chain{chainRefuse, append(counted(dropUnsteered, iif), jump(tellChain(dropUnsteered, false)), refuseTCP())},
		chain{chainTaken, append(counted(dropPortsTaken, iif), jump(tellChain(dropPortsTaken, false)), refuseTCP())},
	)
	for _, f := range families {
		chains = append(chains, f.fromPod(own)...)
		chains = append(chains, f.toPod(pass)...)
		chains = append(chains, f.besideOut())
		chains = append(chains, f.fromTenant(pass)...)
	}
	return chains
}

// counted counts a packet that is dropped, of the interface that device loads.
func counted(reason int, device func(uint32) rule) []rule {
	why := immediate(regKey+1, native(uint32(reason))...)
	return []rule{
		join(device(regKey), why, put(setDrops, regKey, 0, 0, counter())),
		// Its tenant's count goes on when the pod has ended.
		onlyMark(0),
		join(device(regKey), find(setPods, regKey, regFound), markFound()),
		join(device(regKey), find(setTenantOf, regKey, regFound), markFound()),
		join(theMark(regKey), why, put(setTenantDrops, regKey, 0, 0, counter())),
	}
}

// byProtocol leads to a chain for each family. The kernel has taken off one VLAN
// tag already; TCP may be behind the second.
func byProtocol(name string, others rule) (rules []rule) {
	is := func(etherType uint16, then rule) {
		rules = append(rules, join(meta(expr.MetaKeyPROTOCOL, regTemp), equal(regTemp, big16(etherType)...), then))
	}
	for _, f := range families {
		rules = append(rules, join(f.isEtherType(), goTo(name+f.version)))
	}
	is(unix.ETH_P_8021Q, goTo(dropChain(dropMalformed, name == chainToPod)))
	is(unix.ETH_P_8021AD, goTo(dropChain(dropMalformed, name == chainToPod)))
	return append(rules, others)
}

func isTCP(then rule) rule {
	return join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, unix.IPPROTO_TCP), then)
}

// isOther doesn't match either what can't be read to its end.
func isOther(then rule) rule {
	return join(meta(expr.MetaKeyL4PROTO, regTemp), differs(regTemp, unix.IPPROTO_TCP), then)
}

// isWrapped matches packets that a node with such a tunnel would unwrap, and send on what
// is in them as if it had come from there: TCP past the proxy, with any source.
func isWrapped(then rule) (rules []rule) {
	// The protocol comes last: nft aborts when it is to list a header behind one of GRE.
	is := func(protocol byte, what rule) {
		rules = append(rules, join(what, meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, protocol), then))
	}
	is(unix.IPPROTO_IPIP, nil)
	is(unix.IPPROTO_IPV6, nil)
	// Version 1 is PPTP's, which no interface of the node takes.
	is(unix.IPPROTO_GRE, join(transport(1, 1, regTemp), masked(regTemp, []byte{7}, []byte{0}), equal(regTemp, 0)))
	for _, port := range []uint16{4789, 8472, 6081} { // VXLAN's by IANA, and Linux's before, Geneve's
		is(unix.IPPROTO_UDP, isPort(2, port))
	}
	return rules
}

// isPort matches the source port of TCP or UDP, at 0, or the destination port, at 2.
func isPort(at uint32, port uint16) rule {
	return join(transport(at, 2, regTemp), equal(regTemp, big16(port)...))
}

// isFragment matches each part of a packet; a whole packet with a fragment header
// is none.
func (f family) isFragment(then rule) rule { return f.fragment(0x3fff, 0xfff9, then) }

// fragment matches packets with any of these bits in what says which fragment it is.
func (f family) fragment(bits4, bits6 uint16, then rule) rule {
	if f.version == "4" {
		return join(network(6, 2, regTemp), masked(regTemp, big16(bits4), []byte{0, 0}), differs(regTemp, 0, 0), then)
	}
	return join(rule{&expr.Exthdr{DestRegister: regTemp, Type: unix.IPPROTO_FRAGMENT, Offset: 2, Len: 2, Op: expr.ExthdrOpIpv6}},
		masked(regTemp, big16(bits6), []byte{0, 0}), differs(regTemp, 0, 0), then)
}

// isEtherType matches packets of the family, in the table of the node.
func (f family) isEtherType() rule {
	return join(meta(expr.MetaKeyPROTOCOL, regTemp), equal(regTemp, big16(f.etherType)...))
}

func (f family) words() uint32 { return f.length / 4 }

// flow loads a flow's key: the pod's end, and the other one's.
func (f family) flow(podIsSource bool) rule {
	pod, podPort, peer, peerPort := f.source, uint32(0), f.destination, uint32(2)
	if !podIsSource {
		pod, podPort, peer, peerPort = peer, peerPort, pod, podPort
	}
	n := f.words()
	return join(network(pod, f.length, regKey), transport(podPort, 2, regKey+n),
		network(peer, f.length, regKey+n+1), transport(peerPort, 2, regKey+2*n+1))
}

// quoted loads the key of the flow that an ICMP error tells of: of a packet that
// the pod, or its tenant as the pod, has sent.
func (f family) quoted() rule {
	header := map[string]uint32{"4": 20, "6": 40}[f.version] // without options: as far as rules can see
	n := f.words()
	return join(transport(8+f.source, f.length, regKey), transport(8+header, 2, regKey+n),
		transport(8+f.destination, f.length, regKey+n+1), transport(8+header+2, 2, regKey+2*n+1))
}

// fromPod: ingress of a pod's veth.
func (f family) fromPod(priority uint32) []chain {
	v := f.version
	tcp, own, self := "from_pod_tcp"+v, "from_pod_own"+v, "from_pod_self"+v
	chains := []chain{
		{chainFromPod + v, append(append([]rule{isTCP(goTo(tcp))}, isWrapped(goTo(chainWrapped))...),
			isOther(back()), goTo(dropChain(dropMalformed, false)))},
		{tcp, []rule{
			join(iif(regKey), network(f.source, f.length, regKey+1), isIn(setSent+v, regKey), goTo(own)),
			goTo(dropChain(dropSpoofed, false)),
		}},
		{own, []rule{
			f.isFragment(goTo(dropChain(dropFragment, false))),
			join(network(f.destination, f.length, regKey), isIn(setNode+v, regKey), back()),
			join(network(f.destination, f.length, regKey), equal(regKey, f.self.AsSlice()...), goTo(self)),
			join(opens(), goTo("out_opens"+v)),
			goTo("out" + v),
		}},
		{self, []rule{
			join(iif(regKey), find(setPods, regKey, regFound), markFound()),
			join(network(f.source, f.length, regKey), readdress(f, f.destination, regKey), setPriority(priority), forward()),
			goTo(dropChain(dropNoTenant, false)),
		}},
	}
	return append(chains, f.belongs("out", iif, true, false, join(setPriority(priority), forward()), []rule{accept()})...)
}

// toPod: egress of a pod's veth.
func (f family) toPod(pass uint32) []chain {
	v := f.version
	tcp, icmp, given := "to_pod_tcp"+v, "to_pod_icmp"+v, "to_pod_given"+v
	address := join(oif(regKey), network(f.destination, f.length, regKey+1))
	chains := []chain{
		{chainToPod + v, append(append([]rule{isTCP(goTo(tcp))}, f.quotesTCP(goTo(icmp))...),
			isOther(back()), goTo(dropChain(dropMalformed, true)))},
		{tcp, []rule{
			// What the node made, or a tenant delivers. A process of the node may answer for a
			// service, in a flow that is written down as one in the clear.
			join(hasMark(pass), f.flow(false), find(setFlows+v, regKey, regFound), equal(regFound, native(0)...), goTo("in"+v)),
			join(hasMark(pass), goTo(given)),
			join(isPort(0, portInbound), resets(), f.flow(false), isIn(setRefused+v, regKey), goTo(given)),
			f.isFragment(goTo(dropChain(dropFragment, true))),
			// A bridge floods its ports with what it doesn't know the place of. Without a
			// match nothing is counted.
			join(address, isNotIn(setReceived+v, regKey), goTo(dropChain(dropNotThePod, true))),
			join(opens(), goTo("in_opens"+v)),
			goTo("in" + v),
		}},
		{given, []rule{
			join(address, isIn(setReceived+v, regKey)), // counts
			join(network(f.source, f.length, regKey), isIn(setNode+v, regKey), back()),
			accept(),
		}},
		{icmp, []rule{
			join(hasMark(pass), transport(8+f.destination, f.length, regKey), isIn(setNode+v, regKey), accept()),
			join(address, isNotIn(setReceived+v, regKey), goTo(dropChain(dropNotThePod, true))),
			// The flow's tenant, or else the pod's.
			onlyMark(0),
			join(f.quoted(), isNotIn(setFlows+v, regKey), oif(regKey), find(setPods, regKey, regFound), markFound()),
			join(f.quoted(), find(setFlows+v, regKey, regFound), markFound()),
			join(markIs(0), accept()),
			forward(),
			goTo(dropChain(dropNoTenant, true)),
		}},
	}
	chains = append(chains, f.again()...)
	return append(chains, f.belongs("in", oif, false, true, forward(), []rule{goTo(given)})...)
}

// again are the chains of a peer's SYN with the ports of a flow in the clear: they ask the
// pod's kernel, which alone knows whether there still is a connection.
func (f family) again() []chain {
	v := f.version
	ask := "ask_pod" + v
	var rules []rule
	// Of data with it a connection would take what fits.
	for words := byte(5); words <= 15; words++ {
		length := 4 * uint16(words)
		if v == "4" {
			length += 20 // its header's own is in it
		}
		rules = append(rules, join(transport(12, 1, regTemp), masked(regTemp, []byte{0xf0}, []byte{0}), equal(regTemp, words<<4),
			network(f.lengthAt, 2, regTemp), equal(regTemp, big16(length)...), goTo(ask)))
	}
	return []chain{
		{chainAgain + v, append(rules, goTo(dropChain(dropMidstream, true)))},
		{ask, []rule{toQuestion(), goTo("in_direct" + v)}},
	}
}

// quotesTCP matches ICMP errors about a packet of TCP.
func (f family) quotesTCP(then rule) (rules []rule) {
	quoted := uint32(8 + 6) // the next header of IPv6
	is := []rule{join(masked(regTemp, []byte{0x80}, []byte{0}), equal(regTemp, 0))}
	if f.version == "4" {
		// Destination unreachable, time exceeded, parameter problem.
		quoted, is = 8+9, []rule{equal(regTemp, 3), equal(regTemp, 11), equal(regTemp, 12)}
	}
	for _, kind := range is {
		rules = append(rules, join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, f.icmp), transport(0, 1, regTemp), kind,
			transport(quoted, 1, regTemp), equal(regTemp, unix.IPPROTO_TCP), then))
	}
	return rules
}

// belongs are the chains that find out where a packet of a pod's flow goes: to the
// tenant that the mark says, or directly.
func (f family) belongs(way string, device func(uint32) rule, podIsSource, out bool, toTenant rule, direct []rule) []chain {
	v := f.version
	flow := f.flow(podIsSource)
	pod := network(f.source, f.length, regKey)
	if !podIsSource {
		pod = network(f.destination, f.length, regKey)
	}
	tenant := join(device(regKey), find(setPods, regKey, regFound), markFound())
	// In one step: between two its time could end, and it would look like one in the clear.
	known := join(flow, find(setFlows+v, regKey, regFound), markFound())
	held, goes, led := way+"_held"+v, way+"_goes"+v, way+"_led"+v
	var goesOn []rule // what doesn't open a flow, and belongs to none that is written down
	steered := []rule{join(pod, isIn(setLearn+v, regKey), letBack(markWrite))}
	opened := []rule{join(known, goTo(goes))}
	written := []rule{join(markIs(0), goTo(way+"_passed"+v))}
	excluded := passes(passedExcluded, goTo(way+"_clear"+v))
	if podIsSource {
		// Tunnels are the proxies' alone. To a pod of the same tenant on this node this would
		// look like the proxy's own, and its answers would stay in there.
		tunnel := isPort(2, portInbound)
		goesOn = []rule{join(tunnel, goTo(dropChain(dropUnsteered, out)))}
		steered = append([]rule{join(tunnel, device(regKey), keepsPace(setRefusedPace, refusedPerSecond), flow, put(setRefused+v, regKey, 0, refusedLinger), goTo(chainRefuse)),
			goesOn[0]}, steered...)
		// A SYN that is sent again goes where the first one went. What else a former tenant has
		// gets none of the pod's: it could take up ports beforehand, and would get what the pod
		// opens from them.
		written = append(written, join(flow, put(setLed+v, regKey, 0, alone)))
		opened = []rule{join(flow, isIn(setLed+v, regKey), known, goTo(goes)), join(known, markIs(0), goTo(goes)),
			join(flow, immediate(regFound, native(0)...), remove(setFlows+v, regKey, regFound))}
		steered = append(steered, f.dials(letBack(markDial)))
	} else {
		// An end can be hidden from here, and the pod would take a SYN that comes behind it.
		opened = slices.Insert(opened, 0, join(known, markIs(0), isNotIn(setBeginning+v, regKey), goTo(chainAgain+v)))
	}
	chains := []chain{
		{way + "_opens" + v, slices.Concat(f.forget(podIsSource), opened, []rule{
			onlyMark(0), tenant,
			// A pod that isn't in the mesh (any more).
			join(markIs(0), goTo(way+"_clear"+v)),
		}, f.exempt(way, device, podIsSource))},
		// At no pace: the bound is for what passes beside a proxy that works.
		{way + "_bypassed" + v, passes(passedBypassed, goTo(way+"_clear"+v))},
		// What opens in the clear is written down.
		{way + "_clear" + v, []rule{onlyMark(0), letBack(markWrite)}},
		{way + "_written" + v, append(written, goTo(led))},
		{way + "_passed" + v, []rule{join(flow, put(setBeginning+v, regKey, 0, alone)), join(device(regKey), put(setDirect, regKey, 0, 0, counter())), jump("tell_direct_" + way), goTo(way + "_direct" + v)}},
		{way + "_steered" + v, append(steered, goTo(led))},
		{led, []rule{toTenant, goTo(dropChain(dropNoTenant, out))}},
		{way + v, append(append([]rule{join(known, goTo(held))}, goesOn...),
			onlyMark(0), tenant,
			toTenant,
			join(markIs(0), goTo(dropChain(dropMidstream, out))),
			goTo(dropChain(dropNoTenant, out)),
		)},
		{held, []rule{join(markIs(0), ends(), flow, isNotIn(setEnded+v, regKey), isNotIn(setPeerEnded+v, regKey), jump("tell_direct_ends_"+way)),
			letBack(markWrite)}},
		{goes, []rule{
			join(markIs(0), goTo(way+"_direct"+v)),
			toTenant,
			goTo(dropChain(dropNoTenant, out)),
		}},
		{way + "_direct" + v, direct},
	}
	if podIsSource {
		// Its tenant may have a pace.
		return append(chains, chain{way + "_excluded" + v, []rule{back()}}, chain{chainExempted + v, excluded})
	}
	return append(chains, chain{way + "_excluded" + v, excluded})
}

// forget deletes a flow that has ended, when another begins with the same ports.
func (f family) forget(podIsSource bool) (rules []rule) {
	v := f.version
	for _, set := range []string{setEnded + v, setPeerEnded + v} {
		ended := join(f.flow(podIsSource), isIn(set, regKey))
		rules = append(rules, join(ended, immediate(regFound, native(0)...), remove(setFlows+v, regKey, regFound)),
			join(ended, remove(set, regKey, 0)))
	}
	return rules
}

// ends are a packet's two ends, as a tenant's pods may be at either.
func (f family) ends() []end {
	return []end{{true, f.source, markFrom}, {false, f.destination, markTo}}
}

type end struct {
	podIsSource bool
	address     uint32
	mark        uint32
}

// whose are the chains of the veth of a tenant, the first of which is for its hook:
// for which ends of a packet it may speak, which the mark says afterwards. What is
// behind it is hostile: any address can be bound in there. Of a pod that isn't its
// own any more it has the flows that stayed, of one that is its own not those that
// stayed with another.
func whose(tenant uint16, name string) []chain {
	index := immediate(regFound, native(uint32(tenant))...)
	chains := []chain{{name: name}, {name: whoseChain(tenant, "none")}, {name: whoseChain(tenant, "from")}}
	for i := range chains {
		end := min(i, 1)
		touch := chain{name: whoseChain(tenant, []string{"held_from", "held_to"}[end])}
		for _, f := range families {
			e := f.ends()[end]
			yes, no := goTo(chains[2].name), goTo(chains[1].name)
			if i > 0 {
				mark := []uint32{0, 0, markFrom}[i]
				yes, no = join(onlyMark(mark|markTo), goTo(chainFromTenant)), join(onlyMark(mark), goTo(chainFromTenant))
			}
			is := join(f.isEtherType(), isTCP(nil))
			address, flow := network(e.address, f.length, regKey), f.flow(e.podIsSource)
			chains[i].rules = append(chains[i].rules,
				join(is, onlyMark(0)),
				join(is, address, find(setOwners+f.version, regKey, regFound), markFound()))
			// One with another tenant that has ended makes room for one with the same ports.
			for _, r := range f.forget(e.podIsSource) {
				chains[i].rules = append(chains[i].rules, join(is, markIs(uint32(tenant)), opens(), r))
			}
			chains[i].rules = append(chains[i].rules,
				join(is, flow, find(setFlows+f.version, regKey, regFound), markFound()),
				join(is, markIs(uint32(tenant)), flow, isIn(setFlows+f.version, regKey), jump(touch.name)),
				// What it opens for a pod that is about to move.
				join(is, markIs(uint32(tenant)), opens(), address, isIn(setLearn+f.version, regKey), flow, isNotIn(setFlows+f.version, regKey),
					remove(setLed+f.version, regKey, 0), f.charge(tenantAccount(tenant), e.podIsSource, index, alone)),
				// What it opens for a pod that has left it, but isn't done with it. Its answers
				// would go to the pod's tenant, were it not written down.
				join(is, opens(), flow, isNotIn(setFlows+f.version, regKey), immediate(regKey, native(uint32(tenant))...),
					network(e.address, f.length, regKey+1), isIn(setFormers+f.version, regKey),
					flow, remove(setLed+f.version, regKey, 0), f.charge(tenantAccount(tenant), e.podIsSource, index, alone), onlyMark(uint32(tenant))),
			)
			if i == 2 {
				chains[i].rules = append(chains[i].rules, join(is, markIs(uint32(tenant)), f.isDialled(tenantAccount(tenant)), onlyMark(markFrom|markTo), goTo(chainDialled+f.version)))
			}
			chains[i].rules = append(chains[i].rules, join(is, markIs(uint32(tenant)), yes))
			// What reaches no pod, or not as the tenant's.
			for _, end := range [][]int{nil, {1, 0}, {1}}[i] {
				chains[i].rules = append(chains[i].rules, join(is, opens(), jump(whoseChain(tenant, takenOf[end]))))
			}
			chains[i].rules = append(chains[i].rules, join(is, no))
			for _, r := range f.touch(tenantAccount(tenant), e.podIsSource, overTenants, index, back()) {
				touch.rules = append(touch.rules, join(is, r))
			}
		}
		chains[i].rules = append(chains[i].rules, goTo(chainFromTenant))
		if i < 2 {
			chains = append(chains, touch)
		}
	}
	for i, name := range takenOf {
		of := chain{name: whoseChain(tenant, name), rules: []rule{onlyMark(0)}}
		for _, f := range families {
			of.rules = append(of.rules, f.taken(tenant, f.ends()[i])...)
		}
		chains = append(chains, of)
	}
	return chains
}

// takenOf are the chains of taken, in the order of ends.
var takenOf = []string{"taken_from", "taken_to"}

// taken refuses a SYN of a tenant that may open flows of that end, if this one is
// another's: it chooses another port then. Who may open none learns nothing.
func (f family) taken(tenant uint16, e end) []rule {
	is, address := f.isEtherType(), network(e.address, f.length, regKey)
	written := join(f.flow(e.podIsSource), isIn(setFlows+f.version, regKey), goTo(chainTaken))
	return []rule{
		join(is, address, find(setOwners+f.version, regKey, regFound), markFound(), markIs(uint32(tenant)), written),
		join(is, immediate(regKey, native(uint32(tenant))...), network(e.address, f.length, regKey+1), isIn(setFormers+f.version, regKey), written),
	}
}

func whoseChain(tenant uint16, what string) string {
	return "whose_" + strconv.Itoa(int(tenant)) + "_" + what
}

// fromTenant: ingress of the node's end of a tenant's veth, when it is known for
// which ends the tenant may speak.
func (f family) fromTenant(pass uint32) []chain {
	v := f.version
	tcp, deliver := "from_tenant_tcp"+v, "from_tenant_deliver"+v
	first := []rule{isTCP(goTo(tcp))}
	if v == "6" {
		for _, neighbour := range []byte{135, 136} { // solicitation, advertisement
			first = append(first, join(meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, unix.IPPROTO_ICMPV6), transport(0, 1, regTemp), equal(regTemp, neighbour), accept()))
		}
	}
	whole := f.isFragment(goTo(dropChain(dropFragment, false)))
	rules := []rule{whole}
	add := func(r ...rule) { rules = append(rules, join(r...)) }
	add(network(f.source, f.length, regKey), equal(regKey, f.deliver.AsSlice()...), lacksMark(markTo), goTo(dropChain(dropDeliver, false)))
	// A tunnel between two of its own pods has both ends in there.
	for _, port := range []uint32{0, 2} {
		add(hasMark(markFrom|markTo), isPort(port, portInbound), goTo(chainBack))
	}
	add(goTo(deliver))
	tunnelled := rules
	rules = nil
	add(hasMark(markTo), network(f.source, f.length, regKey), network(f.destination, f.length, regKey+f.words()), isIn(setSelf+v, regKey),
		immediate(regKey, f.self.AsSlice()...), readdress(f, f.source, regKey))
	pod := network(f.destination, f.length, regKey)
	add(hasMark(markTo), pod, find(setMACs+v, regKey, regMAC), toMAC(), onlyMark(pass), pod, find(setAddresses+v, regKey, regFound), out())
	// Into the node's stack, from the tenant's veth: with the pod's address.
	add(hasMark(markFrom), lacksMark(markTo), onlyMark(0), accept())
	add(goTo(dropChain(dropForeign, false)))
	return []chain{
		{chainFromTenant + v, append(first, isOther(goTo(dropChain(dropProtocol, false))), goTo(dropChain(dropMalformed, false)))},
		{tcp, tunnelled},
		{chainDialled + v, []rule{whole, goTo(deliver)}},
		{deliver, rules},
	}
}
