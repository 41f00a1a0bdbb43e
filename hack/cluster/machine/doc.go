// Package machine runs the machines of the local cluster: a set of Linux
// namespaces, cgroups of their own and a root file system made of this
// machine's programs and the machine's own state, under a small init that
// starts the machine's daemons again when they end and bounds their logs.
//
//	Start ──▶ init (stage 1): joins its cgroups, leaves this machine's view of them
//	            └─exec─▶ init (stage 2, pid 1): root, network, sysctls, daemons
//
// Ending the init ends every process in the machine, and with its mount
// namespace go all mounts: what is left for Stop are the cgroups, and those are
// known by name.
package machine
