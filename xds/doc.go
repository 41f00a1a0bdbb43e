// Package xds turns the model into Envoy configuration and hands it to tenant
// proxies over delta ADS.
//
//	model ──Listeners, PodCluster, VIPEndpoints, …──▶ resources (pure, validated)
//	  │                                                  ▲ built when somebody asks, kept while somebody holds
//	  └──Set…, Delete…──▶ Store ── who holds what ──▶ Server: one stream a proxy generation
//
// A proxy's listeners are its own; everything else is shared by all proxies, for
// no identity is in it: the connection brings that along as filter state. What
// a proxy holds beyond the few static clusters it asked for by name:
//
//	vip|10.96.0.10:80   a service's address: an EDS cluster
//	l7|10.96.0.10:80    its listener and routes, where it is spoken to as HTTP
//	be|4|ns/name:80     a service's port as a backend of routes
//	pod|10.1.0.2        a pod dialled directly
//
// Envoy asks for such a name once and never again, so a name that isn't known
// gets a cluster that refuses, and the real one when it becomes known.
package xds
