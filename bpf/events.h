// What is told of each connection, and counted of each pod.
#pragma once

#define EVENT_BYTES (1 << 20)
// Between two events of denied connections of a pod, or tenant, on a CPU: one
// that hammers must not push out what others have to tell.
#define DENIED_INTERVAL_NS 10000000
// Events of a pod's connections in the clear, in a second on a CPU, and as many at once
// after a rest: whoever sends SYNs and resets makes as many as packets.
#define DIRECT_EVENTS_PER_SECOND 1000

enum event_kind {
	EVENT_OPENED = 1,
	EVENT_CLOSED,
	EVENT_DENIED,
};

enum way {
	WAY_UNKNOWN,
	// The pod dialled: its tenant has it.
	WAY_OUTBOUND,
	// The pod was dialled: its tenant has it.
	WAY_INBOUND,
	// The tenant dialled, as the pod.
	WAY_UPSTREAM,
	// The tenant dialled the pod.
	WAY_DELIVERED,
	// In the clear.
	WAY_DIRECT_OUTBOUND,
	WAY_DIRECT_INBOUND,
};

struct event {
	// Nanoseconds of CLOCK_MONOTONIC.
	__u64 time;
	// By the pod, of what the event's program knows.
	__u64 bytes_sent, bytes_received;
	enum event_kind kind;
	enum way way;
	__u32 tenant;
	// Of a denial: which of struct drops, or none.
	__u32 reason;
	struct addr pod, peer;
	__u16 pod_port, peer_port;
	__u8 uid[UID_LENGTH];
	__u8 pad[4];
};

#define NO_REASON 0xffffffff
#define REASON_REFUSED 0xfffffffe

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENT_BYTES);
} events SEC(".maps");

static __always_inline struct pod_counters *pod_counters_of(__u32 ifindex)
{
	return bpf_map_lookup_elem(&per_pod, &ifindex);
}

// reserve_event makes room for a tenant's event, or counts that it is lost.
static __always_inline struct event *reserve_event(__u32 tenant)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (e)
		return e;
	struct tenant_counters *c = counters_of(tenant);
	if (c)
		c->events_lost++;
	return 0;
}

// tell sends an event. Inlined: before Linux 6.9 a call takes 32 bytes of the stack at least.
static __always_inline int tell(const struct event *like)
{
	if (!like)
		return 0;
	struct event *e = reserve_event(like->tenant);
	if (!e)
		return 0;
	*e = *like;
	e->time = bpf_ktime_get_ns();
	bpf_ringbuf_submit(e, 0);
	return 0;
}

// tell_denied tells of a connection that was refused at a veth, not too often.
static __noinline int tell_denied(struct event *e, __u32 ifindex)
{
	if (!e)
		return 0;
	struct pod_counters *c = pod_counters_of(ifindex);
	__u64 now = bpf_ktime_get_ns();
	if (!c || now - c->told < DENIED_INTERVAL_NS) {
		struct tenant_counters *lost = counters_of(e->tenant);
		if (lost)
			lost->events_lost++;
		return 0;
	}
	c->told = now;
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	if (veth)
		__builtin_memcpy(e->uid, veth->uid, sizeof(e->uid));
	e->kind = EVENT_DENIED;
	return tell(e);
}

// deny tells of a dropped packet, if it would have opened a connection.
static __noinline int deny(const struct packet *p, __u32 tenant, __u32 ifindex, __u32 reason, enum way way)
{
	struct event e = { .tenant = tenant, .reason = reason, .way = way };
	if (!p || p->protocol != IPPROTO_TCP || p->fragment || !opens(p))
		return 0;
	if (way == WAY_INBOUND) {
		e.pod = p->destination;
		e.pod_port = p->destination_port;
		e.peer = p->source;
		e.peer_port = p->source_port;
	} else {
		e.pod = p->source;
		e.pod_port = p->source_port;
		e.peer = p->destination;
		e.peer_port = p->destination_port;
	}
	return tell_denied(&e, ifindex);
}

// drop counts the packet under its reason, a field of struct drops, with its
// tenant and with the pod of that veth, and tells of it.
#define drop(p, tenant, ifindex, reason, way)                                                \
	({                                                                                   \
		struct tenant_counters *c_ = counters_of(tenant);                            \
		struct pod_counters *d_ = pod_counters_of(ifindex);                          \
		if (c_)                                                                      \
			c_->dropped.reason++;                                                \
		if (d_)                                                                      \
			d_->dropped.reason++;                                                \
		deny(p, tenant, ifindex, offsetof(struct drops, reason) / sizeof(__u64), way); \
		DROP;                                                                        \
	})
