// Package bpf steers the TCP of mesh pods through their tenants' network
// namespaces, in the kernel. The programs are in C (datapath.c and its headers);
// this package loads and attaches them and fills their maps.
//
//	pod A ── from_pod ──▶ netns of A's tenant ── steer ──▶ Envoy
//	                                                          │
//	wire ◀── stack ◀── A's veth ◀── re-injected as A ── from_tenant
//
//	wire ── stack ──▶ to_pod ──▶ netns of B's tenant ── steer ──▶ Envoy
//	                                                               │
//	                                       pod B ◀── delivered ── from_tenant
//
// Links, programs and maps are pinned, so that traffic doesn't notice when the
// process that made them ends; the next one adopts them. Nothing is kept in
// memory only.
//
//	<PinDir>/maps/<map>                       shared by all programs
//	<PinDir>/programs/<program>
//	<PinDir>/tenants/<index>/{listeners,steer,from_tenant,steer_link,observe,observe_link}
//	<PinDir>/pods/<uid>/{from_pod,to_pod}
//
// Whatever isn't known is closed: the TCP of a pod without a tenant is dropped,
// a connection for a tenant without listeners refused.
//
// A connection belongs to where its SYN went. What doesn't go where the pod's new
// connections go is written down in the map flows, until it ends: what a pod has
// open when it joins, leaves or changes tenant (MovePod, ReleasePod), and what is
// excluded (SetExclusions, Pod.Exclusions) or bypasses the mesh (Pod.Bypass). A
// tenant that a pod has left has what had begun to open, and opens for it what its
// connections need, as long as it has any; the map formers says so.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type addr -type pod -type tenant -type veth -type veth_kind -type tenant_load -type tenant_counters -type generation -type generation_counters -type watched_flow -type listener -type side -type flow -type flow_state -type former -type exclusion -type settings -type drops -type pod_counters -type event -type event_kind -type way datapath datapath.c -- -O2 -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
