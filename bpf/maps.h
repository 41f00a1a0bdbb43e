// What the programs and the agent share. Go's bindings are generated from here.
//
// A new version finds the maps of a former one and takes their entries over by
// the fields' names: new fields are 0 then, which must be the closed choice; a
// field that means something else needs another name. Padding is called pad.
#pragma once

// 1,000 pods a node with an address of each family, and room for pods that are
// replaced before the agent has removed them.
#define MAX_POD_ADDRESSES 4096
// 500 tenants a node.
#define MAX_TENANTS 512
// A veth per pod and per tenant.
#define MAX_VETHS 4096
#define MAX_NODE_ADDRESSES 1024

#define UID_LENGTH 40
// Listening sockets of one port of one generation: Envoy opens one per worker.
#define MAX_WORKERS 4
#define GENERATIONS 2
#define LISTENER_SLOTS (GENERATIONS * LISTENERS * MAX_WORKERS)

#define HBONE_PORT 15008
// In place of a tenant: the packet passes as if there were no mesh.
#define DIRECT 0

enum listener {
	LISTENER_OUTBOUND,
	LISTENER_INBOUND,
	LISTENER_PLAIN,
	LISTENER_NODE_PLAIN,
	LISTENERS,
	NO_LISTENER = LISTENERS,
};

enum veth_kind {
	VETH_POD = 1,
	VETH_TENANT,
};

// An IPv6 address, or an IPv4 address mapped into one.
struct addr {
	__u8 bytes[16];
};

struct pod {
	// DIRECT: it has left the mesh, or hasn't joined yet.
	__u32 tenant;
	// The node's end of the pod's veth.
	__u32 ifindex;
	// The pod's end.
	__u8 mac[6];
	// Where the pod sends what isn't on its link: the veth, or the bridge it is a port of.
	__u8 gateway_mac[6];
	__u8 uid[UID_LENGTH];
	// Every flow that opens is written down, as before the pod moves.
	__u8 learn;
	// It takes plain text from outside of the mesh.
	__u8 plain;
	// New flows pass in the clear: the emergency bypass.
	__u8 bypass;
	__u8 pad;
};

struct tenant {
	// The node's end of the tenant's veth.
	__u32 ifindex;
	// The tenant's end.
	__u8 mac[6];
	// Percent of new flows that generation 1 gets.
	__u8 canary;
	// Listening sockets a port, per generation.
	__u8 workers[GENERATIONS];
	__u8 pad[3];
	// The most connections at a time, and new ones in a second; 0 is no bound.
	__u32 max_connections, new_per_second;
	// What is to be added to the count of connections.
	__s32 connections_correction;
	// The most flows that its pods begin beside it in a second; 0 is no bound.
	__u32 direct_per_second;
};

// By ifindex, of the node's end.
struct veth {
	enum veth_kind kind;
	__u32 tenant;
	__u8 uid[UID_LENGTH];
	// Of a pod, and of all of a tenant: entries in the map of flows that the programs made.
	__u32 learned;
	// Of a tenant: two generations are compared, see watch.h.
	__u8 watched;
	__u8 pad[3];
};

// What the agent sets once.
struct settings {
	// Says from_pod that from_tenant made it send the packet. A pod can't forge
	// it: the kernel zeroes a packet's mark when it leaves a network namespace.
	__u32 mark, mark_mask;
	// The node's secret: without it, who opens connections could choose which
	// generation gets them.
	__u32 hash_key[2];
};

struct drops {
	// from_pod: the source isn't an address of the pod of that veth.
	__u64 spoofed;
	// A fragment of a TCP packet: only the first would have ports.
	__u64 fragment;
	// Headers that can't be read to their end, or a SYN with FIN or RST.
	__u64 malformed;
	// The pod's tenant isn't known or has no network namespace.
	__u64 no_tenant;
	// to_pod: the destination isn't an address of the pod of that veth.
	__u64 not_the_pod;
	// from_tenant: from the deliver address, but not to a pod of the tenant.
	__u64 deliver;
	// from_tenant: neither from nor to a pod of the tenant.
	__u64 foreign;
	// from_tenant: neither TCP nor ARP nor neighbour discovery. from_pod: a packet in
	// another one, for the end of a tunnel.
	__u64 protocol;
	// steer: neither end is a pod of the tenant. from_pod: to the tunnels' port.
	__u64 unsteered;
	// In the middle of a connection that didn't begin here, where new ones pass in the clear.
	__u64 midstream;
	// A connection that would pass in the clear, but couldn't be written down.
	__u64 flows_full;
	// steer: a connection in plain text to a pod that takes none.
	__u64 plain_text;
	// from_pod, to_pod: a new connection of a tenant that has as many as it may, and
	// of one that opens them faster than it may.
	__u64 too_many, too_fast;
	// from_pod: a flow beside the tenant, of pods that begin them faster than they may.
	__u64 direct_too_fast;
	// from_tenant: a new connection as a pod or to it, with the ports of another's that is
	// written down. It is refused.
	__u64 ports_taken;
};

struct tenant_counters {
	// New connections, and which generation and listener got them.
	__u64 steered[GENERATIONS];
	__u64 listener[LISTENERS];
	// New connections that found no listener.
	__u64 refused;
	// New connections that passed in the clear: by exclusion, by the bypass.
	__u64 excluded, bypassed;
	// Events that found no room in the ring, or came too fast.
	__u64 events_lost;
	// Packets.
	struct drops dropped;
};

// Of one pod.
struct pod_counters {
	// New connections per listener of the tenant, and in the clear.
	__u64 listener[LISTENERS];
	__u64 direct;
	// Those of the tenant that got through their handshake, as its sockets tell: the
	// listeners' are SYNs, which anybody can send.
	__u64 accepted;
	// Of TCP on the pod's veth, from the IP header on.
	__u64 bytes_sent, bytes_received;
	// When the last event of a denial was sent; see tell_denied.
	__u64 told;
	// When the next event of a connection in the clear would be due; see tell_flow.
	__u64 direct_due;
	struct drops dropped;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_POD_ADDRESSES);
	__type(key, struct addr);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_VETHS);
	__type(key, __u32);
	__type(value, struct veth);
} veths SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_TENANTS);
	__type(key, __u32);
	__type(value, struct tenant);
} tenants SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_NODE_ADDRESSES);
	__type(key, struct addr);
	__type(value, __u8);
} node_addresses SEC(".maps");

// Of one tenant: every tenant has a copy of steer with a map of its own.
// Key: (generation * LISTENERS + listener) * MAX_WORKERS + worker.
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, LISTENER_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

// By tenant; 0 is for what belongs to none.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_TENANTS + 1);
	__type(key, __u32);
	__type(value, struct tenant_counters);
} counters SEC(".maps");

// By ifindex of the pod's veth.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, MAX_VETHS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct pod_counters);
} per_pod SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} config SEC(".maps");

// counters_of a tenant; of one that isn't known, those of none.
static __always_inline struct tenant_counters *counters_of(__u32 tenant)
{
	struct tenant_counters *c = bpf_map_lookup_elem(&counters, &tenant);
	if (c)
		return c;
	tenant = 0;
	return bpf_map_lookup_elem(&counters, &tenant);
}

static __always_inline int is_node_address(const struct addr *a)
{
	return bpf_map_lookup_elem(&node_addresses, a) != 0;
}
