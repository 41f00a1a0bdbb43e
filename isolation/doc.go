// Package isolation runs tenants' proxies in bulkheads: for each tenant on this
// node a network namespace, a uid and a cgroup, and in them one Envoy process
// for each generation.
//
//	RunDir (tmpfs: gone after a reboot)     LibDir (disk)
//	  netns/<tenant>     bind mount           indexes.json     tenant → index, and so uid
//	  state/<tenant>     what runs            envoy/<version>-<digest>/  what runs
//	  tenants/<tenant>/xds<gen>/  relay       log/<tenant>/envoy<gen>.log
//
// A process is started by running Launcher, which is this very program again in
// SandboxInit: it waits until the manager has written down who it is and put it
// into its cgroups, builds an empty root around Envoy, gives up everything that
// it is allowed to do and becomes Envoy.
//
//	manager ──clone(new pid namespace)──▶ init: blocked on fd 3
//	   state written, cgroups joined
//	   ──config on fd 3──▶ netns, mounts, pivot_root, uid, capabilities, seccomp ──exec──▶ Envoy
//	   ◀──error or end of file on fd 4──
//
// A manager that dies before the config is sent leaves an init that sees the end
// of fd 3 and exits; after that the state file names the process. So at every
// line what is left can be found by the next manager.
//
// Processes belong to no manager: Close leaves them running and Open adopts them
// by pid, start time and cgroup. An adopted process is watched through its pidfd,
// which since Linux 6.15 also tells how it ended; before, only a kill for lack of
// memory is known of somebody else's child.
//
// A generation that isn't wanted any more drains: Envoy takes its leave of its
// clients, and the process ends with the last connection or at a deadline that
// is in the state, whichever manager is there by then.
//
// Envoy's files are read by a process in the cgroup "_envoy", beside those of the
// tenants, so that its text, which all share, is charged to no tenant.
package isolation
