// In a tenant's network namespace: which socket gets a new connection.
#pragma once

#define AF_INET 2

// A sk_lookup program can't see which namespace it runs for, so every tenant
// has a copy of its own.
volatile const __u32 tenant_index;

#define SIP_ROUND(v0, v1, v2, v3)                     \
	do {                                              \
		v0 += v1; v1 = v1 << 5 | v1 >> 27; v1 ^= v0;  \
		v0 = v0 << 16 | v0 >> 16;                     \
		v2 += v3; v3 = v3 << 8 | v3 >> 24; v3 ^= v2;  \
		v0 += v3; v3 = v3 << 7 | v3 >> 25; v3 ^= v0;  \
		v2 += v1; v1 = v1 << 13 | v1 >> 19; v1 ^= v2; \
		v2 = v2 << 16 | v2 >> 16;                     \
	} while (0)

// flow_hash is HalfSipHash-1-3, as the kernel has it for its own tables. It is the same
// for every packet of a flow: the ACK that answers a SYN cookie must find the listener
// that the SYN found.
static __noinline __u32 flow_hash(const struct addr *local, const struct addr *remote, __u32 ports)
{
	__u32 words[9], zero = 0;
	struct settings *set = bpf_map_lookup_elem(&config, &zero);
	if (!local || !remote || !set)
		return 0;
	__builtin_memcpy(words, local, 16);
	__builtin_memcpy(words + 4, remote, 16);
	words[8] = ports;
	__u32 v0 = set->hash_key[0], v1 = set->hash_key[1];
	__u32 v2 = 0x6c796765 ^ v0, v3 = 0x74656462 ^ v1;
#pragma unroll
	for (int i = 0; i < 9; i++) {
		v3 ^= words[i];
		SIP_ROUND(v0, v1, v2, v3);
		v0 ^= words[i];
	}
	__u32 length = sizeof(words) << 24;
	v3 ^= length;
	SIP_ROUND(v0, v1, v2, v3);
	v0 ^= length;
	v2 ^= 0xff;
#pragma unroll
	for (int i = 0; i < 3; i++)
		SIP_ROUND(v0, v1, v2, v3);
	return v1 ^ v3;
}

// takes tells whether a tenant has a pod's new connection: it is the pod's tenant,
// or was when the SYN came to the veth.
static __noinline int takes(__u32 tenant, const struct flow *f)
{
	struct pod *pod = f ? bpf_map_lookup_elem(&pods, &f->pod) : 0;
	if (!pod)
		return 0;
	if (pod->tenant == tenant)
		return 1;
	struct flow_state *s = bpf_map_lookup_elem(&flows, f);
	return s && s->tenant == tenant && is_former(tenant, &f->pod);
}

// Not inlined, so that the enumeration is in the object, for Go's bindings.
static __noinline enum listener listener_for(__u32 tenant, const struct addr *local, const struct addr *remote, __u32 port, __u32 remote_port)
{
	struct flow f = { .pod_port = remote_port, .peer_port = port, .side = SIDE_POD };
	f.pod = *remote;
	f.peer = *local;
	int may_dial = port != HBONE_PORT && takes(tenant, &f);
	if (may_dial && is_opening(&f, tenant))
		return LISTENER_OUTBOUND;
	f.pod = *local;
	f.peer = *remote;
	f.pod_port = port;
	f.peer_port = remote_port;
	f.side = SIDE_WIRE;
	// Anybody may say to a pod that it is another one of its tenant.
	if (!takes(tenant, &f))
		return may_dial ? LISTENER_OUTBOUND : NO_LISTENER;
	if (port == HBONE_PORT)
		return LISTENER_INBOUND;
	if (is_node_address(remote))
		return LISTENER_NODE_PLAIN; // Envoy can't keep that source: it is the node's own
	return LISTENER_PLAIN;
}

static __always_inline struct bpf_sock *listening(__u32 generation, __u32 listener, __u32 worker)
{
	__u32 slot = (generation * LISTENERS + listener) * MAX_WORKERS + worker;
	return bpf_map_lookup_elem(&listeners, &slot);
}

// tell_not_led tells of a connection that gets no listener.
static __noinline int tell_not_led(const struct flow *f, __u32 tenant, __u32 ifindex, __u32 reason, enum way way)
{
	struct event e = { .tenant = tenant, .reason = reason, .way = way };
	if (!f)
		return 0;
	e.pod = f->pod;
	e.peer = f->peer;
	e.pod_port = f->pod_port;
	e.peer_port = f->peer_port;
	return tell_denied(&e, ifindex);
}

// steer: sk_lookup in the tenant's network namespace.
SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	struct addr local, remote;
	__u32 tenant = tenant_index, port = ctx->local_port;
	enum listener listener;
	// All fields on every path: clang would else merge the branches into a
	// computed pointer into the context, which the verifier refuses.
	__u32 family = ctx->family, local4 = ctx->local_ip4, remote4 = ctx->remote_ip4;
	__u32 local6[4] = { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] };
	__u32 remote6[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3] };
	asm volatile("" : "+r"(local4), "+r"(remote4), "+r"(local6[0]), "+r"(local6[1]));
	asm volatile("" : "+r"(local6[2]), "+r"(local6[3]), "+r"(remote6[0]), "+r"(remote6[1]));
	asm volatile("" : "+r"(remote6[2]), "+r"(remote6[3]));
	if (ctx->protocol != IPPROTO_TCP)
		return SK_DROP;
	if (family == AF_INET) {
		map_ipv4(&local, local4);
		map_ipv4(&remote, remote4);
	} else {
		__builtin_memcpy(&local, local6, sizeof(local));
		__builtin_memcpy(&remote, remote6, sizeof(remote));
	}

	struct tenant *t = bpf_map_lookup_elem(&tenants, &tenant);
	struct tenant_counters *count = counters_of(tenant);
	if (!t || !count)
		return SK_DROP;
	listener = listener_for(tenant, &local, &remote, port, bpf_ntohs(ctx->remote_port));
	if (listener == NO_LISTENER) {
		count->dropped.unsteered++;
		return SK_DROP;
	}
	__u32 remote_port = ctx->remote_port;
	int outbound = listener == LISTENER_OUTBOUND;
	struct flow f = {};
	f.pod = outbound ? remote : local;
	f.peer = outbound ? local : remote;
	f.pod_port = outbound ? bpf_ntohs(remote_port) : port;
	f.peer_port = outbound ? port : bpf_ntohs(remote_port);
	f.side = outbound ? SIDE_POD : SIDE_WIRE;
	int is_new = was_opened(&f, tenant);
	struct pod *pod = bpf_map_lookup_elem(&pods, &f.pod);
	__u32 pod_ifindex = pod ? pod->ifindex : 0;

	// Before there is a connection, so that not even a greeting gets out.
	int is_plain = listener == LISTENER_PLAIN || listener == LISTENER_NODE_PLAIN;
	if (is_plain && !(pod && pod->plain)) {
		struct pod_counters *refused = pod_counters_of(pod_ifindex);
		count->dropped.plain_text++;
		if (refused)
			refused->dropped.plain_text++;
		tell_not_led(&f, tenant, pod_ifindex, offsetof(struct drops, plain_text) / sizeof(__u64), WAY_INBOUND);
		return SK_DROP;
	}
	__u32 hash = flow_hash(&local, &remote, port ^ (remote_port << 16));
	__u32 generation = hash % 100 < t->canary;
	// A worker has tunnels of its own: what a pod has with one destination shares one,
	// and with it records and wake-ups.
	__u32 place = (outbound ? flow_hash(&local, &remote, 0) : hash) >> 8;
	// Without sockets of its own, a generation leaves all to the other.
	struct bpf_sock *sk = 0;
#pragma unroll
	for (int i = 0; i < GENERATIONS; i++) {
		__u32 workers = t->workers[generation & 1];
		if (workers > 1)
			sk = listening(generation, listener, place % workers & (MAX_WORKERS - 1));
		if (!sk)
			sk = listening(generation, listener, 0);
		if (sk)
			break;
		generation ^= 1;
	}
	if (!sk) {
		if (is_new) {
			count->refused++;
			tell_not_led(&f, tenant, pod_ifindex, REASON_REFUSED, outbound ? WAY_OUTBOUND : WAY_INBOUND);
		}
		return SK_DROP;
	}
	// The kernel resets what finds no socket. Who sent the answer to a cookie has a
	// connection, and may wait in it for a first byte, with nothing to send again; the
	// SYN that it tries next isn't answered. It isn't counted: a late segment of a
	// connection that has ended looks the same, and anybody can send such.
	if (!is_new && !has_room(tenant, t, listener, &remote)) {
		bpf_sk_release(sk);
		return SK_DROP;
	}
	// Both generations listen on the same ports: the kernel must not choose
	// again among them.
	long failed = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	if (failed) {
		if (is_new)
			count->refused++;
		return SK_DROP;
	}
	if (!is_new)
		return SK_PASS;
	count->steered[generation & 1]++;
	count->listener[listener]++;
	struct pod_counters *of_pod = pod_counters_of(pod_ifindex);
	if (of_pod)
		of_pod->listener[listener & 3]++;
	if (listener != LISTENER_INBOUND)
		watch(&f, tenant, generation & 1);
	return SK_PASS;
}
