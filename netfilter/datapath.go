package netfilter

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	routes "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// DefaultMark is none that kube-proxy, Calico, Cilium or the CNI plugins use.
const DefaultMark = 0x1000

// Options configure Open. The zero value works.
type Options struct {
	// Mark is the bit of a packet's mark that says, on the way out to a pod, that the
	// node made it or a tenant delivers it. A pod can't set it: the kernel zeroes a
	// packet's mark when it leaves a network namespace. Default DefaultMark.
	Mark uint32
	// OwnPriority is given to packets between a tenant and its own pods, in the queues
	// at either end of the tenant's veth: in those to the tenant always, in those from it
	// where Tenant.OwnPriority says so. Default 0: they have the priority of all.
	OwnPriority uint32
	// Gone is called when somebody has removed the tables, or given an interface another
	// name, from then on everything is to be updated again: until then pods have their
	// plain connections. It must not block.
	Gone func()
	// Log gets what isn't any caller's error. Default: nothing is logged.
	Log *slog.Logger
}

// Datapath is the steering of one node. All methods can be called concurrently,
// and must run in the node's network namespace. One process at a time has it open.
type Datapath struct {
	mark, priority uint32
	log            *slog.Logger
	sets           map[string]*nftables.Set

	watched *netlink.Conn
	done    chan struct{}

	mu   sync.Mutex
	snap *snapshot
	// written are the chains whose rules are this process's.
	written map[string]writing
	// node's addresses, as SetNodeAddresses said.
	node []netip.Addr
	// Of tenants that UpdateTenant was called for: what is in their namespaces.
	tenants map[uint16]*tenantState
	// left are addresses of pods that a tenant has been left by a moment ago: a SYN
	// may be on its way there.
	left map[former]time.Time
	// joining are the tenants of pods that aren't there yet, but have connections written
	// down, by address.
	joining map[netip.Addr]uint16
	// cut are connections that pods have lost in moves, by the tenant that had too many.
	cut steer.Cut
	// events is what reads them, or nil.
	events *eventReading
	// lost counts events by tenant; it outlives readers.
	lost map[uint16]uint64

	// pods are whose the addresses are, as of the last snapshot.
	pods atomic.Pointer[directory]
}

// Open makes the tables, or adopts what a former process made, also if that one
// was killed at any point. Rules of another version are replaced in one step,
// without a moment in between; sets stay, with what was counted.
func Open(o Options) (*Datapath, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Mark == 0 {
		o.Mark = DefaultMark
	}
	if o.Mark&(o.Mark-1) != 0 || o.Mark&(markFrom|markTo) != 0 {
		return nil, fmt.Errorf("mark %#x: want one bit, and neither of the lowest two", o.Mark)
	}
	d := &Datapath{mark: o.Mark, priority: o.OwnPriority, log: o.Log, sets: hostSets(), tenants: map[uint16]*tenantState{}, left: map[former]time.Time{}, joining: map[netip.Addr]uint16{}, cut: steer.Cut{}, lost: map[uint16]uint64{}, written: map[string]writing{}}
	if err := d.install(); err != nil {
		return nil, err
	}
	if o.Gone != nil {
		var err error
		if d.watched, err = watch(o.Gone); err != nil {
			return nil, err
		}
		d.done = make(chan struct{})
		if err := watchNames(o.Gone, d.done, d.log); err != nil {
			return nil, errors.Join(err, d.watched.Close())
		}
	}
	return d, nil
}

// install makes tables, sets and chains, and then the chains' rules. Nothing leads
// to a chain before a pod or tenant is there.
func (d *Datapath) install() error {
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	c.AddTable(steering)
	c.AddTable(marking)
	for _, s := range d.sets {
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("write set %s: %w", s.Name, err)
		}
	}
	for _, a := range d.node {
		if err := c.SetAddElements(d.sets[setNode+familyOf(a).version], []nftables.SetElement{{Key: addressKey(a)}}); err != nil {
			return fmt.Errorf("write the node's addresses: %w", err)
		}
	}
	for _, protocol := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP} {
		if err := c.SetAddElements(d.sets[setPorted], []nftables.SetElement{{Key: []byte{protocol}}}); err != nil {
			return fmt.Errorf("write the protocols that have ports: %w", err)
		}
	}
	chains := hostChains(d.mark, d.priority)
	for _, ch := range chains {
		c.AddChain(&nftables.Chain{Name: ch.name, Table: steering})
	}
	output := c.AddChain(&nftables.Chain{Name: "output", Table: marking, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRef(10)}) // behind the DNAT of services
	c.FlushChain(output)
	for _, f := range families {
		c.AddRule(&nftables.Rule{Table: marking, Chain: output, Exprs: join(meta(expr.MetaKeyNFPROTO, regTemp), equal(regTemp, f.proto),
			network(f.destination, f.length, regKey), isIn(setMarked+f.version, regKey), setMark(d.mark, d.mark))})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("make the tables %s (if a former version's are in the way, remove them with `nft delete table`): %w", TableName, err)
	}
	pods, err := d.relead()
	if err != nil {
		return err
	}
	if err := replaceRules(steering, append(chains, pods...)); err != nil {
		return fmt.Errorf("write the table %s: %w", TableName, err)
	}
	if err := forgetFormerSets(); err != nil {
		d.log.Warn("Sets of a former version stay", "table", TableName, "error", err)
	}
	return nil
}

// forgetFormerSets removes those that no rule of this version has anything to do with.
func forgetFormerSets() error {
	c, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	sets, err := c.GetSets(steering)
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	for _, s := range sets {
		if slices.Contains([]string{"dialled4", "dialled6"}, s.Name) {
			c.DelSet(s)
		}
	}
	return c.Flush()
}

// Close leaves all of it at work, and ends the reader of events.
func (d *Datapath) Close() error {
	err := d.closeEvents()
	if d.watched == nil {
		return err
	}
	close(d.done)
	return errors.Join(err, d.watched.Close())
}

// Installed reports whether there is anything that Uninstall would remove.
func Installed() (bool, error) {
	c, err := open(0)
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	for _, t := range []*nftables.Table{steering, marking} {
		if there, err := hasTable(c, t); err != nil || there {
			return there, err
		}
	}
	return false, nil
}

func hasTable(c *nftables.Conn, t *nftables.Table) (bool, error) {
	all, err := c.ListTablesOfFamily(t.Family)
	// A kernel without nf_tables has none.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	for _, have := range all {
		if have.Name == t.Name {
			return true, nil
		}
	}
	return false, nil
}

// Uninstall removes all of it from the node at once, of whatever version, and from
// the tenants' network namespaces, as paths, that there still are. Pods that still
// run have their plain connections from then on. It is not an error if there is
// nothing.
func Uninstall(netns ...string) error {
	if err := removeTables(0, steering, marking); err != nil {
		return fmt.Errorf("remove nftables of the node: %w", err)
	}
	errs := []error{removeVethAddresses()}
	for _, path := range netns {
		errs = append(errs, inTenant(path, func(fd int) error { return removeTables(fd, inner) }))
	}
	return errors.Join(errs...)
}

// removeVethAddresses takes from the tenants' veths what only this package needs.
func removeVethAddresses() error {
	all, err := routes.AddrList(nil, routes.FAMILY_V4)
	if err != nil && !errors.Is(err, routes.ErrDumpInterrupted) {
		return fmt.Errorf("list addresses: %w", err)
	}
	var errs []error
	for _, a := range all {
		if !a.IP.Equal(vethAddress.IP) {
			continue
		}
		link, err := routes.LinkByIndex(a.LinkIndex)
		if err == nil {
			err = routes.AddrDel(link, &a)
		}
		if err != nil && !errors.As(err, &routes.LinkNotFoundError{}) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("remove the address of a tenant's veth: %w", err))
		}
	}
	return errors.Join(errs...)
}

func removeTables(netns int, tables ...*nftables.Table) error {
	c, err := open(netns)
	if err != nil {
		return err
	}
	for _, t := range tables {
		there, err := hasTable(c, t)
		if err != nil {
			return err
		}
		if there {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// inTenant calls f with a network namespace, unless that is gone.
func inTenant(path string, f func(netns int) error) error {
	ns, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	if err := f(int(ns.Fd())); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return nil
}

// SetNodeAddresses says which addresses are the node's own, all of them: pods
// reach those directly, and connections that come from there are delivered from
// the deliver address.
func (d *Datapath) SetNodeAddresses(addresses []netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	wanted := map[netip.Addr]bool{}
	for _, a := range addresses {
		if a = a.Unmap(); !a.IsValid() || a.IsUnspecified() || a.Zone() != "" {
			return fmt.Errorf("set the node's addresses: %q isn't one", a)
		}
		wanted[a] = true
	}
	d.node = slices.Collect(maps.Keys(wanted))
	ch, err := d.change()
	if err != nil {
		return err
	}
	for _, f := range families {
		for k := range ch.snap.sets[setNode+f.version] {
			if a, _ := netip.AddrFromSlice([]byte(k)); !wanted[a] {
				ch.delete(setNode+f.version, []byte(k))
			}
		}
	}
	for a := range wanted {
		ch.put(setNode+familyOf(a).version, addressKey(a), nil, "")
	}
	if err := ch.commit(); err != nil {
		return fmt.Errorf("set the node's addresses: %w", err)
	}
	return d.syncTenants()
}
