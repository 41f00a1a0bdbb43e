package podnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Errors that callers tell apart.
var (
	// ErrGone: the namespace, its interface or the node's end of it isn't there
	// (any more).
	ErrGone = errors.New("pod's network is gone")
	// ErrUnsupported: the pod isn't connected by a veth whose end is in the node's
	// network namespace.
	ErrUnsupported = errors.New("pod's network isn't a veth of this node")
)

// Network is how a pod is connected to its node.
type Network struct {
	// IPs of the interface, without link-local ones.
	IPs []netip.Addr
	// Ifindex of the node's end.
	Ifindex int
	// Ifname of the node's end.
	Ifname string
	// MTU of the pod's end.
	MTU int
	// MAC of the pod's end.
	MAC net.HardwareAddr
}

// Inspect reads the network behind interface name in the namespace at path. It
// must be called in the node's network namespace. Errors wrap ErrGone or
// ErrUnsupported where they are.
func Inspect(path, name string) (Network, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		if os.IsNotExist(err) {
			err = ErrGone
		}
		return Network{}, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return Network{}, fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	defer inside.Close()
	link, err := inside.LinkByName(name)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			err = ErrGone
		}
		return Network{}, fmt.Errorf("find %s in %s: %w", name, path, err)
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return inside.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return Network{}, fmt.Errorf("list addresses of %s in %s: %w", name, path, err)
	}
	n := Network{Ifindex: link.Attrs().ParentIndex, MTU: link.Attrs().MTU, MAC: link.Attrs().HardwareAddr}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.Unmap().IsLinkLocalUnicast() {
			n.IPs = append(n.IPs, ip.Unmap())
		}
	}
	slices.SortFunc(n.IPs, netip.Addr.Compare)
	if link.Type() != "veth" || n.Ifindex == 0 {
		return Network{}, fmt.Errorf("%s in %s is a %s: %w", name, path, link.Type(), ErrUnsupported)
	}
	peer, err := netlink.LinkByIndex(n.Ifindex)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			err = ErrGone
		}
		return Network{}, fmt.Errorf("find the node's end of %s in %s: %w", name, path, err)
	}
	// An index of another namespace may exist here too, as something else.
	if peer.Type() != "veth" || peer.Attrs().ParentIndex != link.Attrs().Index {
		return Network{}, fmt.Errorf("%s isn't the other end of %s in %s: %w", peer.Attrs().Name, name, path, ErrUnsupported)
	}
	n.Ifname = peer.Attrs().Name
	return n, nil
}
