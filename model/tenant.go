package model

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Scope says what a tenant is made of.
type Scope uint8

// The scopes. ScopeNone is the zero value: no tenant.
const (
	ScopeNone           Scope = iota
	ScopeNode                 // one proxy for all pods of a node: the shared baseline
	ScopeNamespace            // a namespace: the default
	ScopeServiceAccount       // a service account of a namespace
	ScopePod                  // one pod, as a sidecar would
)

// Tenant is a unit of isolation: on each node that hosts pods of it, it has a
// proxy of its own. It is comparable, and its zero value means "no tenant".
type Tenant struct {
	Scope     Scope
	Namespace string // empty for ScopeNode
	Name      string // of the service account or pod; else empty
}

// ErrTenant is returned for strings that name no tenant.
var ErrTenant = errors.New("not a tenant")

// NamespaceTenant is the tenant of a whole namespace.
func NamespaceTenant(namespace string) Tenant {
	return Tenant{Scope: ScopeNamespace, Namespace: namespace}
}

// IsZero reports whether t is no tenant.
func (t Tenant) IsZero() bool { return t.Scope == ScopeNone }

// String is the tenant's name in protocols and metrics: "_node",
// "team-a", "team-a.sa.reviews", "team-a.pod.web-0"; "" for the zero value. No
// two tenants share one: a namespace has neither dots nor underscores.
func (t Tenant) String() string {
	switch t.Scope {
	case ScopeNode:
		return "_node"
	case ScopeNamespace:
		return t.Namespace
	case ScopeServiceAccount:
		return t.Namespace + ".sa." + t.Name
	case ScopePod:
		return t.Namespace + ".pod." + t.Name
	}
	return ""
}

// longestFile is what of a tenant's name is used for files as it is: names of pods
// are longer than file names may be.
const longestFile = 180

// FileName is the tenant's name in file systems, different for each tenant and at
// most 197 bytes long. Beyond 180 bytes of String its end is a hash.
func (t Tenant) FileName() string {
	name := t.String()
	if len(name) <= longestFile {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return name[:longestFile] + "-" + hex.EncodeToString(sum[:8])
}

// ParseTenant is the inverse of String. Errors wrap ErrTenant.
func ParseTenant(s string) (Tenant, error) {
	if s == "_node" {
		return Tenant{Scope: ScopeNode}, nil
	}
	p := strings.SplitN(s, ".", 3)
	if len(p[0]) > 63 || !isDNSName(p[0]) {
		return Tenant{}, fmt.Errorf("%w: %q", ErrTenant, s)
	}
	if len(p) == 1 {
		return NamespaceTenant(p[0]), nil
	}
	scopes := map[string]Scope{"sa": ScopeServiceAccount, "pod": ScopePod}
	if len(p) != 3 || scopes[p[1]] == ScopeNone || !isDNSName(p[2]) {
		return Tenant{}, fmt.Errorf("%w: %q", ErrTenant, s)
	}
	return Tenant{Scope: scopes[p[1]], Namespace: p[0], Name: p[2]}, nil
}
