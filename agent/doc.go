// Package agent is a node's loop: it makes what runs on the node what the node's
// NodeProxy says, and tells what it sees.
//
//	NodeProxy, ConfigMaps ──watch──▶ plan (pure) ─┐
//	CNI plugin ──attach──▶ sandboxes ─────────────┼─▶ reconcile ──▶ identity, relay, isolation, bpf
//	processes, acknowledged listeners ────────────┘        └──▶ status (pure) ──▶ NodeProxy.status
//
// RunPlan puts a file in the place of the objects and of the CNI plugin: the loop
// is the same.
//
// Reconcile is level-triggered: each run looks at everything and repeats what an
// earlier one may have left undone, so it doesn't matter where an agent died.
// Nothing is removed before the first plan is known.
package agent
