// Package model is what Bulkhead knows of a mesh, free of Kubernetes and Envoy:
// plain values that the stages of the pipeline hand to each other.
//
//	Kubernetes objects ──gather──▶ inputs ──translate──▶ model ──build──▶ Envoy resources
//	     (controllers, reads)       (controllers, pure)         (xds, pure)        │ delta ADS
//	                                                                               ▼
//	NodeProxy (plan of a node) ──agent──▶ isolation, identity, bpf            tenant proxies
//
// It imports the standard library only, so that each stage can be tested without
// the others. Values are immutable once handed over: nobody changes a slice that
// came out of another stage.
package model
