// What becomes of a tenant's connections, by generation, while two are compared: from
// outside, so that a generation can't gloss over it.
#pragma once

// Connections of one tenant that are watched at a time: a quarter of a MiB; on more than
// eight CPUs 256 for each of them, 32 KiB. Who has been idle longest makes room: of those
// that open and fail, few are lost.
#define MAX_WATCHED 2048
// By powers of two, from 128 µs on; the last is the rest.
#define FIRST_BYTE_BUCKETS 16

// Of one generation of a tenant. It is there while the tenant is watched.
struct generation_counters {
	// New connections, tunnels left out.
	__u64 connections;
	// Of those, the ones that the tenant ended before a byte came back, and that it
	// reset later; not those whose client ended them first.
	__u64 unanswered, resets;
	// From the SYN to the first byte that came back.
	__u64 first_byte[FIRST_BYTE_BUCKETS];
};

struct generation {
	__u32 tenant, generation;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_TENANTS * GENERATIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct generation);
	__type(value, struct generation_counters);
} per_generation SEC(".maps");

struct watched_flow {
	// When its SYN came: nanoseconds of CLOCK_MONOTONIC.
	__u64 began;
	__u8 generation;
	// A byte came back.
	__u8 answered;
	// Who opened it ends it.
	__u8 closing;
	__u8 pad[5];
};

struct watched_flows {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_WATCHED);
	__type(key, struct flow);
	__type(value, struct watched_flow);
};

// By tenant, of those that are watched: in one map for all, one tenant's connections could
// have another's forgotten, and with them how its new version fares.
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, MAX_TENANTS);
	__type(key, __u32);
	__array(values, struct watched_flows);
} watched SEC(".maps");

// watch begins when a generation gets a connection.
static __noinline int watch(const struct flow *f, __u32 tenant, __u32 generation)
{
	struct generation g = { .tenant = tenant, .generation = generation };
	struct watched_flow w = { .generation = generation };
	if (!f)
		return 0;
	void *of_tenant = bpf_map_lookup_elem(&watched, &tenant);
	if (!of_tenant)
		return 0;
	struct generation_counters *c = bpf_map_lookup_elem(&per_generation, &g);
	if (!c)
		return 0;
	w.began = bpf_ktime_get_ns();
	if (!bpf_map_update_elem(of_tenant, f, &w, BPF_ANY))
		c->connections++;
	return 0;
}

static __noinline int watch_end(const struct flow *f, __u32 tenant)
{
	void *of_tenant = bpf_map_lookup_elem(&watched, &tenant);
	if (!f || !of_tenant)
		return 0;
	struct watched_flow *w = bpf_map_lookup_elem(of_tenant, f);
	if (w)
		w->closing = 1;
	return 0;
}

// watch_client looks at what the pod, or its peer, sends to the tenant. Only an end is of
// interest.
static __always_inline void watch_client(const struct packet *p, const struct flow *f, __u32 tenant)
{
	if (p->flags & (TCP_FIN | TCP_RST))
		watch_end(f, tenant);
}

// Not inlined, and with a pointer of its own kind, so that the struct is in the object
// whole: of what is behind the pointers of a map of maps clang keeps the name alone.
static __noinline int count_first_byte(const struct watched_flow *w, struct generation_counters *c)
{
	if (!w || !c)
		return 0;
	__u64 units = (bpf_ktime_get_ns() - w->began) >> 17; // of 131 µs
	__u32 bucket = 0;
#pragma unroll
	for (int i = 0; i < FIRST_BYTE_BUCKETS - 1; i++) {
		if (units) {
			units >>= 1;
			bucket++;
		}
	}
	c->first_byte[bucket & (FIRST_BYTE_BUCKETS - 1)]++;
	return 0;
}

// watch_answer looks at what the tenant sends in a connection that it was led. It
// returns whether that is watched.
static __noinline int watch_answer(struct __sk_buff *skb, const struct flow *f, __u32 tenant, __u32 offset, __u32 flags)
{
	void *of_tenant = bpf_map_lookup_elem(&watched, &tenant);
	if (!f || !of_tenant)
		return 0;
	struct watched_flow *w = bpf_map_lookup_elem(of_tenant, f);
	if (!w)
		return 0;
	struct generation g = { .tenant = tenant, .generation = w->generation };
	struct generation_counters *c = bpf_map_lookup_elem(&per_generation, &g);
	struct tcphdr tcp;
	if (!c || bpf_skb_load_bytes(skb, offset, &tcp, sizeof(tcp)))
		return 1;
	if (!w->answered && skb->len > offset + tcp.doff * 4) {
		count_first_byte(w, c);
		w->answered = 1;
	}
	if (!(flags & (TCP_FIN | TCP_RST)))
		return 1;
	int closing = w->closing, answered = w->answered;
	// Who sends a SYN, and then a segment that fits no handshake, is answered by a reset
	// of the kernel's: that is none of the generation's. It acknowledges nothing, or has
	// the sequence number 0 (RFC 9293, 3.10.7.1); a connection's own is otherwise.
	if (!answered && (flags & TCP_RST) && (!(flags & TCP_ACK) || !tcp.seq))
		return 1;
	// After a FIN it may be reset yet; who is still sending sees that.
	if (answered && !(flags & TCP_RST))
		return 1;
	// Of two resets at once, on two CPUs, one counts: that which takes it away.
	if (bpf_map_delete_elem(of_tenant, f) || closing)
		return 1;
	if (!answered)
		c->unanswered++;
	else
		c->resets++;
	return 1;
}
