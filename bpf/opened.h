// SYNs on their way to a tenant. steer sees no flags of TCP, and by these tells a new
// connection from what else finds no socket: an ACK that answers a SYN cookie, and
// segments of connections that aren't the tenant's any more, or never were. Anybody can
// send such, which would count as connections that fail.
#pragma once

// One is here while it gets from a veth into the tenant's namespace, and after that until
// others push it out. Who pushes out another's on its way has a count lost, and of what
// two pods of a tenant begin that connection.
#define MAX_SYNS 16384
// How long one may be on its way, in nanoseconds: who sent it repeats it then.
#define SYN_TAKES 1000000000ULL

struct syn {
	struct flow flow;
	__u32 tenant;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SYNS);
	__type(key, struct syn);
	// When it came: nanoseconds of CLOCK_MONOTONIC, odd once it was led.
	__type(value, __u64);
} syns SEC(".maps");

// opened is called with a SYN that goes to a tenant.
static __noinline int opened(const struct flow *f, __u32 tenant)
{
	struct syn s = { .tenant = tenant };
	__u64 now = bpf_ktime_get_ns() & ~1ULL;
	if (!f)
		return 0;
	s.flow = *f;
	return bpf_map_update_elem(&syns, &s, &now, BPF_ANY);
}

// is_opening tells whether such a SYN has just come: this is it, or the answer to its cookie.
static __noinline int is_opening(const struct flow *f, __u32 tenant)
{
	struct syn s = { .tenant = tenant };
	if (!f)
		return 0;
	s.flow = *f;
	__u64 *came = bpf_map_lookup_elem(&syns, &s);
	return came && *came + SYN_TAKES >= bpf_ktime_get_ns();
}

// was_opened tells whether what steer leads is such a SYN, once for each.
static __noinline int was_opened(const struct flow *f, __u32 tenant)
{
	struct syn s = { .tenant = tenant };
	if (!f)
		return 0;
	s.flow = *f;
	__u64 *came = bpf_map_lookup_elem(&syns, &s);
	if (!came || *came & 1)
		return 0;
	int late = *came + SYN_TAKES < bpf_ktime_get_ns();
	*came |= 1;
	return !late;
}
