// Package netfilter steers the TCP of mesh pods through their tenants' network
// namespaces by nftables rules, for nodes where eBPF can't be had. It does what the
// package bpf does, with the same rules.
//
//	pod A ── from_pod ──▶ netns of A's tenant ── TPROXY ──▶ Envoy
//	                                                          │
//	wire ◀── stack ◀── routed as A ◀──────────────────── from_tenant
//
//	wire ── stack ──▶ to_pod ──▶ netns of B's tenant ── TPROXY ──▶ Envoy
//	                                                                │
//	                                        pod B ◀── delivered ── from_tenant
//
// On the node there is one table of the family netdev: an ingress and an egress
// chain on each pod's veth, and an ingress chain on each tenant's, which lead to
// chains that all share. Sets and maps say who is who, so that a pod is a few
// elements of them. Pods of a tenant with a pace for what they begin beside it lead to
// the tenant's own chains, too. A table of the family inet marks what the node itself sends
// to pods. In each tenant's namespace a table picks the listener.
//
// The kernel keeps all of it, also the pods' UIDs, as comments: the next process
// adopts it. Whatever isn't known is closed.
package netfilter
