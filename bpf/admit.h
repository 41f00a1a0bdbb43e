// How many connections a tenant takes.
#pragma once

#define NSEC_PER_SEC 1000000000ULL

// What of a tenant's bounds is in use. Programs write it; the agent doesn't, or it
// would undo what they count at the same time.
struct tenant_load {
	struct bpf_spin_lock lock;
	__u32 pad;
	// When the next connection of the tenant's pods would be due at the pace of
	// new_per_second, and the next one to them: who dials a pod must not take from
	// what it dials. They may run ahead of the clock by a second: so many connections
	// at once are taken after a rest.
	__u64 outbound_due, inbound_due;
	// That the tenant's processes have accepted and not closed: see observe.h.
	__s64 connections;
	// When the next flow that its pods begin beside it would be due, at direct_per_second.
	__u64 direct_due;
	// When the next event of its sockets would be due; see tells_socket.
	__u64 events_due;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_TENANTS);
	__type(key, __u32);
	__type(value, struct tenant_load);
} loads SEC(".maps");

enum admitted { ADMITTED, TOO_MANY, TOO_FAST };

// is_due says whether another one is due, one for each pace and some ahead of the clock by
// so long, and counts it if so.
static __always_inline int is_due(struct tenant_load *l, __u64 *when, __u64 pace, __u64 ahead)
{
	__u64 now = bpf_ktime_get_ns();
	bpf_spin_lock(&l->lock);
	__u64 due = *when;
	if (due < now)
		due = now;
	int yes = due - now <= ahead - pace;
	if (yes)
		*when = due + pace;
	bpf_spin_unlock(&l->lock);
	return yes;
}

// in_time is the same for a rate in a second, and as many at once.
static __always_inline int in_time(struct tenant_load *l, __u64 *when, __u32 rate)
{
	return is_due(l, when, NSEC_PER_SEC / rate, NSEC_PER_SEC);
}

// admit says whether a tenant takes a new connection. One that it doesn't take is
// dropped, not answered: the client's kernel tries it again after 1, 3, 7 s, which
// slows down who opens too many, and lets those through that came a moment early.
// An answer would cost more than it saves, and bring the next SYN at once.
static __noinline enum admitted admit(__u32 tenant, const struct tenant *t, enum way way)
{
	int outbound = way == WAY_OUTBOUND;
	if (!t)
		return TOO_MANY;
	__u32 most = t->max_connections, rate = t->new_per_second;
	__s64 correction = t->connections_correction;
	if (!most && !rate)
		return ADMITTED;
	struct tenant_load *l = bpf_map_lookup_elem(&loads, &tenant);
	// The agent makes it before it sets a bound.
	if (!l)
		return TOO_MANY;
	// A quarter is left to the pods' own.
	__u32 room = outbound ? most : most - most / 4;
	if (most && l->connections + correction >= (__s64)room)
		return TOO_MANY;
	if (!rate)
		return ADMITTED;
	return in_time(l, outbound ? &l->outbound_due : &l->inbound_due, rate) ? ADMITTED : TOO_FAST;
}

// has_room says whether a connection that begins without a SYN of its own may: by the
// answer to a SYN cookie, of which the kernel keeps no count. Otherwise who sends SYNs
// first, and answers them all at once, would have as many as it likes.
static __noinline int has_room(__u32 tenant, const struct tenant *t, enum listener listener, const struct addr *remote)
{
	if (!t || !remote || !t->max_connections)
		return 1;
	// Nobody asks admit for a tunnel between two of the tenant's own pods either: it is
	// for connections that have room already, and outsiders must not take the tunnel's.
	struct pod *pod = listener == LISTENER_INBOUND ? bpf_map_lookup_elem(&pods, remote) : 0;
	if (pod && pod->tenant == tenant)
		return 1;
	struct tenant_load *l = bpf_map_lookup_elem(&loads, &tenant);
	__u32 most = t->max_connections;
	__u32 room = listener == LISTENER_OUTBOUND ? most : most - most / 4;
	return l && l->connections + t->connections_correction < (__s64)room;
}

static __always_inline void count_connection(__u32 tenant, __s64 change)
{
	struct tenant_load *l = bpf_map_lookup_elem(&loads, &tenant);
	if (l)
		__sync_fetch_and_add(&l->connections, change);
}
