// Package nodeservice is the operator's side of the protocol with agents
// (api/node/v1alpha1): it says which node is calling, signs only what runs there,
// and believes what a node tells of its pods only as far as the API agrees.
//
// A pod or tenant that can't be seen (yet) is Unavailable, since the agent may be
// ahead of the API and tries again; PermissionDenied is for what is seen and wrong.
package nodeservice
