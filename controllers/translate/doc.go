// Package translate decides: from Kubernetes objects to the model, to each
// node's plan and to status. All of it is pure: no client, no clock of its own,
// no state, and the same input gives the same output, in the same order.
package translate
