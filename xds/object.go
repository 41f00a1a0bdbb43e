package xds

import (
	"fmt"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Source is the object that a resource was made from, to tell its owner.
type Source struct {
	Kind      string // Pod, Service, Proxy, Network, or Static for what every mesh has
	Namespace string
	Name      string
}

func (s Source) String() string {
	if s.Namespace == "" {
		return s.Kind + " " + s.Name
	}
	return s.Kind + " " + s.Namespace + "/" + s.Name
}

func workloadSource(w model.Workload) Source { return Source{"Pod", w.Namespace, w.Name} }
func serviceSource(s model.Service) Source   { return Source{"Service", s.Namespace, s.Name} }
func proxySource(k model.ProxyKey) Source {
	return Source{"Proxy", k.Tenant.Namespace, k.Tenant.String() + " on " + k.Node}
}

// ObjectError says which object is wrong.
type ObjectError struct {
	Source Source
	Err    error
}

func (e *ObjectError) Error() string { return fmt.Sprintf("%s: %v", e.Source, e.Err) }

// Unwrap returns what is wrong with it.
func (e *ObjectError) Unwrap() error { return e.Err }

// Rejection is a resource that isn't in force, because it failed validation or a
// proxy refused it. What was in force before under its name stays.
type Rejection struct {
	// Proxy that refused it; zero if it never left the server.
	Proxy    model.ProxyKey
	Type     string // type URL
	Resource string // name
	Source   Source
	Message  string
}
