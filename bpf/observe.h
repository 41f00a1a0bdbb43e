// What a tenant's sockets tell of its connections: the only place that knows
// when each began and ended, and its bytes, without books of our own.
#pragma once

#define AF_INET6 10
#define TCP_CONGESTION 13
#define SOL_SOCKET 1
#define SO_PRIORITY 12

// The kernel keeps these flags with the socket: a rarely used one remembers how
// the connection began.
#define WAS_PASSIVE BPF_SOCK_OPS_RTO_CB_FLAG
// And another one that it was counted: a former version didn't. The kernel lets no
// socket go that hasn't been through TCP_CLOSE, so that none is counted for ever.
#define WAS_COUNTED BPF_SOCK_OPS_RETRANS_CB_FLAG

// Events of a tenant's sockets, in a second, and at once after a rest: an eighth of the
// ring. Whoever has taken over a proxy opens and closes them as fast as it can.
#define SOCKET_EVENTS_PER_SECOND 10000
#define SOCKET_EVENTS_AT_ONCE 1000

static __always_inline int addresses(struct bpf_sock_ops *ctx, struct addr *local, struct addr *remote)
{
	__u32 family = ctx->family, local4 = ctx->local_ip4, remote4 = ctx->remote_ip4;
	__u32 local6[4] = { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3] };
	__u32 remote6[4] = { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3] };
	asm volatile("" : "+r"(local4), "+r"(remote4), "+r"(local6[0]), "+r"(local6[1]));
	asm volatile("" : "+r"(local6[2]), "+r"(local6[3]), "+r"(remote6[0]), "+r"(remote6[1]));
	asm volatile("" : "+r"(remote6[2]), "+r"(remote6[3]));
	if (family == AF_INET) {
		map_ipv4(local, local4);
		map_ipv4(remote, remote4);
		return 1;
	}
	if (family == AF_INET6) {
		__builtin_memcpy(local, local6, sizeof(*local));
		__builtin_memcpy(remote, remote6, sizeof(*remote));
		return 1;
	}
	return 0;
}

// unpace has a connection whose other end is a pod of this node sent without
// pacing: nothing lies between that could be congested, and where the node's
// algorithm is BBR each of its timers costs more than a packet's way to the pod.
// Reno is in every kernel. What leaves the node keeps the node's algorithm, and if
// this fails, so does what doesn't.
static __noinline int unpace(struct bpf_sock_ops *ctx)
{
	struct addr local, remote;
	char reno[] = "reno";
	if (!addresses(ctx, &local, &remote) || !bpf_map_lookup_elem(&pods, &remote))
		return 0;
	return bpf_setsockopt(ctx, IPPROTO_TCP, TCP_CONGESTION, reno, sizeof(reno));
}

// DIRECT_PRIORITY is the handle of the queueing discipline that bounds what a tenant
// sends: what has it for its priority passes unbounded.
#define DIRECT_PRIORITY 0x10000

// unbind has what a tenant sends to its own pods not count as its egress.
static __noinline int unbind(struct bpf_sock_ops *ctx)
{
	struct addr local, remote;
	__u32 priority = DIRECT_PRIORITY;
	if (!addresses(ctx, &local, &remote))
		return 0;
	struct pod *pod = bpf_map_lookup_elem(&pods, &remote);
	if (!pod || pod->tenant != tenant_index)
		return 0;
	return bpf_setsockopt(ctx, SOL_SOCKET, SO_PRIORITY, &priority, sizeof(priority));
}

// tells_socket says whether another event of a tenant's sockets is told.
static __always_inline int tells_socket(__u32 tenant)
{
	const __u64 pace = NSEC_PER_SEC / SOCKET_EVENTS_PER_SECOND;
	struct tenant_load *l = bpf_map_lookup_elem(&loads, &tenant);
	return l && is_due(l, &l->events_due, pace, SOCKET_EVENTS_AT_ONCE * pace);
}

static __noinline int tell_socket(struct bpf_sock_ops *ctx, enum event_kind kind, int passive)
{
	struct event e = { .kind = kind, .reason = NO_REASON };
	struct addr local, remote;
	if (!addresses(ctx, &local, &remote))
		return 0;
	__u16 local_port = ctx->local_port, remote_port = bpf_ntohl(ctx->remote_port);
	__u64 sent = ctx->bytes_acked, received = ctx->bytes_received;
	// The pod is the peer of what it dialled and of what is delivered to it;
	// of the others it is the address that the tenant uses.
	__u16 service = passive ? local_port : remote_port;
	struct pod *pod = bpf_map_lookup_elem(&pods, &remote);
	struct pod *as = bpf_map_lookup_elem(&pods, &local);
	__u32 tenant = tenant_index;
	int at_local = service == HBONE_PORT || !pod || (pod->tenant != tenant && as);
	if (at_local)
		pod = as;
	if (!pod)
		return 0;
	// In its own namespace a process can have any two addresses.
	if (passive && kind == EVENT_OPENED && pod->tenant == tenant) {
		struct pod_counters *count = pod_counters_of(pod->ifindex);
		if (count)
			__sync_fetch_and_add(&count->accepted, 1);
	}
	if (!tells_socket(tenant)) {
		struct tenant_counters *lost = counters_of(tenant);
		if (lost)
			lost->events_lost++;
		return 0;
	}
	e.way = at_local ? (passive ? WAY_INBOUND : WAY_UPSTREAM) : (passive ? WAY_OUTBOUND : WAY_DELIVERED);
	e.tenant = tenant;
	__builtin_memcpy(e.uid, pod->uid, sizeof(e.uid));
	e.pod = at_local ? local : remote;
	e.peer = at_local ? remote : local;
	e.pod_port = at_local ? local_port : remote_port;
	e.peer_port = at_local ? remote_port : local_port;
	// By the pod: what the tenant's socket sent as the pod, or received from it.
	e.bytes_sent = at_local ? sent : received;
	e.bytes_received = at_local ? received : sent;
	return tell(&e);
}

// observe: the sockets of a tenant's processes.
SEC("sockops")
int observe(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
		unpace(ctx);
		unbind(ctx);
		tell_socket(ctx, EVENT_OPENED, 0);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG | WAS_PASSIVE | WAS_COUNTED);
		count_connection(tenant_index, 1);
		unpace(ctx);
		unbind(ctx);
		tell_socket(ctx, EVENT_OPENED, 1);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] != BPF_TCP_CLOSE)
			break;
		if (ctx->bpf_sock_ops_cb_flags & WAS_COUNTED)
			count_connection(tenant_index, -1);
		tell_socket(ctx, EVENT_CLOSED, (ctx->bpf_sock_ops_cb_flags & WAS_PASSIVE) != 0);
		break;
	default:
		ctx->reply = -1; // the kernel's own choice
	}
	return 1;
}
