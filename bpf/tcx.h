// The programs on veths: on the node's end of every mesh pod's and every tenant's.
#pragma once

// As in newer <linux/bpf.h>: on to the next program, and the end of the packet.
#define NEXT (-1)
#define DROP 2

#define NEIGHBOUR_SOLICITATION 135
#define NEIGHBOUR_ADVERTISEMENT 136

static __always_inline int set_destination_mac(struct __sk_buff *skb, const __u8 *mac)
{
	__u8 copy[ETH_ALEN];
	__builtin_memcpy(copy, mac, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, copy, ETH_ALEN, 0);
}

// to_other_end hands the packet to the other end of a veth, in its namespace.
static __always_inline int to_other_end(struct __sk_buff *skb, __u32 ifindex)
{
	// On a bridge port the frame was for the bridge's MAC, so that the packet
	// counts as another host's, and the receiving end would drop it.
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(ifindex, 0);
}

// deliver brings the packet to the pod itself.
static __always_inline int deliver(struct __sk_buff *skb, const struct pod *pod)
{
	__u32 ifindex = pod->ifindex;
	if (set_destination_mac(skb, pod->mac))
		return DROP;
	return to_other_end(skb, ifindex);
}

// self_address is who a pod seems to be to itself: 169.254.96.2 or fd69:8::2. A
// pod that dials a service and is answered by itself can't be sent its own
// address, which its kernel takes for a martian.
static __always_inline void self_address(struct addr *a, int v4)
{
	__u32 w4[4] = { 0, 0, bpf_htonl(0xffff), bpf_htonl(0xa9fe6002) };
	__u32 w6[4] = { bpf_htonl(0xfd690008), 0, 0, bpf_htonl(2) };
	if (v4)
		__builtin_memcpy(a, w4, sizeof(*a));
	else
		__builtin_memcpy(a, w6, sizeof(*a));
}

static __always_inline int same_address(const struct addr *a, const struct addr *b)
{
	__u64 x[2], y[2];
	__builtin_memcpy(x, a, sizeof(x));
	__builtin_memcpy(y, b, sizeof(y));
	return x[0] == y[0] && x[1] == y[1];
}

// readdress replaces the source, or else the destination, of a TCP packet.
static __always_inline int readdress(struct __sk_buff *skb, const struct packet *p, int source, const struct addr *to)
{
	const struct addr *from = source ? &p->source : &p->destination;
	__u32 checksum = p->offset + offsetof(struct tcphdr, check);
	__be32 old[4], new[4];
	__builtin_memcpy(old, from, sizeof(old));
	__builtin_memcpy(new, to, sizeof(new));
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		__u32 field = ETH_HLEN + (source ? offsetof(struct iphdr, saddr) : offsetof(struct iphdr, daddr));
		if (bpf_l4_csum_replace(skb, checksum, old[3], new[3], BPF_F_PSEUDO_HDR | sizeof(__be32)) ||
		    bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old[3], new[3], sizeof(__be32)))
			return -1;
		return bpf_skb_store_bytes(skb, field, &new[3], sizeof(__be32), 0);
	}
	__u32 field = ETH_HLEN + (source ? offsetof(struct ipv6hdr, saddr) : offsetof(struct ipv6hdr, daddr));
	__s64 difference = bpf_csum_diff(old, sizeof(old), new, sizeof(new), 0);
	if (difference < 0 || bpf_l4_csum_replace(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR))
		return -1;
	return bpf_skb_store_bytes(skb, field, new, sizeof(new), 0);
}

// to_refusal makes a SYN the answer of a host that has no listener, with the SYN's
// options, so that no length changes.
static __always_inline long to_refusal(struct __sk_buff *skb, const struct packet *p)
{
	struct tcphdr tcp, answer;
	if (bpf_skb_load_bytes(skb, p->offset, &tcp, sizeof(tcp)))
		return -1;
	answer = tcp;
	answer.source = tcp.dest;
	answer.dest = tcp.source;
	answer.seq = 0;
	answer.ack_seq = bpf_htonl(bpf_ntohl(tcp.seq) + 1);
	((__u8 *)&answer)[13] = TCP_RST | TCP_ACK;
	__s64 difference = bpf_csum_diff((__be32 *)&tcp, sizeof(tcp), (__be32 *)&answer, sizeof(answer), 0);
	if (difference < 0 || bpf_skb_store_bytes(skb, p->offset, &answer, sizeof(answer), 0) ||
	    bpf_l4_csum_replace(skb, p->offset + offsetof(struct tcphdr, check), 0, difference, 0))
		return -1;
	// Which address comes first is nothing to a checksum.
	struct addr swapped[2] = { p->destination, p->source };
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		__be32 words[8];
		__builtin_memcpy(words, swapped, sizeof(words));
		__be32 v4[2] = { words[3], words[7] };
		return bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), v4, sizeof(v4), 0);
	}
	return bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), swapped, sizeof(swapped), 0);
}

// to_question makes a SYN a segment that a connection acknowledges, as it would the SYN (RFC
// 5961, 4), and that opens none: where there is no connection, it is reset.
static __noinline long to_question(struct __sk_buff *skb, __u32 offset)
{
	struct tcphdr tcp, question;
	if (bpf_skb_load_bytes(skb, offset, &tcp, sizeof(tcp)))
		return -1;
	question = tcp;
	question.ack_seq = 0;
	((__u8 *)&question)[13] = TCP_ACK;
	__s64 difference = bpf_csum_diff((__be32 *)&tcp, sizeof(tcp), (__be32 *)&question, sizeof(question), 0);
	if (difference < 0 || bpf_skb_store_bytes(skb, offset, &question, sizeof(question), 0))
		return -1;
	return bpf_l4_csum_replace(skb, offset + offsetof(struct tcphdr, check), 0, difference, 0);
}

// bytes_of a TCP packet, from its IP header on.
static __always_inline __u32 bytes_of(struct __sk_buff *skb)
{
	return skb->len > ETH_HLEN ? skb->len - ETH_HLEN : 0;
}

static __always_inline struct settings *get_settings(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline void flow_from(struct flow *f, const struct packet *p, enum side side)
{
	f->side = side;
	f->pod = p->source;
	f->peer = p->destination;
	f->pod_port = p->source_port;
	f->peer_port = p->destination_port;
}

static __always_inline void flow_to(struct flow *f, const struct packet *p, enum side side)
{
	f->side = side;
	f->pod = p->destination;
	f->peer = p->source;
	f->pod_port = p->destination_port;
	f->peer_port = p->source_port;
}

// from_pod: tcx ingress on the node's end of a pod's veth.
SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	struct packet p;
	struct flow f;
	__u32 ifindex = skb->ifindex;
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	__u32 tenant = veth ? veth->tenant : 0;
	struct settings *set = get_settings();
	if (!set)
		return DROP;

	enum parsed parsed = parse(skb, &p);
	if (parsed == MALFORMED)
		return drop(&p, tenant, ifindex, malformed, WAY_OUTBOUND);
	if (parsed == NOT_IP)
		return NEXT;
	if (p.protocol != IPPROTO_TCP) {
		if (is_wrapped(skb, &p) && !may_wrap(&p, ifindex))
			return drop(&p, tenant, ifindex, protocol, WAY_OUTBOUND);
		if (!may_begin_other(skb, &p, tenant))
			return drop(&p, tenant, ifindex, direct_too_fast, WAY_OUTBOUND);
		return NEXT;
	}
	struct pod *pod = bpf_map_lookup_elem(&pods, &p.source);
	if (!pod || pod->ifindex != ifindex)
		return drop(&p, tenant, ifindex, spoofed, WAY_OUTBOUND);
	if (p.fragment)
		return drop(&p, tenant, ifindex, fragment, WAY_OUTBOUND);
	if (set->mark_mask && (skb->mark & set->mark_mask) == set->mark) {
		skb->mark &= ~set->mark_mask;
		bpf_skb_change_type(skb, PACKET_HOST);
		return NEXT;
	}
	__u32 bytes = bytes_of(skb);
	struct pod_counters *count = pod_counters_of(ifindex);
	if (count)
		count->bytes_sent += bytes;
	if (is_node_address(&p.destination)) {
		if (!may_begin_other(skb, &p, tenant))
			return drop(&p, tenant, ifindex, direct_too_fast, WAY_OUTBOUND);
		flow_from(&f, &p, SIDE_WIRE);
		follow_beside(&f, pod, &p, 1, bytes);
		return NEXT;
	}
	struct addr self;
	self_address(&self, skb->protocol == bpf_htons(ETH_P_IP));
	int to_self = same_address(&p.destination, &self);
	flow_from(&f, &p, SIDE_POD);
	if (to_self)
		f.peer = p.source; // as its tenant sees it
	int owner = belongs_to(&p, &f, pod, 1, 0, bytes);
	if (owner == DIRECT)
		return NEXT;
	if (owner == DIRECT_TOO_FAST)
		return drop(&p, tenant, ifindex, direct_too_fast, WAY_OUTBOUND);
	if (owner == IS_MIDSTREAM)
		return drop(&p, tenant, ifindex, midstream, WAY_OUTBOUND);
	if (owner == FLOWS_FULL)
		return drop(&p, tenant, ifindex, flows_full, WAY_OUTBOUND);
	tenant = owner;
	// Tunnels are the proxies' alone. To a pod of the same tenant on this node this would
	// look like the proxy's own, and its answers would stay in there.
	if (p.destination_port == HBONE_PORT) {
		int dropped = drop(&p, tenant, ifindex, unsteered, WAY_OUTBOUND);
		return opens(&p) && !to_refusal(skb, &p) ? deliver(skb, pod) : dropped;
	}
	watch_client(&p, &f, tenant);
	struct tenant *t = bpf_map_lookup_elem(&tenants, &tenant);
	if (!t)
		return drop(&p, tenant, ifindex, no_tenant, WAY_OUTBOUND);
	if (opens(&p)) {
		enum admitted admitted = admit(tenant, t, WAY_OUTBOUND);
		if (admitted == TOO_MANY)
			return drop(&p, tenant, ifindex, too_many, WAY_OUTBOUND);
		if (admitted == TOO_FAST)
			return drop(&p, tenant, ifindex, too_fast, WAY_OUTBOUND);
		// The answer of a pod of its own tenant will look like a tunnel.
		struct pod *peer = p.source_port == HBONE_PORT ? bpf_map_lookup_elem(&pods, &f.peer) : 0;
		if (peer && peer->tenant == tenant && veth && learned_of(veth) < MAX_DIALLED)
			learn(&f, pod, tenant, 1, 0);
		opened(&f, tenant);
	}
	__u32 to = t->ifindex;
	if (to_self && readdress(skb, &p, 0, &p.source))
		return drop(&p, tenant, ifindex, malformed, WAY_OUTBOUND);
	return to_other_end(skb, to);
}

static __always_inline int received(struct __sk_buff *skb, __u32 ifindex)
{
	struct pod_counters *count = pod_counters_of(ifindex);
	if (count)
		count->bytes_received += bytes_of(skb);
	return NEXT;
}

// to_pod: tcx egress on the node's end of a pod's veth.
SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	struct packet p;
	struct addr sent_to;
	struct flow f;
	__be16 ports[2] = {};
	__u32 ifindex = skb->ifindex;
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	__u32 tenant = veth ? veth->tenant : 0;
	// Not by source address: what a NodePort masquerades has the node's, too.
	int made_here = skb->ingress_ifindex == 0, tcp = 0;

	enum parsed parsed = parse(skb, &p);
	if (parsed == MALFORMED)
		return drop(&p, tenant, ifindex, malformed, WAY_INBOUND);
	if (parsed == NOT_IP)
		return NEXT;
	if (p.protocol == IPPROTO_TCP) {
		if (is_node_address(&p.source))
			remember_other(skb, &p, tenant);
		if (made_here) {
			struct pod *of = bpf_map_lookup_elem(&pods, &p.destination);
			flow_to(&f, &p, SIDE_WIRE);
			if (of && of->ifindex == ifindex)
				follow_beside(&f, of, &p, 0, bytes_of(skb));
			return received(skb, ifindex);
		}
		tcp = 1;
	} else if (quotes_tcp(skb, &p, &sent_to, ports)) {
		// The tenant's Envoy sent that packet as the pod, and without the
		// error it wouldn't learn the path's MTU; except for what the pod
		// sends to the node, which doesn't pass its tenant.
		if (made_here && is_node_address(&sent_to))
			return NEXT;
	} else {
		remember_other(skb, &p, tenant);
		return NEXT;
	}
	if (p.fragment)
		return drop(&p, tenant, ifindex, fragment, WAY_INBOUND);
	struct pod *pod = bpf_map_lookup_elem(&pods, &p.destination);
	// A bridge floods its ports with what it doesn't know the place of.
	if (!pod || pod->ifindex != ifindex)
		return drop(&p, tenant, ifindex, not_the_pod, WAY_INBOUND);
	int owner;
	flow_to(&f, &p, SIDE_WIRE);
	if (tcp) {
		owner = belongs_to(&p, &f, pod, 0, 0, bytes_of(skb));
	} else {
		f.peer = sent_to;
		f.pod_port = bpf_ntohs(ports[0]);
		f.peer_port = bpf_ntohs(ports[1]);
		struct flow_state *s = bpf_map_lookup_elem(&flows, &f);
		owner = s ? s->tenant : pod->tenant;
	}
	if (owner == DIRECT)
		return tcp ? received(skb, ifindex) : NEXT;
	if (owner == IS_MIDSTREAM)
		return drop(&p, tenant, ifindex, midstream, WAY_INBOUND);
	if (owner == FLOWS_FULL)
		return drop(&p, tenant, ifindex, flows_full, WAY_INBOUND);
	if (owner == BEGINS_AGAIN) {
		// Of data with it a connection would take what fits.
		if (p.next != p.sequence + 1 || to_question(skb, p.offset))
			return drop(&p, tenant, ifindex, midstream, WAY_INBOUND);
		return received(skb, ifindex);
	}
	tenant = owner;
	if (tcp)
		watch_client(&p, &f, tenant);
	struct tenant *t = bpf_map_lookup_elem(&tenants, &tenant);
	if (!t)
		return drop(&p, tenant, ifindex, no_tenant, WAY_INBOUND);
	if (tcp && opens(&p)) {
		enum admitted admitted = admit(tenant, t, WAY_INBOUND);
		if (admitted == TOO_MANY)
			return drop(&p, tenant, ifindex, too_many, WAY_INBOUND);
		if (admitted == TOO_FAST)
			return drop(&p, tenant, ifindex, too_fast, WAY_INBOUND);
		opened(&f, tenant);
	}
	__u32 to = t->ifindex;
	if (set_destination_mac(skb, t->mac))
		return DROP;
	return bpf_redirect(to, 0);
}

// is_deliver_address: 169.254.96.1 or fd69:8::1.
static __always_inline int is_deliver_address(const struct addr *a)
{
	__u32 w[4];
	__builtin_memcpy(w, a, sizeof(w));
	if (w[1])
		return 0;
	if (!w[0])
		return w[2] == bpf_htonl(0xffff) && w[3] == bpf_htonl(0xa9fe6001);
	return w[0] == bpf_htonl(0xfd690008) && !w[2] && w[3] == bpf_htonl(1);
}

// from_tenant: tcx ingress on the node's end of a tenant's veth. What is behind
// it is hostile: any address can be bound in there.
SEC("tc")
int from_tenant(struct __sk_buff *skb)
{
	struct packet p = {};
	struct flow f;
	__u32 ifindex = skb->ifindex;
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	struct settings *set = get_settings();
	__u32 tenant = veth && veth->kind == VETH_TENANT ? veth->tenant : 0, bytes = bytes_of(skb);
	// Never 0: what belongs_to does for others is left out, and takes no stack.
	if (!tenant || !set)
		return drop(&p, 0, ifindex, no_tenant, WAY_UPSTREAM);

	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return NEXT;
	if (parse(skb, &p) != PARSED)
		return drop(&p, tenant, ifindex, malformed, WAY_UPSTREAM);
	if (p.protocol == IPPROTO_ICMPV6 && !p.fragment) {
		__u8 type;
		if (!bpf_skb_load_bytes(skb, p.offset, &type, sizeof(type)) &&
		    (type == NEIGHBOUR_SOLICITATION || type == NEIGHBOUR_ADVERTISEMENT))
			return NEXT;
	}
	if (p.protocol != IPPROTO_TCP)
		return drop(&p, tenant, ifindex, protocol, WAY_UPSTREAM);
	if (p.fragment)
		return drop(&p, tenant, ifindex, fragment, WAY_UPSTREAM);

	struct pod *from = bpf_map_lookup_elem(&pods, &p.source);
	struct pod *to = bpf_map_lookup_elem(&pods, &p.destination);
	int sent = tenant, delivered = tenant;
	// Also of a pod that isn't its own any more, the flows that stayed.
	if (from) {
		flow_from(&f, &p, SIDE_WIRE);
		sent = belongs_to(&p, &f, from, 1, tenant, bytes);
		if (sent != tenant)
			from = 0;
	}
	// A tunnel between two of its own pods has both ends in there. A pod's own connection may
	// begin at the tunnels' port, too.
	int tunnel = 0;
	if (to) {
		flow_to(&f, &p, SIDE_POD);
		tunnel = from && (p.source_port == HBONE_PORT || (p.destination_port == HBONE_PORT && !dialled(&f)));
		if (tunnel)
			f.side = SIDE_WIRE;
		delivered = belongs_to(&p, &f, to, 0, tenant, bytes);
		if (delivered != tenant)
			to = 0;
	}
	// At once, and not by silence: it chooses another port then.
	if (delivered == PORTS_TAKEN || (sent == PORTS_TAKEN && !to)) {
		int dropped = drop(&p, tenant, ifindex, ports_taken, WAY_UPSTREAM);
		return to_refusal(skb, &p) ? dropped : to_other_end(skb, ifindex);
	}
	if (is_deliver_address(&p.source) && !to)
		return drop(&p, tenant, ifindex, deliver, WAY_UPSTREAM);
	if (tunnel && to) {
		if (opens(&p))
			opened(&f, tenant);
		return to_other_end(skb, ifindex);
	}
	if (veth->watched) {
		int seen = 0;
		if (to) {
			flow_to(&f, &p, SIDE_POD);
			seen = watch_answer(skb, &f, tenant, p.offset, p.flags);
		}
		if (from && !seen) {
			flow_from(&f, &p, SIDE_WIRE);
			watch_answer(skb, &f, tenant, p.offset, p.flags);
		}
	}
	if (to && same_address(&p.source, &p.destination)) {
		struct addr self;
		self_address(&self, skb->protocol == bpf_htons(ETH_P_IP));
		if (readdress(skb, &p, 1, &self))
			return drop(&p, tenant, ifindex, malformed, WAY_UPSTREAM);
	}
	if (to) {
		received(skb, to->ifindex);
		return deliver(skb, to);
	}
	if (!from)
		return drop(&p, tenant, ifindex, foreign, WAY_UPSTREAM);
	// As if the pod itself had sent it: rp_filter, conntrack and network
	// policies of the node see the pod and its veth.
	__u32 as = from->ifindex;
	if (set_destination_mac(skb, from->gateway_mac))
		return DROP;
	skb->mark = (skb->mark & ~set->mark_mask) | set->mark;
	return bpf_redirect(as, BPF_F_INGRESS);
}
