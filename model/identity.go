package model

import (
	"errors"
	"fmt"
	"strings"
)

// Identity is a workload's SPIFFE identity. The zero value means "not in the
// mesh" and has no string form that a certificate could carry.
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// ErrIdentity is returned for strings that aren't workload identities.
var ErrIdentity = errors.New("not a workload identity")

// IsZero reports whether i names nobody.
func (i Identity) IsZero() bool { return i == Identity{} }

// String is the SPIFFE ID, spiffe://<trust domain>/ns/<namespace>/sa/<service
// account>, the form of Istio and Kubernetes; "" for the zero value.
func (i Identity) String() string {
	if i.IsZero() {
		return ""
	}
	return "spiffe://" + i.TrustDomain + "/ns/" + i.Namespace + "/sa/" + i.ServiceAccount
}

// ParseIdentity is the inverse of String. It accepts exactly that form: names of
// Kubernetes' alphabet, no query, port, escape or trailing slash. Errors wrap
// ErrIdentity.
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("%w: %q doesn't start with spiffe://", ErrIdentity, s)
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" {
		return Identity{}, fmt.Errorf("%w: %q isn't spiffe://<trust domain>/ns/<namespace>/sa/<service account>", ErrIdentity, s)
	}
	for _, name := range []string{p[0], p[2], p[4]} {
		if !isDNSName(name) {
			return Identity{}, fmt.Errorf("%w: %q in %q", ErrIdentity, name, s)
		}
	}
	if len(p[2]) > 63 || strings.Contains(p[2], ".") {
		return Identity{}, fmt.Errorf("%w: namespace %q in %q", ErrIdentity, p[2], s)
	}
	return Identity{TrustDomain: p[0], Namespace: p[2], ServiceAccount: p[4]}, nil
}

// isDNSName reports whether s is a lower-case DNS subdomain (RFC 1123), as
// Kubernetes demands of service accounts and SPIFFE (about) of trust domains.
func isDNSName(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	for _, label := range strings.Split(s, ".") {
		if len(label) == 0 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
		}
	}
	return true
}
