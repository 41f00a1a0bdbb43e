package netfilter

import (
	"net/netip"
	"strconv"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// TableName is that of all tables: on the node of the families netdev and inet, in
// each tenant's network namespace of inet.
const TableName = "bulkhead"

var (
	steering = &nftables.Table{Name: TableName, Family: nftables.TableFamilyNetdev}
	marking  = &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
)

// family is what differs between IPv4 and IPv6.
type family struct {
	version string
	// proto is the value of meta nfproto, etherType that of meta protocol.
	proto     byte
	etherType uint16
	// icmp is its protocol, requests the types of it with which a flow begins: conntrack
	// makes no entry for others.
	icmp     byte
	requests []byte
	kind     nftables.SetDatatype
	// Of an address, and where they and the packet's length are in the IP header.
	length, source, destination, lengthAt uint32
	// The header's own checksum: its type, and where it is.
	headerSum, headerSumAt uint32
	deliver, self          netip.Addr
}

var families = []family{
	{
		version: "4", proto: unix.NFPROTO_IPV4, etherType: unix.ETH_P_IP, kind: nftables.TypeIPAddr, length: 4, source: 12, destination: 16, lengthAt: 2,
		icmp: unix.IPPROTO_ICMP, requests: []byte{8, 13, 15, 17}, // echo, timestamp, information, address
		headerSum: unix.NFT_PAYLOAD_CSUM_INET, headerSumAt: 10, deliver: steer.DeliverIPv4, self: netip.MustParseAddr("169.254.96.2"),
	},
	{
		version: "6", proto: unix.NFPROTO_IPV6, etherType: unix.ETH_P_IPV6, kind: nftables.TypeIP6Addr, length: 16, source: 8, destination: 24, lengthAt: 4,
		icmp: unix.IPPROTO_ICMPV6, requests: []byte{128, 139}, // echo, node information
		headerSum: unix.NFT_PAYLOAD_CSUM_NONE, deliver: steer.DeliverIPv6, self: netip.MustParseAddr("fd69:8::2"),
	},
}

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return families[0]
	}
	return families[1]
}

// Sets of the node, those of addresses with the family's version behind the name.
// A tenant is its index, of 4 bytes; 0 is the plain way, without one.
const (
	// setPods: a pod's veth to its tenant; the comment is its UID.
	setPods = "pods"
	// setTenants: a tenant to the node's end of its veth.
	setTenants = "tenants"
	// setTenantMACs: a tenant to the MAC address of its end.
	setTenantMACs = "tenant_macs"
	// setTenantOf: the node's end of a tenant's veth to the tenant.
	setTenantOf = "tenant_of"
	// setDrops counts what was dropped, by interface and reason, setTenantDrops by
	// tenant.
	setDrops, setTenantDrops = "drops", "tenant_drops"
	// setDeniedPace and setDirectPace hold what is told of a veth's connections to a
	// pace; setUntold counts what was beyond it.
	setDeniedPace, setDirectPace, setUntold = "denied_pace", "direct_pace", "untold"
	// setSent and setReceived: a pod's veth with an address of the pod, and what the
	// pod sent from it, or was given.
	setSent, setReceived = "sent", "received"
	// setStrict: veths of pods that take no plain text.
	setStrict = "strict"
	// setExempt: veths of pods that have exclusions or the bypass, setBypassed those of
	// the bypass.
	setExempt, setBypassed = "exempt", "bypassed"
	// setExcludedIn and setExcludedOut: a pod's veth, a port or 0 for all, and a network
	// of peers whose new connections to the pod, or from it, pass in the clear.
	setExcludedIn, setExcludedOut = "excluded_in", "excluded_out"
	// setPassed counts new connections in the clear, by tenant and why; setDirect does
	// by the pod's veth, with those that no tenant has a part in.
	setPassed, setDirect = "passed", "direct"
	// setAddresses, setMACs and setOwners: a pod's address to its veth, to the MAC
	// address of the pod's end, and to its tenant.
	setAddresses, setMACs, setOwners = "addresses", "macs", "owners"
	// setSelf: twice the same address of a pod.
	setSelf = "self"
	// setLearn: an address of a pod that moves, whose new flows are written down.
	setLearn = "learn"
	// setNode: the node's own addresses.
	setNode = "node"
	// setFlows: flows that needn't go where their pod's new ones go, to their tenant.
	// The pod's end comes first.
	setFlows = "flows"
	// setLed: of those the ones that the pod's own SYN opened a moment ago.
	setLed = "led"
	// setBeginning: of those in the clear the ones of which nothing but SYNs has come to the
	// pod.
	setBeginning = "beginning"
	// setRefused: flows of which a SYN was just refused. setRefusedPace holds each veth's
	// to a pace: one pod leaves room for others.
	setRefused, setRefusedPace = "refused", "refused_pace"
	// setEnded: of the flows that are written down those whose pod has sent an end;
	// setPeerEnded: whose peer has.
	setEnded, setPeerEnded = "ended", "peer_ended"
	// setFormers: tenants with an address of a pod that has left them, for which they
	// go on to open what its connections need.
	setFormers = "formers"
	// setPorted: protocols that have ports, where TCP has them.
	setPorted = "ported"
)

const (
	maxFlows = 262144
	maxVeths = 4096
	maxDrops = 65536
	// SYNs of pods that are about to move, and are sent again; the rest is new then.
	maxLed = 16384
	// SYNs that are refused in refusedLinger, and of a veth in a second; the rest gets no
	// answer.
	maxRefused, refusedPerSecond = 4096, 64
	// 32 of its namespace and 8 of its own for each of 1,000 pods, and some more.
	maxExclusions = 65536
)

func hostSets() map[string]*nftables.Set {
	sets := map[string]*nftables.Set{}
	add := func(name string, s nftables.Set, key ...nftables.SetDatatype) {
		s.Table, s.Name, s.KeyType, s.Concatenation = steering, name, key[0], len(key) > 1
		if s.Concatenation {
			s.KeyType = nftables.MustConcatSetType(key...) // of one it would be padded, and nft can't list that
		}
		sets[name] = &s
	}
	ifindex, tenant, port := nftables.TypeIFIndex, nftables.TypeMark, nftables.TypeInetService
	add(setPods, nftables.Set{IsMap: true, DataType: tenant, Size: maxVeths}, ifindex)
	add(setTenants, nftables.Set{IsMap: true, DataType: ifindex, Size: maxVeths}, tenant)
	add(setTenantMACs, nftables.Set{IsMap: true, DataType: nftables.TypeEtherAddr, Size: maxVeths}, tenant)
	add(setTenantOf, nftables.Set{IsMap: true, DataType: tenant, Size: maxVeths}, ifindex)
	add(setStrict, nftables.Set{Size: maxVeths}, ifindex)
	add(setExempt, nftables.Set{Size: maxVeths}, ifindex)
	add(setBypassed, nftables.Set{Size: maxVeths}, ifindex)
	add(setPassed, nftables.Set{Dynamic: true, Counter: true, Size: maxDrops}, tenant, nftables.TypeMark)
	add(setDirect, nftables.Set{Dynamic: true, Counter: true, Size: maxVeths}, ifindex)
	add(setTenantDrops, nftables.Set{Dynamic: true, Counter: true, Size: maxDrops}, tenant, nftables.TypeMark)
	add(setDrops, nftables.Set{Dynamic: true, Counter: true, Size: maxDrops}, ifindex, nftables.TypeMark)
	add(setDeniedPace, nftables.Set{Dynamic: true, HasTimeout: true, Size: 2 * maxVeths}, ifindex)
	add(setDirectPace, nftables.Set{Dynamic: true, HasTimeout: true, Size: maxVeths}, ifindex)
	add(setRefusedPace, nftables.Set{Dynamic: true, HasTimeout: true, Size: maxVeths}, ifindex)
	add(setUntold, nftables.Set{Dynamic: true, Counter: true, Size: 2 * maxVeths}, ifindex)
	add(setPorted, nftables.Set{Size: 256}, nftables.TypeInetProto)
	for _, f := range families {
		v, address := f.version, f.kind
		add(setSent+v, nftables.Set{Counter: true, Size: maxVeths}, ifindex, address)
		add(setReceived+v, nftables.Set{Counter: true, Size: maxVeths}, ifindex, address)
		add(setAddresses+v, nftables.Set{IsMap: true, DataType: ifindex, Size: maxVeths}, address)
		add(setMACs+v, nftables.Set{IsMap: true, DataType: nftables.TypeEtherAddr, Size: maxVeths}, address)
		add(setOwners+v, nftables.Set{IsMap: true, DataType: tenant, Size: maxVeths}, address)
		add(setSelf+v, nftables.Set{Size: maxVeths}, address, address)
		add(setLearn+v, nftables.Set{Size: maxVeths}, address)
		add(setExcludedIn+v, nftables.Set{Interval: true, Size: maxExclusions}, ifindex, port, address)
		add(setExcludedOut+v, nftables.Set{Interval: true, Size: maxExclusions}, ifindex, port, address)
		add(setNode+v, nftables.Set{Size: maxVeths}, address)
		add(setFlows+v, nftables.Set{IsMap: true, DataType: tenant, HasTimeout: true, Dynamic: true, Size: maxFlows}, address, port, address, port)
		add(setLed+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: maxLed}, address, port, address, port)
		add(setBeginning+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: maxFlows}, address, port, address, port)
		add(setFormers+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: 4 * maxVeths}, tenant, address)
		add(setRefused+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: maxRefused}, address, port, address, port)
		add(setEnded+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: maxFlows}, address, port, address, port)
		add(setPeerEnded+v, nftables.Set{HasTimeout: true, Dynamic: true, Size: maxFlows}, address, port, address, port)
		// The other table's: what the node sends to pods is marked.
		marked := nftables.Set{Table: marking, Name: setMarked + v, KeyType: address, Size: maxVeths}
		sets[marked.Name] = &marked
	}
	return sets
}

// setMarked: addresses of pods, in the table that marks.
const setMarked = "marked"

// ports that a pod's flow has, and everything else of keys, as registers hold it.
func portKey(port uint16) []byte { return []byte{byte(port >> 8), byte(port), 0, 0} }

func addressKey(a netip.Addr) []byte { return a.Unmap().AsSlice() }

func key(parts ...[]byte) (k []byte) {
	for _, p := range parts {
		k = append(k, p...)
	}
	return k
}

// Reasons why a packet was dropped: the second part of the key in setDrops and
// setTenantDrops.
const (
	dropSpoofed = iota + 1
	dropFragment
	dropMalformed
	dropNoTenant
	dropNotThePod
	dropDeliver
	dropForeign
	dropProtocol
	dropMidstream
	dropFlowsFull
	dropUnsteered
	dropDirectTooFast
	dropPortsTaken
	dropReasons
)

// dropChain counts and drops; what came in and what goes out are told apart by
// the interface.
func dropChain(reason int, out bool) string {
	if out {
		return "drop_out_" + strconv.Itoa(reason)
	}
	return "drop_in_" + strconv.Itoa(reason)
}
