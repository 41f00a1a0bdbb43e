// Package controllers is the operator: it reads the cluster, keeps what it comes
// to in an xds.Store, and writes each node's plan and everybody's status.
//
//	gather.go      what the informers keep of each object
//	translate/     decisions, pure
//	mesh*.go       what is known now, updated one object at a time
//	publish.go     controllers of every replica: informers → mesh → xds.Store
//	write_*.go     controllers of the leader: plans, status, ConfigMaps
//	authority.go   the Secret with the mesh's keys
//	serve.go       the gRPC server for agents
//	operator.go    Options and Run
//
// What a change costs: a pod its own proxy (the tenant's pods on its node) and
// the services that name it; a service its own endpoints; a node its own pods. A
// namespace costs its pods. Three things cost more: a MeshTopology is matched
// with every namespace; a change of the nodes' or services' ranges, or of a node's
// presence, is a new list of all ranges and new listeners for every proxy, if the
// list differs; and a MeshTopology's status counts all proxies, at most twice a
// second.
package controllers
