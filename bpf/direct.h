// What pods begin beside their tenant, which takes of what all of the node share: each
// flow has an entry in conntrack, and a port of what the node hides its pods behind.
#pragma once

// What goes on isn't counted again as long as there is room to remember it: flows come in
// at the tenants' paces, so that one alone can't make the others' be forgotten soon.
#define MAX_BEGUN 65536
// What others begin can't be paced. Whatever of it is forgotten counts as begun by the pod
// when it answers: what it says of its own isn't in here.
#define MAX_ANSWERED 16384

struct other_flow {
	struct addr pod, peer;
	__u32 ifindex;
	// What conntrack tells flows apart by. Of ICMP the pod's is the identifier, and the
	// peer's type and code; of GRE version 1 the peer's is the call. 0 of what has none.
	__be16 pod_port, peer_port;
	__u8 protocol;
	__u8 pad[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_BEGUN);
	__type(key, struct other_flow);
	__type(value, __u8);
} begun SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_ANSWERED);
	__type(key, struct other_flow);
	__type(value, __u8);
} answered SEC(".maps");

#define ICMP_ECHO 8
#define ICMP_TIMESTAMP 13
#define ICMP_INFORMATION 15
#define ICMP_ADDRESS 17
#define ICMPV6_ECHO 128
#define ICMPV6_NODE_INFORMATION 139

// is_request: conntrack makes no entry for other types.
static __always_inline int is_request(__u8 protocol, __u8 type)
{
	if (protocol == IPPROTO_ICMP)
		return type == ICMP_ECHO || type == ICMP_TIMESTAMP || type == ICMP_INFORMATION || type == ICMP_ADDRESS;
	return type == ICMPV6_ECHO || type == ICMPV6_NODE_INFORMATION;
}

static __always_inline int has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_UDPLITE || protocol == IPPROTO_SCTP || protocol == IPPROTO_DCCP;
}

// gre_call is 0 but for version 1, PPTP's.
static __always_inline __be16 gre_call(struct __sk_buff *skb, __u32 offset)
{
	struct {
		__u8 flags, version;
		__be16 protocol, length, call;
	} gre;
	if (bpf_skb_load_bytes(skb, offset, &gre, sizeof(gre)) || (gre.version & 7) != 1)
		return 0;
	return gre.call;
}

// Where a node's tunnels of VXLAN (IANA's port, and Linux's before), and Geneve end.
#define VXLAN_PORT 4789
#define VXLAN_LINUX_PORT 8472
#define GENEVE_PORT 6081

// is_wrapped tells whether a node that has such a tunnel would unwrap the packet, and send
// on what is in it as if it had come from there: TCP past the proxy, with any source. Of a
// packet in fragments the first says so; without it nothing is put together.
static __noinline int is_wrapped(struct __sk_buff *skb, const struct packet *p)
{
	__u8 version;
	__be16 port;
	if (!p)
		return 0;
	switch (p->protocol) {
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
		return 1;
	case IPPROTO_GRE:
		// Version 1 is PPTP's, which no interface of the node takes.
		return !p->later && (bpf_skb_load_bytes(skb, p->offset + 1, &version, sizeof(version)) || !(version & 7));
	case IPPROTO_UDP:
		if (p->later || bpf_skb_load_bytes(skb, p->offset + 2, &port, sizeof(port)))
			return 0;
		return port == bpf_htons(VXLAN_PORT) || port == bpf_htons(VXLAN_LINUX_PORT) || port == bpf_htons(GENEVE_PORT);
	}
	return 0;
}

// may_wrap: a pod that isn't in the mesh (any more).
static __always_inline int may_wrap(const struct packet *p, __u32 ifindex)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &p->source);
	return pod && pod->ifindex == ifindex && pod->tenant == DIRECT;
}

static __always_inline __u32 direct_rate(__u32 tenant)
{
	struct tenant *t = bpf_map_lookup_elem(&tenants, &tenant);
	return t ? t->direct_per_second : 0;
}

// may_begin says whether the tenant's pods may begin another flow beside it.
static __noinline int may_begin(__u32 tenant)
{
	__u32 rate = direct_rate(tenant);
	if (!rate)
		return 1;
	struct tenant_load *l = bpf_map_lookup_elem(&loads, &tenant);
	return l && in_time(l, &l->direct_due, rate);
}

// may_begin_other is the same for a packet that may go on with a flow: one that isn't TCP,
// or TCP to the node itself, of which conntrack takes more than SYNs for a beginning. Of
// a packet in fragments the first has the ports; without it nothing is put together.
static __noinline int may_begin_other(struct __sk_buff *skb, const struct packet *p, __u32 tenant)
{
	struct other_flow f = {};
	if (!p || p->later || !direct_rate(tenant))
		return 1;
	__be16 ports[2] = {};
	f.pod = p->source;
	f.peer = p->destination;
	f.ifindex = skb->ifindex;
	f.protocol = p->protocol;
	if (f.protocol == IPPROTO_ICMP || f.protocol == IPPROTO_ICMPV6) {
		__u8 type = 0;
		if (bpf_skb_load_bytes(skb, p->offset, &type, sizeof(type)) || !is_request(f.protocol, type))
			return 1;
		bpf_skb_load_bytes(skb, p->offset + 4, &ports[0], sizeof(ports[0]));
		bpf_skb_load_bytes(skb, p->offset, &ports[1], sizeof(ports[1]));
	} else if (f.protocol == IPPROTO_GRE) {
		ports[1] = gre_call(skb, p->offset);
	} else if (has_ports(f.protocol)) {
		bpf_skb_load_bytes(skb, p->offset, ports, sizeof(ports));
	}
	f.pod_port = ports[0];
	f.peer_port = ports[1];
	// A SYN begins another one in any case.
	if (!opens(p) && (bpf_map_lookup_elem(&begun, &f) || bpf_map_lookup_elem(&answered, &f)))
		return 1;
	if (!may_begin(tenant))
		return 0;
	__u8 one = 1;
	bpf_map_update_elem(&begun, &f, &one, BPF_ANY);
	return 1;
}

// remember_other has what a pod answers to not count as begun by it.
static __noinline int remember_other(struct __sk_buff *skb, const struct packet *p, __u32 tenant)
{
	struct other_flow f = {};
	if (!p || p->later || p->protocol == IPPROTO_ICMP || p->protocol == IPPROTO_ICMPV6 || !direct_rate(tenant))
		return 0;
	__be16 ports[2] = {};
	if (has_ports(p->protocol))
		bpf_skb_load_bytes(skb, p->offset, ports, sizeof(ports));
	f.pod = p->destination;
	f.peer = p->source;
	f.ifindex = skb->ifindex;
	f.protocol = p->protocol;
	f.pod_port = ports[1];
	f.peer_port = ports[0];
	if (bpf_map_lookup_elem(&begun, &f) || bpf_map_lookup_elem(&answered, &f))
		return 0;
	__u8 one = 1;
	bpf_map_update_elem(&answered, &f, &one, BPF_ANY);
	return 0;
}
