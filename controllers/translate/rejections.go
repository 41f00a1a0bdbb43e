package translate

import (
	"cmp"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Reasons of the conditions Configured and mesh.bulkhead.dev/Served.
const (
	ReasonConfigured     = "Configured"
	ReasonConfigRejected = "ConfigRejected"
	ReasonInvalid        = "Invalid"
	ReasonNoEndpoints    = "NoEndpoints"
	ReasonPortMismatch   = "PortMismatch"
)

// configured says whether the proxies of a tenant took all configuration.
func configured(nodes []NodeView) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionConfigured, Status: metav1.ConditionTrue, Reason: ReasonConfigured, Message: "the proxies took all configuration"}
	var refused []string
	for _, n := range nodes {
		for _, r := range n.Status.Rejected {
			of := ""
			if source := n.Sources[r.Name]; source != "" {
				of = " of " + source
			}
			refused = append(refused, fmt.Sprintf("%s refused %s %s%s: %s", n.Node, r.Type, r.Name, of, r.Message))
		}
	}
	if len(refused) > 0 {
		c.Status, c.Reason = metav1.ConditionFalse, ReasonConfigRejected
		c.Message = "what was in force before stays; " + listed(refused)
	}
	return c
}

// stable says whether the proxies of a tenant go on running. The worst is told
// first: what hasn't recovered, and of that the latest.
func stable(nodes []NodeView) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionStable, Status: metav1.ConditionTrue, Reason: v1alpha1.ConditionStable, Message: "no proxy has ended lately by itself"}
	var last *v1alpha1.ProxyFailure
	var told []string
	for _, n := range nodes {
		f := n.Status.Failure
		if f == nil || f.Recovered {
			continue
		}
		line := fmt.Sprintf("%s: generation %d ended (restarts: %d): %s", n.Node, f.Generation, f.Restarts, cmp.Or(f.Message, f.Cause))
		if f.Log != "" {
			line += "; last it wrote: " + f.Log
		}
		told = append(told, line)
		if last == nil || last.At.Before(&f.At) {
			last = f
		}
	}
	if last != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, last.Cause, "no other tenant is concerned, and what ended is started again by itself; "+listed(told)
	}
	return c
}

// Problem is what is wrong with an object; the zero value is nothing.
type Problem struct{ Reason, Message string }

// ServiceProblem says why proxies can't serve a Service as it is written. svc is
// what Service made of it.
func ServiceProblem(svc model.Service, endpointSlices []discoveryv1.EndpointSlice) Problem {
	if len(svc.VIPs) == 0 || len(svc.Ports) == 0 {
		return Problem{} // nothing to serve
	}
	var without []string
	for _, p := range svc.Ports {
		if len(p.Endpoints) == 0 {
			without = append(without, portName(p))
		}
	}
	if len(without) == 0 {
		return Problem{}
	}
	ready := slices.ContainsFunc(endpointSlices, func(es discoveryv1.EndpointSlice) bool {
		return slices.ContainsFunc(es.Endpoints, func(e discoveryv1.Endpoint) bool { use, _ := usable(e.Conditions); return use })
	})
	switch {
	case !ready:
		return Problem{ReasonNoEndpoints, "no endpoint is ready: connections from the mesh are refused"}
	case slices.ContainsFunc(svc.Ports, func(p model.ServicePort) bool { return len(p.Endpoints) == 0 && !offered(p.Name, endpointSlices) }):
		return Problem{ReasonPortMismatch, "no ready endpoint has a port for " + listed(without) + ": see targetPort and the ports of the pods"}
	}
	return Problem{ReasonNoEndpoints, "the pods behind " + listed(without) + " aren't known yet: connections from the mesh are refused"}
}

// offered reports whether a ready endpoint has the port.
func offered(port string, endpointSlices []discoveryv1.EndpointSlice) bool {
	return slices.ContainsFunc(endpointSlices, func(es discoveryv1.EndpointSlice) bool {
		return slicePort(es, port) != 0 && slices.ContainsFunc(es.Endpoints, func(e discoveryv1.Endpoint) bool { use, _ := usable(e.Conditions); return use })
	})
}

func portName(p model.ServicePort) string {
	if p.Name == "" {
		return fmt.Sprintf("port %d", p.Port)
	}
	return fmt.Sprintf("port %s (%d)", p.Name, p.Port)
}

// Refusal is a resource of a Service that a tenant's Envoy refused.
type Refusal struct {
	Tenant   model.Tenant
	Node     string
	Resource v1alpha1.RejectedResource
}

// ServiceCondition tells a Service's owner what is wrong with it; nil if nothing.
//
// A tenant's Envoy may have been taken over, and can refuse what it likes. So one
// of another namespace is believed only together with that of a second, and only
// the namespace's own is quoted.
func ServiceCondition(s *corev1.Service, problem Problem, refusals []Refusal, now metav1.Time) *metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionServed, Status: metav1.ConditionFalse, Reason: problem.Reason, Message: problem.Message, LastTransitionTime: now}
	tenants, quote := map[model.Tenant]bool{}, ""
	for _, r := range refusals {
		tenants[r.Tenant] = true
		if r.Tenant.Namespace == s.Namespace && quote == "" {
			quote = fmt.Sprintf(": %s %s: %s", r.Resource.Type, r.Resource.Name, r.Resource.Message)
		}
	}
	switch {
	case len(tenants) > 1 || quote != "":
		c.Reason = ReasonConfigRejected
		c.Message = fmt.Sprintf("Envoys (of tenants: %d) refused what the service was made into; what they had before stays%s", len(tenants), quote)
	case problem == Problem{}:
		return nil
	}
	for _, had := range s.Status.Conditions {
		if had.Type == c.Type && had.Status == c.Status {
			c.LastTransitionTime = had.LastTransitionTime
		}
	}
	return &c
}
