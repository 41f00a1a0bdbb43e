package podnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// serviceLinks hold addresses of Services for IPVS, kube-proxy's and kube-router's. These
// aren't the node: whoever may make a Service with externalIPs would choose what passes
// all tenants' proxies by, and every Service would.
var serviceLinks = []string{"kube-ipvs0", "kube-dummy-if"}

// NodeAddresses returns the addresses of the node itself, sorted, without
// loopback's and those that IPVS has of Services.
func NodeAddresses() ([]netip.Addr, error) {
	return nodeAddresses(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
}

// nodeAddresses is NodeAddresses by a list of all of them.
func nodeAddresses(list func() ([]netlink.Addr, error)) ([]netip.Addr, error) {
	// Names before and after: such an interface may come, or go, meanwhile.
	services := map[int]bool{}
	if err := findServiceLinks(services); err != nil {
		return nil, err
	}
	all, err := whole(list)
	if err != nil {
		return nil, fmt.Errorf("list node's addresses: %w", err)
	}
	if err := findServiceLinks(services); err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLoopback() && !services[a.LinkIndex] {
			out = append(out, ip.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// whole asks again for a list that changed while it was read, as they do where pods come
// and go, and gives up where that has no end.
func whole(list func() ([]netlink.Addr, error)) (all []netlink.Addr, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// findServiceLinks adds the indexes of those that are there.
func findServiceLinks(indexes map[int]bool) error {
	for _, name := range serviceLinks {
		link, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			continue
		}
		if err != nil {
			return fmt.Errorf("find interface %s: %w", name, err)
		}
		indexes[link.Attrs().Index] = true
	}
	return nil
}

// WatchNodeAddresses calls f with the node's addresses, now and after changes,
// until ctx ends. If f fails it is called again a second later.
func WatchNodeAddresses(ctx context.Context, f func([]netip.Addr) error, failed func(error)) {
	var last []netip.Addr
	for ctx.Err() == nil {
		updates, done := make(chan netlink.AddrUpdate, 64), make(chan struct{})
		err := netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{ErrorCallback: func(err error) {
			if ctx.Err() == nil {
				failed(fmt.Errorf("watch node's addresses: %w", err))
			}
		}})
		if err != nil {
			failed(fmt.Errorf("watch node's addresses: %w", err))
			close(updates) // reads end at once: addresses are looked at every second
		}
		for again := true; again; {
			now, err := NodeAddresses()
			if err == nil && (last == nil || !slices.Equal(now, last)) {
				if err = f(now); err == nil {
					last = now
				}
			}
			retry := 30 * time.Second // events can be lost
			if err != nil {
				failed(err)
				retry = time.Second
			}
			select {
			case <-ctx.Done():
				again = false
			case _, again = <-updates:
				// A new pod brings several at once.
				for drained := false; again && !drained; {
					select {
					case _, again = <-updates:
					case <-time.After(20 * time.Millisecond):
						drained = true
					}
				}
			case <-time.After(retry):
			}
		}
		close(done)
		for range updates { // until the subscription has ended
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
