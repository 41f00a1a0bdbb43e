package steer

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// MaxTenantIndex is the highest tenant index; the lowest is 1.
const MaxTenantIndex = 4095

// ErrUnknownTenant says that UpdateTenant hasn't been called for a tenant, or
// DeleteTenant has.
var ErrUnknownTenant = errors.New("unknown tenant")

// The addresses from which Envoy delivers to pods what came from the node's own
// addresses.
var (
	DeliverIPv4 = netip.MustParseAddr("169.254.96.1")
	DeliverIPv6 = netip.MustParseAddr("fd69:8::1")
)

// Tenant is where a tenant's proxy on this node lives.
type Tenant struct {
	// Index is 1 to MaxTenantIndex.
	Index uint16
	// Netns is the path of its network namespace.
	Netns string
	// HostIfindex is the node's end of its veth, TenantIfindex the other end, and
	// TenantMAC that one's address.
	HostIfindex, TenantIfindex int
	TenantMAC                  net.HardwareAddr
	// CgroupV2 is the path of its cgroup in a version 2 hierarchy. Empty: none,
	// and no events of its connections. Only eBPF has use for it.
	CgroupV2 string
	// Connections bounds what the tenant's proxy takes.
	Connections ConnectionLimits
	// BoundEgress says that what the tenant sends waits at its end of the veth, which
	// what goes to its own pods must not. Only Netfilter has use for it: eBPF's sockets
	// are told apart in any case.
	BoundEgress bool
	// Watch has the connections of each generation counted by how they fare, from now
	// on. It costs each of the tenant's packets a look. Only eBPF does.
	Watch bool
}

// maxPerSecond is the most that can be paced: a connection a microsecond.
const maxPerSecond = 1_000_000

// ConnectionLimits bound the connections that a tenant's proxy takes, from its pods
// and to them; 0 is no limit. A tunnel counts as one, whatever is in it. What is
// beyond a limit is dropped before it costs the tenant anything, without an answer,
// and counted as Drops.TooMany and TooFast; those that have begun go on.
type ConnectionLimits struct {
	// Concurrent is the most at a time; the last quarter is for those of the tenant's
	// pods. With eBPF it needs Tenant.CgroupV2: without, nobody counts, and it doesn't
	// hold; and connections that open at the same instant can go beyond it by as many. One
	// that a SYN cookie was for is reset if it has no room at the end of its handshake, and
	// isn't counted.
	Concurrent uint32
	// NewPerSecond is how many the tenant's pods may open in a second, and others to
	// them as many, at most 1,000,000; after a second without any, so many at once.
	NewPerSecond uint32
	// DirectPerSecond is how many flows the tenant's pods may begin in a second beside
	// its proxy: of other protocols than TCP, to the node itself, and what is excluded;
	// at most 1,000,000, and after a second without any, so many at once. What is beyond
	// it is dropped and counted as Drops.DirectTooFast.
	DirectPerSecond uint32
}

// Validate says what is wrong with limits.
func (l ConnectionLimits) Validate() error {
	if l.NewPerSecond > maxPerSecond {
		return fmt.Errorf("%d new connections per second: at most %d", l.NewPerSecond, maxPerSecond)
	}
	if l.DirectPerSecond > maxPerSecond {
		return fmt.Errorf("%d new flows beside the proxy per second: at most %d", l.DirectPerSecond, maxPerSecond)
	}
	return nil
}

// Validate says what is wrong with a tenant.
func (t Tenant) Validate() error {
	switch {
	case t.Index == 0 || t.Index > MaxTenantIndex:
		return fmt.Errorf("index is not between 1 and %d", MaxTenantIndex)
	case t.HostIfindex <= 0 || t.TenantIfindex <= 0:
		return errors.New("index of an end of the veth is missing")
	case len(t.TenantMAC) != 6:
		return fmt.Errorf("MAC address %q of the tenant's end of the veth: want 6 bytes", t.TenantMAC)
	case t.Netns == "":
		return errors.New("path of the network namespace is missing")
	}
	return t.Connections.Validate()
}
