// Package debug lets owners of tenants look into their proxies over the network:
// configuration, statistics, heap profile and log level.
//
//	https://<node>.agent.bulkhead:15022/tenants/<tenant>/{config,stats,heap,loglevel}
//
// Whoever asks shows a Kubernetes token whose audience is the host name above.
// A token for one node is of no use at another or at the API server, so a node
// that somebody took over can do nothing with those that it is shown. The API
// server says who it is (TokenReview) and whether that one has the verb get, or
// update to set a level, on tenantproxies/debug of the tenant's namespace
// (SubjectAccessReview). The agent's own command line asks over its control socket
// instead, as root of the node.
//
// What hostile pods can reach is TLS, one request header of 16 KiB within 5 s,
// and a TokenReview, at a pace; connections are bounded by source and altogether.
// The answer is made by the tenant's own Envoy, in its memory; the agent holds
// 16 MiB of four tenants at most.
package debug
