// Package identity makes and guards the SPIFFE identities of workloads.
//
//	operator                         node
//	Authority ◀──CSR (NodeService)── Store ──Secret──▶ the tenant's Envoy
//	root ─▶ intermediate ─▶ leaf      keys in Dir, a tmpfs that only root reads
//
// A key is made on the node that uses it and never leaves it; only CSRs and
// certificates travel. Nothing in this package writes a workload's key anywhere
// but into Store's Dir, or logs it. Time is the caller's clock where a function
// takes now, else the system's.
package identity
