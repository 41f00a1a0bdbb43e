// Package relay carries each tenant proxy's delta ADS stream to the operator.
//
//	Envoy ──Unix socket of its own──▶ stream ──one gRPC stream each──▶ operator
//	                                    │ secrets: answered here (Secrets)
//	                                    │ held: what the proxy acknowledged
//	                                    └ last good: served while the operator is away
//
// A proxy's stream outlives the operator: when the operator comes back, the relay
// subscribes again with every name and version that the proxy holds, so that only
// what changed is sent. What a proxy sends is never passed on as it is: the relay
// keeps the subscription state itself, bounded, and writes its own requests.
package relay
