package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/netfilter"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// datapath leads pods' connections to their tenants' proxies. It is *bpf.Datapath
// or *netfilter.Datapath.
type datapath interface {
	UpdateTenant(steer.Tenant) error
	DeleteTenant(index uint16) error
	Tenants() ([]uint16, error)

	SetListeners(index uint16, generation, pid int) error
	ClearListeners(index uint16, generation int) error
	SetWeight(index uint16, canaryPercent int) error
	ConnectionLimits(index uint16) (steer.ConnectionLimits, error)
	CheckConnections(index uint16, netns string) (again time.Duration, err error)
	Connections(index uint16) (int64, error)

	UpdatePod(steer.Pod) error
	MovePod(steer.Pod, model.FlowReader) error
	ReleasePod(uid string, established model.FlowReader) error
	DeletePod(uid string) error
	Pods() ([]string, error)
	Placements() (map[string]model.Placement, error)
	HeldFlows() (map[string]map[uint16]int, error)
	SweepFlows(idle time.Duration) error

	SetNodeAddresses([]netip.Addr) error
	Counters() (map[uint16]steer.Counters, error)
	PodCounters() (map[string]steer.PodCounters, error)
	Usage() ([]steer.Usage, error)
	Events(buffer int) (*steer.EventReader, error)
	Close() error
}

// steering is the datapath that is at work, and the one before it while that has
// pods.
type steering struct {
	datapath
	kind v1alpha1.Redirection
}

// ensureRedirection opens the datapath that is wanted; "" is the one there is. The
// former goes on until removeFormer.
func (a *Agent) ensureRedirection(want v1alpha1.Redirection) error {
	now := a.steering()
	if want == "" {
		if want = now.kind; want == "" {
			want = v1alpha1.RedirectionEBPF
			if there, err := a.installed(v1alpha1.RedirectionNetfilter); err == nil && there {
				want = v1alpha1.RedirectionNetfilter
			}
		}
	}
	if now.kind == want {
		return nil
	}
	next, err := a.openDatapath(want)
	if err != nil {
		return fmt.Errorf("redirect by %s: %w", want, err)
	}
	if addresses := a.knownNodeAddresses(); addresses != nil {
		if err := next.SetNodeAddresses(addresses); err != nil {
			return errors.Join(err, next.Close())
		}
	}
	a.former = now
	if now.datapath == nil {
		// Of an agent before this one, which was to redirect in another way.
		other := v1alpha1.RedirectionEBPF
		if want == other {
			other = v1alpha1.RedirectionNetfilter
		}
		if there, err := a.installed(other); err != nil {
			return errors.Join(err, next.Close())
		} else if there {
			d, err := a.openDatapath(other)
			if err != nil {
				return errors.Join(err, next.Close())
			}
			a.former = steering{d, other}
		}
	}
	if a.former.datapath != nil {
		a.log.Info("redirecting in another way", "from", a.former.kind, "to", want)
	}
	clear(a.taken) // the sockets are to be handed over again
	a.mu.Lock()
	a.datapath = steering{next, want}
	close(a.redirected)
	a.redirected = make(chan struct{})
	a.mu.Unlock()
	return nil
}

// steering is the datapath at work; its zero value before the first plan.
func (a *Agent) steering() steering {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.datapath
}

// redirection is that datapath, with a channel that is closed when there is another.
func (a *Agent) redirection() (steering, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.datapath, a.redirected
}

func (a *Agent) openDatapath(kind v1alpha1.Redirection) (datapath, error) {
	if kind == v1alpha1.RedirectionNetfilter {
		if err := netfilter.Probe(); err != nil {
			return nil, fmt.Errorf("this node's kernel can't steer by nftables: %w", err)
		}
		return netfilter.Open(netfilter.Options{Mark: a.o.Mark, OwnPriority: isolation.DirectPriority, Gone: a.wake, Log: a.log})
	}
	if err := bpf.Probe(); err != nil {
		return nil, fmt.Errorf("this node's kernel can't steer by eBPF: %w", err)
	}
	if err := bpf.Mount(filepath.Dir(a.o.PinDir)); err != nil {
		return nil, err
	}
	return bpf.Open(bpf.Options{PinDir: a.o.PinDir, Mark: a.o.Mark, MarkMask: a.o.Mark, Log: a.log})
}

// installed reports whether there is anything of a redirection on the node.
func (a *Agent) installed(kind v1alpha1.Redirection) (bool, error) {
	if kind == v1alpha1.RedirectionNetfilter {
		return netfilter.Installed()
	}
	entries, err := os.ReadDir(a.o.PinDir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return len(entries) > 0, err
}

// formerPods are those that the former datapath steers, and those that were steered
// a moment ago: what they have isn't in the clear.
func (a *Agent) formerPods() []string {
	a.mu.Lock()
	was := slices.Collect(maps.Keys(a.last.steered))
	a.mu.Unlock()
	if a.former.datapath == nil {
		return was
	}
	uids, err := a.former.Pods()
	if err != nil {
		a.log.Error("pods that are redirected in the former way can't be read", "error", err)
	}
	return append(uids, was...)
}

// removeFormer ends the former datapath as soon as all of its pods have the new
// one: until then none of a pod's packets is in the clear. What passes twice
// meanwhile is sent again.
func (a *Agent) removeFormer(r *round) time.Duration {
	if a.former.datapath == nil {
		return resync
	}
	uids, err := a.former.Pods()
	if err == nil {
		for _, uid := range uids {
			record, ok := a.sandboxes.get(uid)
			_, steered := r.steered[uid]
			if _, planned := r.plan.pod(uid); ok && planned && !steered && a.linkExists(record) {
				return time.Second
			}
		}
		if err = a.former.Close(); err == nil {
			err = a.uninstall(a.former.kind)
		}
	}
	if err != nil {
		a.log.Error("former redirection isn't removed", "redirection", a.former.kind, "error", err)
		if d, openErr := a.openDatapath(a.former.kind); openErr == nil {
			a.former.datapath = d
		}
		return time.Second
	}
	a.log.Info("redirected in another way", "from", a.former.kind, "to", a.steering().kind)
	a.former = steering{}
	return resync
}

func (a *Agent) uninstall(kind v1alpha1.Redirection) error {
	if kind != v1alpha1.RedirectionNetfilter {
		return bpf.Uninstall(a.o.PinDir)
	}
	var namespaces []string
	for _, t := range a.bulkheads.Tenants() {
		if s, ok := a.bulkheads.State(t); ok {
			namespaces = append(namespaces, s.Netns)
		}
	}
	return netfilter.Uninstall(namespaces...)
}

// setNodeAddresses tells the datapath, also the one that comes after it.
func (a *Agent) setNodeAddresses(addresses []netip.Addr) error {
	a.mu.Lock()
	a.nodeAddresses = addresses
	d := a.datapath.datapath
	a.mu.Unlock()
	if d == nil {
		return nil
	}
	return d.SetNodeAddresses(addresses)
}

func (a *Agent) knownNodeAddresses() []netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.nodeAddresses
}
