package steer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// MaxUID is how many characters a pod's UID can have.
const MaxUID = 40

// Pod is a pod of the mesh on this node.
type Pod struct {
	// UID is the Kubernetes UID: letters, digits, "-" and "_", at most MaxUID.
	UID string
	// Tenant is its tenant's index. While that tenant isn't known, the pod's
	// TCP is dropped.
	Tenant uint16
	// Ifindex is the node's end of its veth.
	Ifindex int
	// IPs are all its addresses: from any other, its TCP is dropped.
	IPs []netip.Addr
	// MAC is that of the pod's end.
	MAC net.HardwareAddr
	// Exclusions are left out of the mesh for this pod.
	Exclusions []Exclusion
	// Strict pods take no plain text: new connections from outside of the mesh are
	// refused before they begin, and counted as Drops.PlainText. What the node
	// itself makes (probes, hostNetwork) and what is excluded still passes.
	Strict bool
	// Bypass is the emergency bypass: while it is on, new connections pass in the
	// clear, and are counted as Counters.Bypassed; those that have begun stay where
	// they are, also when it is switched off.
	Bypass bool
}

// ValidateUID says what is wrong with a UID.
func ValidateUID(uid string) error {
	legal := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_'
	}
	// It is the name of a folder, too.
	if uid == "" || len(uid) > MaxUID || strings.ContainsFunc(uid, func(r rune) bool { return !legal(r) }) {
		return fmt.Errorf("UID is not 1 to %d letters, digits, - and _", MaxUID)
	}
	return nil
}

// Validate says what is wrong with a pod.
func (p Pod) Validate() error {
	if err := ValidateUID(p.UID); err != nil {
		return err
	}
	switch {
	case p.Tenant == 0 || p.Tenant > MaxTenantIndex:
		return fmt.Errorf("tenant %d is not between 1 and %d", p.Tenant, MaxTenantIndex)
	case p.Ifindex <= 0:
		return errors.New("index of the host's end of the veth is missing")
	case len(p.IPs) == 0:
		return errors.New("it has no address")
	case len(p.MAC) != 6:
		return fmt.Errorf("MAC address %q: want 6 bytes", p.MAC)
	}
	for _, a := range p.IPs {
		if err := ValidateAddress(a); err != nil {
			return err
		}
	}
	for _, e := range p.Exclusions {
		if err := e.Validate(); err != nil {
			return err
		}
	}
	return nil
}

// ValidateAddress says what is wrong with an address of a pod or node.
func ValidateAddress(a netip.Addr) error {
	if !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
		return fmt.Errorf("address %q: want one IPv4 or IPv6 address without a zone", a)
	}
	return nil
}
