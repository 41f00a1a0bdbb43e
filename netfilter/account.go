package netfilter

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
)

// What rules write down of flows is charged to an account, and each account has as many
// as any other: a tenant's pods have one together, which the tenant has as well, and a pod
// that has left the mesh, or is about to join it, has one of its own. An account is a set
// of flows, of which the kernel lets no rule write more than its size; only rules write
// into it. Flows are written into one that has room first, in the same rule and for as
// long.
//
// The chains that all pods share can't lead to those of an account (see direct.go): what
// they would have written they let back, marked, to the pod's own.
const (
	// setKept is the set of an account, of either family; the account's name is behind it.
	setKept = "kept_"
	maxKept = 16384
	// setDialled has flows of an account that its pods opened from the tunnels' port, to pods
	// of this node.
	setDialled = "dialled_"
	maxDialled = 1024

	// Of an account: where its pods' chains lead, and what writes flows down.
	chainSends, chainGets     = "sends_", "gets_"
	chainKeepOut, chainKeepIn = "keep_out", "keep_in"
	chainDial                 = "dial"
)

// A packet that is let back is marked in the lower half with the tenant that its flow goes
// to, and in the upper with what is to be written: to the account's flows, or to those that
// begin at the tunnels' port.
const markWrite, markDial, markWhat = 0xb17e0000, 0xb17f0000, 0xffff0000

// letBack lets a packet's flow be written down.
func letBack(what uint32) rule { return join(setMark(markWhat, what), back()) }

func isLetBack(what uint32) rule {
	return join(theMark(regTemp), masked(regTemp, native(markWhat), native(0)), equal(regTemp, native(what)...))
}

func tenantAccount(tenant uint16) string { return strconv.Itoa(int(tenant)) }

// accountOf is the account of a pod, whose tenant is 0 if its new flows pass in the clear.
func accountOf(veth uint32, tenant uint16) string {
	if tenant != 0 {
		return tenantAccount(tenant)
	}
	return "veth" + strconv.Itoa(int(veth))
}

func accountSet(name string, size uint32) *nftables.Set {
	s := connectionSet(name, size)
	s.Table = steering
	return s
}

func keptSet(account string) *nftables.Set    { return accountSet(setKept+account, maxKept) }
func dialledSet(account string) *nftables.Set { return accountSet(setDialled+account, maxDialled) }

// ofAccount returns whose a set is, of an account.
func ofAccount(set string) (account string, ok bool) {
	if account, ok = strings.CutPrefix(set, setKept); ok {
		return account, true
	}
	return strings.CutPrefix(set, setDialled)
}

// dials matches what a pod sends from the tunnels' port to a pod of the node.
func (f family) dials(then rule) rule {
	return join(isPort(0, portInbound), network(f.destination, f.length, regKey), isIn(setOwners+f.version, regKey), then)
}

func (f family) putDialled(account string) rule {
	return join(f.connection(true), put(setDialled+account, regKey, 0, dialledLinger))
}

// isDialled matches what a tenant answers to that. It looks like a tunnel's.
func (f family) isDialled(account string) rule {
	set := setDialled + account
	return join(isPort(2, portInbound), f.connection(false), isIn(set, regKey), put(set, regKey, 0, flowIdle))
}

// dial is where an account's pods' SYNs from the tunnels' port come.
func (f family) dial(account string) chain {
	v := f.version
	return chain{chainDial + v + "_" + account, []rule{setMark(markWhat, 0), f.putDialled(account), goTo("out_led" + v)}}
}

// charge writes a flow down for a while, or for longer: as one of the tenant's that the
// rule tenant loads. It doesn't match where there is no room.
func (f family) charge(account string, podIsSource bool, tenant rule, lasts time.Duration) rule {
	return join(f.connection(podIsSource), put(setKept+account, regKey, 0, lasts),
		f.flow(podIsSource), tenant, put(setFlows+f.version, regKey, regFound, lasts))
}

// over is for how long a flow is kept that has ended.
type over struct {
	when  rule
	lasts time.Duration
}

// A tenant has none of a pod's connections any more when all are forgotten: not before
// what may still come of them. In the clear there may be many, one after the other.
var (
	overTenants = []over{{nil, endedLinger}}
	overPods    = []over{{markIs(0), alone}, {join(theMark(regTemp), differs(regTemp, native(0)...)), endedLinger}}
)

// touch keeps a flow that is written down for as long as it goes on, which only what
// comes to the pod can tell: a pod that nobody answers keeps nothing. then follows.
func (f family) touch(account string, podIsSource bool, over []over, tenant, then rule) (rules []rule) {
	v := f.version
	flow, pod, peer := f.flow(podIsSource), setEnded+v, setPeerEnded+v
	keep := func(lasts time.Duration) rule { return f.charge(account, podIsSource, tenant, lasts) }
	if podIsSource {
		rules = []rule{join(ends(), flow, put(pod, regKey, 0, alone))}
		for _, o := range over {
			rules = append(rules, join(resets(), o.when, keep(o.lasts)))
		}
		return append(rules, then)
	}
	rules = []rule{
		join(ends(), flow, put(peer, regKey, 0, endedLinger)),
		// It may be forged: then they talk on.
		join(resets(), keep(endedLinger), then),
	}
	for _, o := range over {
		// Ends stay no longer than what is charged: nobody fills their sets for others.
		rules = append(rules, join(flow, isIn(pod, regKey), isIn(peer, regKey), o.when,
			put(pod, regKey, 0, o.lasts), put(peer, regKey, 0, o.lasts), keep(o.lasts), then))
	}
	return append(rules,
		join(flow, isIn(pod, regKey), put(pod, regKey, 0, endedLinger), keep(endedLinger), then),
		join(flow, isIn(peer, regKey), put(peer, regKey, 0, endedLinger), keep(endedLinger), then),
		keep(flowIdle),
		then)
}

// keep is where an account's pods' packets come that are let back to be written down.
func (f family) keep(account, way string) chain {
	v, out := f.version, way == "in" // to the pod is out of the node's end of its veth
	podIsSource := !out
	marked := theMark(regFound)
	rules := []rule{
		setMark(markWhat, 0),
		join(opens(), f.charge(account, podIsSource, marked, alone), goTo(way+"_written"+v)),
		join(opens(), markIs(0), goTo(dropChain(dropFlowsFull, out))),
		// Of a pod that is about to move.
		join(opens(), goTo(way+"_led"+v)),
	}
	if podIsSource {
		rules = slices.Insert(rules, 1, join(opens(), theMark(regTemp), differs(regTemp, native(0)...), f.dials(f.putDialled(account))))
	} else {
		begins := setBeginning + v
		rules = append(rules, join(markIs(0), f.flow(podIsSource), isIn(begins, regKey), put(begins, regKey, 0, released)))
	}
	return chain{keepChain(account, way, v), append(rules, f.touch(account, podIsSource, overPods, marked, goTo(way+"_goes"+v))...)}
}

func keepChain(account, way, version string) string {
	return map[string]string{"out": chainKeepOut, "in": chainKeepIn}[way] + version + "_" + account
}

// accountChains are those of an account of which the first two are where its pods' chains
// lead, from the pods and to them. What the shared ones let back unmarked passes beside the
// tenant, at its pace if that isn't 0.
func accountChains(account string, tenant uint16, perSecond uint32) []chain {
	sends, gets := chain{name: chainSends + account, rules: []rule{jump(chainSteerFrom)}}, chain{name: chainGets + account, rules: []rule{jump(chainSteerTo)}}
	var chains []chain
	written := map[string][]rule{}
	for _, f := range families {
		for _, way := range []string{"out", "in"} {
			keep := f.keep(account, way)
			chains = append(chains, keep)
			written[way] = append(written[way], join(f.isEtherType(), isLetBack(markWrite), jump(keep.name)))
		}
		dial := f.dial(account)
		chains = append(chains, dial)
		sends.rules = append(sends.rules, join(f.isEtherType(), isLetBack(markDial), jump(dial.name)))
	}
	sends.rules, gets.rules = append(sends.rules, written["out"]...), append(gets.rules, written["in"]...)
	for _, f := range families {
		beside := chainBesideOut + f.version
		if perSecond > 0 {
			beside = f.directChain(chainBegins, tenant, perSecond)
			gets.rules = append(gets.rules, join(f.isEtherType(), goTo(f.directChain(chainAnswers, tenant, perSecond))))
		}
		sends.rules = append(sends.rules, join(f.isEtherType(), jump(beside)))
	}
	// What is excluded is written down, too.
	sends.rules = append(append(sends.rules, written["out"]...), accept())
	gets.rules = append(gets.rules, accept())
	return append([]chain{sends, gets}, chains...)
}

// leadPod makes a pod's chains lead to those of its account, and what passes beside its
// tenant keep the tenant's pace, or 0 for none.
func (c *change) leadPod(veth uint32, tenant uint16, perSecond uint32) {
	account := accountOf(veth, tenant)
	c.lead(account, tenant, perSecond)
	in, out := podChains(veth)
	c.rules[in], c.rules[out] = podRules(account)
	c.leads[in], c.leads[out] = account, account
}

// podRules are those of the chains of a pod's veth.
func podRules(account string) (in, out []rule) {
	return []rule{goTo(chainSends + account)}, []rule{goTo(chainGets + account)}
}

// lead makes an account's set and chains.
func (c *change) lead(account string, tenant uint16, perSecond uint32) {
	c.makeAccount(account)
	pace := strconv.Itoa(int(perSecond))
	for _, of := range accountChains(account, tenant, perSecond) {
		c.branch(of)
		c.leads[of.name] = pace
	}
}

// makeAccount makes an account's sets.
func (c *change) makeAccount(account string) {
	for _, s := range []*nftables.Set{keptSet(account), dialledSet(account)} {
		if c.snap.flows[s.Name] == nil && !slices.ContainsFunc(c.made, func(m *nftables.Set) bool { return m.Name == s.Name }) {
			c.made = append(c.made, s)
		}
	}
}

// accountOfChain returns whose a chain is, of an account.
func accountOfChain(name string) (account string, ok bool) {
	for _, prefix := range []string{chainSends, chainGets} {
		if account, ok = strings.CutPrefix(name, prefix); ok {
			return account, true
		}
	}
	for _, f := range families {
		for _, prefix := range []string{keepChain("", "out", f.version), keepChain("", "in", f.version), f.dial("").name} {
			if account, ok = strings.CutPrefix(name, prefix); ok {
				return account, true
			}
		}
	}
	return "", false
}

// after returns what a set will have.
func (c *change) after(set string) map[string]element {
	all := map[string]element{}
	maps.Copy(all, c.snap.sets[set])
	for k, e := range c.elements[set] {
		if delete(all, k); e != nil {
			all[k] = *e
		}
	}
	return all
}

// closeAccounts removes those that neither a pod has any more nor a tenant.
func (c *change) closeAccounts() {
	used := map[string]bool{}
	for k, e := range c.after(setPods) {
		used[accountOf(binaryutil.NativeEndian.Uint32([]byte(k)), uint16(binaryutil.NativeEndian.Uint32(e.value)))] = true
	}
	for _, e := range c.after(setTenantOf) {
		used[tenantAccount(uint16(binaryutil.NativeEndian.Uint32(e.value)))] = true
	}
	unused := func(account string, ok bool) bool { return ok && !used[account] }
	for name := range c.snap.chains {
		if unused(accountOfChain(name)) {
			c.unhook(name)
		}
	}
	maps.DeleteFunc(c.chains, func(name string, _ *nftables.Chain) bool { return unused(accountOfChain(name)) })
	for name, s := range c.snap.flows {
		if unused(ofAccount(name)) {
			c.unmade = append(c.unmade, s)
		}
	}
	c.made = slices.DeleteFunc(c.made, func(s *nftables.Set) bool { return unused(ofAccount(s.Name)) })
}

// accountsAtOnce is how many accounts' chains a transaction makes: the kernel acknowledges
// each rule, and tells of it, and a socket's buffer has room for what it says of some 80.
const accountsAtOnce = 16

// relead makes the chains of accounts, and returns the rules by which those of the pods
// lead there. A former version's pods lead elsewhere.
func (d *Datapath) relead() ([]chain, error) {
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	var pods []chain
	tenants := map[string]uint16{}
	for k, e := range s.sets[setPods] {
		veth, tenant := binaryutil.NativeEndian.Uint32([]byte(k)), uint16(binaryutil.NativeEndian.Uint32(e.value))
		account := accountOf(veth, tenant)
		tenants[account] = tenant
		in, out := podChains(veth)
		fromPod, toPod := podRules(account)
		for name, rules := range map[string][]rule{in: fromPod, out: toPod} {
			if s.chains[name] {
				pods = append(pods, chain{name, rules})
			}
		}
	}
	for accounts := range slices.Chunk(slices.Sorted(maps.Keys(tenants)), accountsAtOnce) {
		ch, err := d.change()
		if err != nil {
			return nil, err
		}
		for _, account := range accounts {
			ch.lead(account, tenants[account], s.paceOf(tenants[account]))
		}
		if err := ch.commit(); err != nil {
			return nil, err
		}
	}
	return pods, nil
}
