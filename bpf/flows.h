// Which connections stay where their SYN went, and which pass in the clear.
#pragma once

#define MAX_FLOWS 262144
// Of one pod, that the programs may write down: it must not take all of the
// room. What the agent writes before a pod moves isn't limited.
#define MAX_LEARNED 8192
// Of those, that tenants open: the rest is for what the pod and its peers open.
#define MAX_LEARNED_BY_TENANTS (MAX_LEARNED / 2)
// Of all pods of one tenant, also such as have left it for none: another's find room.
#define MAX_LEARNED_OF_TENANT 16384
// Of those, before another that begins at the tunnels' port.
#define MAX_DIALLED 256
// 32 of its namespace and 8 of its own for each of 1,000 pods.
#define MAX_EXCLUSIONS 65536

// Linux sends a SYN again until 127 s after the first.
#define SYN_AGAIN_NS (130 * NSEC_PER_SEC)

#define LED 1
#define LED_ALONE 2

#define ENDED_POD 1
#define ENDED_PEER 2
#define ENDED_RESET 4
// The event was sent.
#define ENDED_TOLD 8
// The reset had the number that the pod waited for, so that its kernel takes it.
#define ENDED_TAKEN 16

// Ports are chosen in two network namespaces: what the pod has with its tenant may have the
// same ones as what its tenant has with the rest of the world.
enum side {
	// Between the pod and its tenant.
	SIDE_POD = 1,
	// Between the tenant, as the pod, and others. What passes in the clear is here, too.
	SIDE_WIRE,
};

// The same key from both ends.
struct flow {
	struct addr pod, peer;
	__u16 pod_port, peer_port;
	enum side side;
};

// A flow that needn't go where the pod's new flows go.
struct flow_state {
	// Or DIRECT.
	__u32 tenant;
	// The pod's veth, and whether the programs wrote it down.
	__u32 ifindex;
	// Which ends have sent a FIN, and whether one a RST that the other takes.
	__u8 ended;
	__u8 learned;
	__u8 outbound;
	// The SYN of the pod, or of its peer, led it there. What a tenant opened by itself,
	// or had when the agent looked, gets no SYN of theirs. LED_ALONE before anything but SYNs.
	__u8 led;
	// The sequence number that the pod's end waits for; 0 before it has said so.
	__u32 expected;
	// When its last packet came, or the first SYN alone: nanoseconds of CLOCK_MONOTONIC.
	__u64 seen;
	__u64 bytes_sent, bytes_received;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow);
	__type(value, struct flow_state);
} flows SEC(".maps");

// A SYN's way into the clear; what is in it is excluded from the mesh, or isn't in a larger
// one if its value is 0.
struct exclusion {
	__u32 prefixlen;
	// Of a pod's veth; 0 is for all pods.
	__u32 ifindex;
	__u8 outbound;
	__u8 pad;
	// Of the SYN's destination; 0 is for all ports.
	__be16 port;
	// Of the pod's peer.
	struct addr peer;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MAX_EXCLUSIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct exclusion);
	__type(value, __u8);
} exclusions SEC(".maps");

// A tenant that a pod has left, and goes on to open what it has begun.
struct former {
	struct addr pod;
	__u32 tenant;
};

// 4 of each address; sweeping makes room.
#define MAX_FORMERS (4 * MAX_POD_ADDRESSES)

// Until when: nanoseconds of CLOCK_MONOTONIC.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_FORMERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct former);
	__type(value, __u64);
} formers SEC(".maps");

// is_former tells whether a tenant may still open connections for a pod.
static __noinline int is_former(__u32 tenant, const struct addr *pod)
{
	struct former key = { .tenant = tenant };
	if (!pod)
		return 0;
	key.pod = *pod;
	__u64 *until = bpf_map_lookup_elem(&formers, &key);
	return until && *until > bpf_ktime_get_ns();
}

#define EXCLUSION_BITS ((sizeof(struct exclusion) - sizeof(__u32)) * 8)

// What becomes of a packet, if it isn't a tenant's index or DIRECT.
#define IS_MIDSTREAM (-1)
#define FLOWS_FULL (-2)
#define DIRECT_TOO_FAST (-3)
#define PORTS_TAKEN (-4)
#define BEGINS_AGAIN (-5)

static __always_inline int is_excluded(const struct exclusion *e)
{
	__u8 *is = bpf_map_lookup_elem(&exclusions, e);
	return is && *is;
}

static __noinline int excluded(const struct flow *f, __u32 ifindex, int outbound)
{
	struct exclusion e = { .prefixlen = EXCLUSION_BITS, .ifindex = ifindex, .outbound = outbound };
	if (!f)
		return 0;
	e.peer = f->peer;
	e.port = bpf_htons(outbound ? f->peer_port : f->pod_port);
	__be16 port = e.port;
	if (is_excluded(&e))
		return 1;
	e.port = 0;
	if (is_excluded(&e))
		return 1;
	e.ifindex = 0;
	if (is_excluded(&e))
		return 1;
	e.port = port;
	return is_excluded(&e);
}

// tells_direct says whether a connection of a pod in the clear is told of.
static __always_inline int tells_direct(__u32 ifindex)
{
	const __u64 pace = NSEC_PER_SEC / DIRECT_EVENTS_PER_SECOND;
	struct pod_counters *c = pod_counters_of(ifindex);
	__u64 now = bpf_ktime_get_ns();
	if (!c)
		return 0;
	__u64 due = c->direct_due < now ? now : c->direct_due;
	if (due - now > NSEC_PER_SEC - pace)
		return 0;
	c->direct_due = due + pace;
	return 1;
}

// tell_flow writes the event where it is sent from: what calls it has little stack left.
static __noinline int tell_flow(const struct flow *f, const struct flow_state *s, const struct pod *pod, enum event_kind kind)
{
	if (!f || !s || !pod)
		return 0;
	if (!tells_direct(pod->ifindex)) {
		struct tenant_counters *lost = counters_of(pod->tenant);
		if (lost)
			lost->events_lost++;
		return 0;
	}
	struct event *e = reserve_event(pod->tenant);
	if (!e)
		return 0;
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_ns();
	e->kind = kind;
	e->reason = NO_REASON;
	e->way = s->outbound ? WAY_DIRECT_OUTBOUND : WAY_DIRECT_INBOUND;
	e->tenant = pod->tenant;
	e->pod = f->pod;
	e->pod_port = f->pod_port;
	e->peer = f->peer;
	e->peer_port = f->peer_port;
	e->bytes_sent = s->bytes_sent;
	e->bytes_received = s->bytes_received;
	__builtin_memcpy(e->uid, pod->uid, sizeof(e->uid));
	bpf_ringbuf_submit(e, 0);
	return 0;
}

// account_of is what counts the flows of all pods of a pod's tenant: the tenant's veth.
static __always_inline struct veth *account_of(const struct veth *veth)
{
	__u32 tenant = veth->tenant;
	struct tenant *t = bpf_map_lookup_elem(&tenants, &tenant);
	if (!t)
		return 0;
	__u32 ifindex = t->ifindex;
	return bpf_map_lookup_elem(&veths, &ifindex);
}

// learned_of is less than none where fewer were counted than there are, as of a pod that has
// come from another tenant, and two CPUs count down at once. Sweeping makes it good.
static __always_inline __s32 learned_of(const struct veth *veth)
{
	return (__s32)veth->learned;
}

// may_learn says whether there is room for another flow of the pod with this veth. Not
// inlined, as the next: what calls learn has little stack left.
static __noinline int may_learn(__u32 ifindex, __u32 by)
{
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	if (!veth || learned_of(veth) >= (by ? MAX_LEARNED_BY_TENANTS : MAX_LEARNED))
		return 0;
	struct veth *account = account_of(veth);
	return !account || learned_of(account) < (by ? MAX_LEARNED_OF_TENANT / 2 : MAX_LEARNED_OF_TENANT);
}

static __noinline int count_learned(__u32 ifindex, int change)
{
	struct veth *veth = bpf_map_lookup_elem(&veths, &ifindex);
	if (!veth)
		return 0;
	if (change > 0 || veth->learned)
		__sync_fetch_and_add(&veth->learned, change);
	struct veth *account = account_of(veth);
	if (account && (change > 0 || account->learned))
		__sync_fetch_and_add(&account->learned, change);
	return 0;
}

static __always_inline void forget(const struct flow *f, const struct flow_state *s)
{
	__u32 ifindex = s->ifindex;
	__u8 learned = s->learned;
	if (bpf_map_delete_elem(&flows, f) || !learned)
		return;
	count_learned(ifindex, -1);
}

// find looks a flow up. On the pod's side it may be one that passes in the clear, which has
// no sides: f is where it is written down then.
static __always_inline struct flow_state *find(struct flow *f)
{
	struct flow_state *s = bpf_map_lookup_elem(&flows, f);
	if (s || f->side == SIDE_WIRE)
		return s;
	f->side = SIDE_WIRE;
	s = bpf_map_lookup_elem(&flows, f);
	if (s && s->tenant == DIRECT)
		return s;
	f->side = SIDE_POD;
	return 0;
}

// learn writes a flow down. by is the tenant that opens it, if one does.
static __noinline int learn(const struct flow *f, const struct pod *pod, __u32 tenant, int outbound, __u32 by)
{
	if (!f || !pod)
		return FLOWS_FULL;
	__u32 ifindex = pod->ifindex;
	struct flow_state s = { .tenant = tenant, .ifindex = ifindex, .learned = 1, .outbound = outbound, .led = by ? 0 : LED_ALONE };
	s.seen = bpf_ktime_get_ns();
	if (!may_learn(ifindex, by))
		return FLOWS_FULL;
	if (bpf_map_update_elem(&flows, f, &s, BPF_NOEXIST))
		return FLOWS_FULL;
	count_learned(ifindex, 1);
	if (tenant != DIRECT)
		return 0;
	struct pod_counters *c = pod_counters_of(ifindex);
	if (c)
		c->direct++;
	return tell_flow(f, &s, pod, EVENT_OPENED);
}

// follow keeps the books of a flow that is written down, and says where it
// belongs.
static __always_inline int follow(const struct flow *f, struct flow_state *s, const struct pod *pod, const struct packet *p, int from_pod, __u32 bytes)
{
	int tenant = s->tenant;
	__u8 was = s->ended, ended = was, flags = p->flags;
	__u32 expected = s->expected;
	__sync_fetch_and_add(from_pod ? &s->bytes_sent : &s->bytes_received, bytes);
	if (s->led == LED_ALONE && !(flags & TCP_SYN))
		s->led = LED;
	// One end alone keeps nothing.
	if (s->led != LED_ALONE && (!s->learned || (s->bytes_sent && s->bytes_received)))
		s->seen = bpf_ktime_get_ns();
	if (from_pod && flags & TCP_ACK)
		s->expected = p->acknowledged;
	else if (!from_pod && expected && p->sequence == expected)
		s->expected = p->next;
	// The pod's kernel takes no other either (RFC 5961, 3.2), but behind what was lost: anybody
	// can send one with the right ports.
	int forged = !from_pod && expected && p->sequence != expected;
	if (flags & TCP_RST && !forged)
		ended |= ENDED_RESET | (!from_pod && expected ? ENDED_TAKEN : 0);
	else if (from_pod && !(ended & ENDED_TAKEN && p->acknowledged == expected)) // not what was on its way
		ended &= ~(ENDED_RESET | ENDED_TAKEN); // it was forged: the pod talks on
	if (flags & TCP_FIN)
		ended |= from_pod ? ENDED_POD : ENDED_PEER;
	int both = (ended & (ENDED_POD | ENDED_PEER)) == (ENDED_POD | ENDED_PEER);
	if ((both || ended & ENDED_RESET) && !(ended & ENDED_TOLD)) {
		ended |= ENDED_TOLD;
		if (tenant == DIRECT)
			tell_flow(f, s, pod, EVENT_CLOSED);
	}
	if (ended != was) // or another CPU's word, of what the other end sends, would be lost
		s->ended = ended;
	// The acknowledgement of the second FIN is its last packet.
	if (both && !(flags & (TCP_FIN | TCP_RST)))
		forget(f, s);
	return tenant;
}

// follow_beside does likewise for a connection in the clear, of what belongs_to isn't asked
// for: a pod answers to the node what a NodePort masquerades, and the node's own processes
// answer for services.
static __noinline int follow_beside(const struct flow *f, const struct pod *pod, const struct packet *p, int from_pod, __u32 bytes)
{
	if (!f || !pod || !p)
		return 0;
	struct flow_state *s = bpf_map_lookup_elem(&flows, f);
	if (s && s->tenant == DIRECT)
		follow(f, s, pod, p, from_pod, bytes);
	return 0;
}

// may_come_again tells whether a SYN can be the one that led a flow there.
static __always_inline int may_come_again(const struct flow_state *s)
{
	return s->led == LED_ALONE && bpf_ktime_get_ns() - s->seen < SYN_AGAIN_NS;
}

// unanswered: what a tenant has begun as a pod, or to it, and its peer hasn't said a word of.
static __always_inline int unanswered(const struct flow_state *s)
{
	return s->learned && !s->led && !(s->outbound ? s->bytes_received : s->bytes_sent);
}

// belongs_to says where a packet of a pod's flow goes: to a tenant, DIRECT, or
// IS_MIDSTREAM, FLOWS_FULL, DIRECT_TOO_FAST, PORTS_TAKEN or BEGINS_AGAIN. by is the tenant
// that sent it, if one did. f is another one after DIRECT.
static __always_inline int belongs_to(const struct packet *p, struct flow *f, struct pod *pod, int from_pod, __u32 by, __u32 bytes)
{
	__u32 tenant = pod->tenant;
	enum side side = f->side;
	struct flow_state *s = find(f);
	// A former tenant can begin with the ports of a connection that the pod's tenant has. Its
	// peer's kernel knows better, and answers neither by a SYN nor by a reset.
	if (s && tenant != DIRECT && s->tenant != tenant && s->tenant != by && !(p->flags & (by ? TCP_SYN : TCP_SYN | TCP_RST)) && unanswered(s))
		return tenant;
	// What isn't the sender's isn't touched: a tenant is hostile. Who may open connections of
	// the pod is told that it can't have these ports, others aren't.
	if (s && by && s->tenant != by && !(by == tenant && opens(p) && s->ended))
		return opens(p) && (by == tenant || is_former(by, &f->pod)) ? PORTS_TAKEN : s->tenant;
	// A former tenant could take up ports beforehand, and would get what the pod opens
	// from them. Peers' SYNs can be forged: they end none that was there before it moved.
	int taken = !by && s && s->tenant != DIRECT && s->tenant != tenant && !s->led && (from_pod || s->learned);
	// A FIN of the peer's can be forged, too, and a pod that hasn't sent its own is still there.
	__u8 over = by || from_pod ? 0xff : ENDED_POD | ENDED_RESET;
	// A pod that dials again has no such connection any more, whatever was seen of its end.
	int again = !by && from_pod && s && s->expected;
	if (s && opens(p) && (s->ended & over || taken || again)) {
		forget(f, s);
		f->side = side;
		s = 0;
	}
	// An end can be hidden from here, and the pod would take a SYN that comes behind it.
	if (s && !by && !from_pod && s->tenant == DIRECT && opens(p) && !may_come_again(s))
		return BEGINS_AGAIN;
	if (s)
		return follow(f, s, pod, p, from_pod, bytes);
	if (!opens(p))
		return tenant == DIRECT ? IS_MIDSTREAM : tenant;
	if (by) {
		// What a former tenant opens must be written down: its answers would go
		// to the pod's tenant.
		if (tenant != by && is_former(by, &f->pod))
			return learn(f, pod, by, from_pod, by) ? FLOWS_FULL : by;
		if (pod->learn && tenant == by)
			learn(f, pod, tenant, from_pod, by);
		return tenant;
	}
	struct tenant_counters *c = counters_of(tenant);
	int direct = tenant == DIRECT;
	// Tunnels end at the tenant in any case: the pod doesn't speak it.
	int may = !direct && (from_pod || f->pod_port != HBONE_PORT);
	if (may && excluded(f, pod->ifindex, from_pod)) {
		// Before it is written down, or what follows would pass in the clear.
		if (from_pod && !may_begin(tenant))
			return DIRECT_TOO_FAST;
		direct = 1;
		if (c)
			c->excluded++;
	} else if (may && pod->bypass) {
		// At no pace: the bound is for what passes beside a proxy that works.
		direct = 1;
		if (c)
			c->bypassed++;
	}
	if (direct) {
		f->side = SIDE_WIRE;
		// What a tenant has there, by its own choice of ports, gives way.
		s = side == SIDE_POD ? bpf_map_lookup_elem(&flows, f) : 0;
		if (s && s->tenant != DIRECT && !s->led)
			forget(f, s);
		return learn(f, pod, DIRECT, from_pod, 0) ? FLOWS_FULL : DIRECT;
	}
	if (pod->learn)
		learn(f, pod, tenant, from_pod, 0);
	return tenant;
}

// dialled tells whether the pod itself opened a flow that looks like a tunnel to it.
static __always_inline int dialled(const struct flow *f)
{
	struct flow_state *s = bpf_map_lookup_elem(&flows, f);
	return s && s->led && s->outbound;
}
