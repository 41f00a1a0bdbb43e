package podnet

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
)

// NodeAddresses returns the addresses of the node itself, sorted, without
// loopback's.
func NodeAddresses() ([]netip.Addr, error) {
	all, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list node's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range all {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLoopback() {
			out = append(out, ip.Unmap())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
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
