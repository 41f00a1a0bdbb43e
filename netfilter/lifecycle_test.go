package netfilter

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// inNode runs f in a network namespace of its own, which ends with it.
func inNode(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		check(t, unix.Unshare(unix.CLONE_NEWNET))
		f(t)
	}()
	<-done
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// veth makes one, with the other end beside it or in a namespace.
func veth(t *testing.T, name string, netns *os.File) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	v := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "x"}
	if netns != nil {
		v.PeerNamespace = netlink.NsFd(int(netns.Fd()))
	}
	check(t, netlink.LinkAdd(v))
	host, err := netlink.LinkByName(name)
	check(t, err)
	return host
}

// tenant makes a namespace for a tenant.
func tenant(t *testing.T, index uint16) steer.Tenant {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	check(t, os.WriteFile(path, nil, 0o600))
	made := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		if err == nil {
			err = netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1}}) // lo
		}
		made <- err
	}()
	check(t, <-made)
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	ns, err := os.Open(path)
	check(t, err)
	defer ns.Close()
	host := veth(t, "tenant"+string(rune('0'+index)), ns)
	return steer.Tenant{Index: index, Netns: path, HostIfindex: host.Attrs().Index, TenantIfindex: host.Attrs().ParentIndex, TenantMAC: host.Attrs().HardwareAddr}
}

func pod(t *testing.T, uid string, tenant uint16, addresses ...string) steer.Pod {
	t.Helper()
	host := veth(t, "pod"+uid, nil)
	p := steer.Pod{UID: uid, Tenant: tenant, Ifindex: host.Attrs().Index, MAC: host.Attrs().HardwareAddr}
	for _, a := range addresses {
		p.IPs = append(p.IPs, netip.MustParseAddr(a))
	}
	return p
}

func want(t *testing.T, d *Datapath, pods []string, tenants []uint16) {
	t.Helper()
	gotPods, err := d.Pods()
	check(t, err)
	gotTenants, err := d.Tenants()
	check(t, err)
	if !slices.Equal(gotPods, pods) || !slices.Equal(gotTenants, tenants) {
		t.Errorf("pods %v and tenants %v, want %v and %v", gotPods, gotTenants, pods, tenants)
	}
}

// A process makes a tenant's rules anew that another made: that may have been another
// version.
func TestRulesAreMadeAnew(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		one := tenant(t, 1)
		one.Connections.Concurrent = 8
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(pod(t, "a", 1, "10.0.0.1"))))
		strict := &nftables.Chain{Name: "strict4", Table: inner}
		rules := func() (handles []uint64) {
			inside(t, one, func(c *nftables.Conn) {
				have, err := c.GetRules(inner, strict)
				check(t, err)
				for _, r := range have {
					handles = append(handles, r.Handle)
				}
			})
			return handles
		}
		before := rules()
		check(t, d.UpdateTenant(one)) // by this process they needn't be
		if have := rules(); !slices.Equal(have, before) {
			t.Errorf("rules %v are made anew, were %v", have, before)
		}
		inside(t, one, func(c *nftables.Conn) {
			c.FlushChain(strict)
			check(t, c.Flush())
		})
		check(t, d.Close())
		d, err = Open(Options{})
		check(t, err)
		check(t, d.UpdateTenant(one))
		if have := rules(); len(have) != len(before) {
			t.Errorf("another process leaves %d rules of a chain, want %d", len(have), len(before))
		}
	})
}

// A process adopts what another made, follows a pod from veth to veth and from
// tenant to tenant, and leaves nothing.
func TestLifecycle(t *testing.T) {
	inNode(t, func(t *testing.T) {
		check(t, Probe())
		d, err := Open(Options{})
		check(t, err)
		one, two := tenant(t, 1), tenant(t, 2)
		a, b := pod(t, "a", 1, "10.0.0.1", "fd00::1"), pod(t, "b", 2, "10.0.0.2")
		if err := d.SetWeight(1, 10); !errors.Is(err, steer.ErrUnknownTenant) {
			t.Errorf("weight of a tenant that isn't known: %v", err)
		}
		check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two), d.UpdatePod(a), d.UpdatePod(b), d.SetWeight(1, 30)))
		check(t, errors.Join(d.UpdateTenant(one), d.UpdatePod(a))) // again
		want(t, d, []string{"a", "b"}, []uint16{1, 2})
		elements := func(set string) int {
			c, err := open(0)
			check(t, err)
			list, err := c.GetSetElements(d.sets[set])
			check(t, err)
			return len(list)
		}
		before := elements(setSent + "4")

		d, err = Open(Options{})
		check(t, err)
		want(t, d, []string{"a", "b"}, []uint16{1, 2})
		check(t, d.UpdateTenant(one))
		if w := d.tenants[1].have.weight; w != 30 {
			t.Errorf("after another process came the weight is %d", w)
		}
		// A pod comes back with another veth, takes over another's address, and goes to
		// another tenant.
		check(t, netlink.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "poda"}}))
		if err := d.UpdatePod(a); err == nil {
			t.Error("a veth that is gone was taken")
		}
		again := pod(t, "a", 2, "10.0.0.1", "10.0.0.2")
		check(t, errors.Join(d.UpdateTenant(two), d.UpdatePod(again)))
		if n := elements(setSent + "4"); n != before {
			t.Errorf("%d addresses of pods, had %d", n, before)
		}
		if n := elements(setSent + "6"); n != 0 {
			t.Errorf("%d addresses that nobody has any more", n)
		}
		in := d.tenants[2].have.pods
		if len(in) != 2 || len(d.tenants[1].have.pods) != 0 {
			t.Errorf("the tenants' namespaces have %v and %v", d.tenants[1].have.pods, in)
		}
		check(t, errors.Join(d.DeletePod("a"), d.DeletePod("b"), d.DeletePod("c"), d.DeleteTenant(1), d.DeleteTenant(2), d.DeleteTenant(3)))
		want(t, d, nil, nil)
		for name, set := range d.sets {
			if n := elements(set.Name); n != 0 && set.Table == steering && name != setPorted {
				t.Errorf("%d elements of %s are left", n, name)
			}
		}
		check(t, d.UpdateTenant(one))
		check(t, Uninstall(one.Netns, two.Netns, "/nowhere"))
		tables, err := (&nftables.Conn{}).ListTables()
		check(t, err)
		addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
		check(t, err)
		if there, err := Installed(); there || err != nil || len(tables) > 0 || len(addresses) > 0 {
			t.Errorf("left: %v, %d tables, %v, %v", there, len(tables), addresses, err)
		}
	})
}

// Which generation gets a connection depends on a secret of the tenant's table, which
// the next agent goes on with, and which outlives the table while the agent runs.
func TestSeed(t *testing.T) {
	inNode(t, func(t *testing.T) {
		one, two := tenant(t, 1), tenant(t, 2)
		start := func() *Datapath {
			t.Helper()
			d, err := Open(Options{})
			check(t, err)
			check(t, errors.Join(d.UpdateTenant(one), d.UpdateTenant(two)))
			for _, index := range []uint16{1, 2} {
				check(t, d.setState(index, func(s *innerState) { s.active, s.weight = [steer.Generations]bool{true, true}, 50 }))
			}
			return d
		}
		// seed is that of the rules of all listeners.
		seed := func(of steer.Tenant) (is uint32) {
			t.Helper()
			found := map[uint32]int{}
			inside(t, of, func(c *nftables.Conn) {
				for _, f := range families {
					for l := range steer.Listeners {
						rules, err := c.GetRules(inner, &nftables.Chain{Name: chainOf(l) + f.version, Table: inner})
						check(t, err)
						for _, r := range rules {
							for _, e := range r.Exprs {
								if hash, ok := e.(*expr.Hash); ok {
									is = hash.Seed
									found[is]++
								}
							}
						}
					}
				}
			})
			if is == 0 || len(found) != 1 || found[is] != len(families)*int(steer.Listeners) {
				t.Errorf("tenant %d: the rules' seeds are %v", of.Index, found)
			}
			return is
		}
		d := start()
		first := seed(one)
		if seed(two) == first {
			t.Error("two tables have one seed")
		}
		check(t, d.Close())
		d = start()
		if again := seed(one); again != first {
			t.Errorf("seed %#x, after another agent came %#x", first, again)
		}
		check(t, inTenant(one.Netns, func(ns int) error { return removeTables(ns, inner) }))
		check(t, d.UpdateTenant(one))
		check(t, d.setState(1, func(s *innerState) { s.active, s.weight = [steer.Generations]bool{true, true}, 50 }))
		if again := seed(one); again != first {
			t.Errorf("seed %#x, after somebody removed the table %#x", first, again)
		}
		check(t, d.Close())
	})
}

// A tenant that a pod has left goes on with what begins on its way, for a moment, and
// with what its connections need, as long as there are any.
func TestFormers(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2)), d.UpdateTenant(tenant(t, 3))))
		place := func(when string, tenant uint16, taking int, formers ...uint16) {
			t.Helper()
			places, err := d.Placements()
			check(t, err)
			p := places["a"]
			slices.Sort(p.Formers)
			if p.Tenant != tenant || !slices.Equal(p.Formers, formers) {
				t.Errorf("%s: the pod is %+v, want tenant %d and formers %v", when, p, tenant, formers)
			}
			if n := len(d.tenants[1].have.pods); n != taking {
				t.Errorf("%s: tenant 1 takes connections of %d addresses, want %d", when, n, taking)
			}
		}
		set := func(left time.Duration) {
			t.Helper()
			check(t, d.deleteFormers(func(former, time.Duration) bool { return true }))
			c, err := open(0)
			check(t, err)
			check(t, c.SetAddElements(d.sets[setFormers+"4"], []nftables.SetElement{{Key: former{1, netip.MustParseAddr("10.0.0.1")}.key(), Timeout: left}}))
			check(t, c.Flush())
		}
		a := pod(t, "a", 1, "10.0.0.1", "fd00::1")
		a.Strict = true
		var flows []model.Flow
		move := func(to uint16) {
			t.Helper()
			a.Tenant = to
			check(t, d.MovePod(a, func(uint16) ([]model.Flow, error) { return flows, nil }))
		}
		move(1)
		place("begins", 1, 2)
		move(2)
		place("moved", 2, 2, 1)
		if n := len(d.tenants[1].have.strict); n != 2 {
			t.Errorf("a former tenant takes plain text for a strict pod: it knows %d addresses", n)
		}
		check(t, d.SweepFlows(time.Hour))
		place("swept at once", 2, 2, 1)
		move(3)
		place("moved on", 3, 2, 1, 2)
		for f := range d.left {
			d.left[f] = time.Now().Add(-leftFor - time.Second)
		}
		check(t, d.SweepFlows(time.Hour))
		place("nothing is on its way", 3, 0, 1, 2)
		set(model.FormerLimit - formerLeast - time.Second)
		check(t, d.SweepFlows(time.Hour))
		place("without connections", 3, 0)

		move(1)
		flows = []model.Flow{{Pod: netip.MustParseAddrPort("10.0.0.1:80"), Peer: netip.MustParseAddrPort("1.2.3.4:5000")}}
		move(2)
		set(time.Minute)
		check(t, d.SweepFlows(time.Hour))
		place("with a connection", 2, 2, 1)
		check(t, d.DeleteTenant(1))
		if places, err := d.Placements(); err != nil || len(places["a"].Formers) > 0 {
			t.Errorf("of a tenant that is gone: %+v, %v", places["a"], err)
		}
		move(3)
		check(t, d.DeletePod("a"))
		for _, v := range []string{"4", "6"} {
			c, err := open(0)
			check(t, err)
			if all, err := formersIn(c, d.sets[setFormers+v]); err != nil || len(all) > 0 {
				t.Errorf("left: %v, %v", all, err)
			}
		}
	})
}

// A move writes nothing down where that could take the set beyond its size.
func TestMoveLeavesRoom(t *testing.T) {
	for _, c := range []struct {
		more, have int
		can        bool
	}{{0, maxFlows, true}, {1, mostWritten, false}, {1, mostWritten - 1, true}, {mostWritten, 0, true}, {mostWritten + 1, 0, false}} {
		if err := canWrite(c.more, c.have); (err == nil) != c.can {
			t.Errorf("%d flows beside %d: %v", c.more, c.have, err)
		}
	}
}

// Connections that stay are written down, counted, and forgotten with their pod or
// tenant.
func TestHeldFlows(t *testing.T) {
	inNode(t, func(t *testing.T) {
		d, err := Open(Options{})
		check(t, err)
		check(t, errors.Join(d.UpdateTenant(tenant(t, 1)), d.UpdateTenant(tenant(t, 2))))
		a := pod(t, "a", 1, "10.0.0.1", "fd00::1")
		at := netip.MustParseAddrPort
		reads := map[uint16]int{}
		flows := func(from uint16) ([]model.Flow, error) {
			reads[from]++
			return []model.Flow{{Pod: at("10.0.0.1:80"), Peer: at("1.2.3.4:5000")}, {Pod: at("[fd00::1]:80"), Peer: at("[fd01::1]:5000")}, {Pod: at("[::ffff:10.0.0.1]:80"), Peer: at("[::ffff:1.2.3.4]:5000")}}, nil
		}
		refuse := errors.New("no")
		if err := d.MovePod(a, func(uint16) ([]model.Flow, error) { return nil, refuse }); !errors.Is(err, refuse) {
			t.Errorf("a pod whose connections can't be read moved: %v", err)
		}
		want(t, d, nil, []uint16{1, 2})
		held := func(tenant uint16, n int) {
			t.Helper()
			got, err := d.HeldFlows()
			check(t, err)
			if got["a"][tenant] != n {
				t.Errorf("held: %v, want %d of tenant %d", got, n, tenant)
			}
		}
		check(t, d.MovePod(a, flows))
		held(0, 2)
		if reads[0] != 2 {
			t.Errorf("connections of a pod that joins were read %d times", reads[0])
		}
		// To another tenant: what it had in the clear stays there, what it has now stays
		// with the first.
		a.Tenant = 2
		check(t, d.MovePod(a, func(from uint16) ([]model.Flow, error) {
			return []model.Flow{{Pod: at("10.0.0.1:81"), Peer: at("1.2.3.4:5001")}}, nil
		}))
		held(0, 2)
		held(1, 1)
		check(t, d.ReleasePod("a", func(from uint16) ([]model.Flow, error) {
			return []model.Flow{{Pod: at("10.0.0.1:82"), Peer: at("1.2.3.4:5002")}}, nil
		}))
		held(2, 1)
		check(t, d.DeleteTenant(1))
		held(1, 0)
		held(2, 1)
		check(t, d.DeletePod("a"))
		all, err := d.flows(false)
		if err != nil || len(all) > 0 {
			t.Errorf("%v are left, %v", all, err)
		}
	})
}

func TestBadInput(t *testing.T) {
	for _, mark := range []uint32{1, 2, 3, 0x3000} {
		if _, err := Open(Options{Mark: mark}); err == nil || !strings.Contains(err.Error(), "bit") {
			t.Errorf("mark %#x: %v", mark, err)
		}
	}
	d := &Datapath{}
	good := steer.Pod{UID: "a", Tenant: 1, Ifindex: 1, IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, MAC: []byte{0, 1, 2, 3, 4, 5}}
	for name, change := range map[string]func(*steer.Pod){
		"UID": func(p *steer.Pod) { p.UID = "" }, "tenant": func(p *steer.Pod) { p.Tenant = steer.MaxTenantIndex + 1 }, "veth": func(p *steer.Pod) { p.Ifindex = 0 },
		"address": func(p *steer.Pod) { p.IPs = nil }, "MAC": func(p *steer.Pod) { p.MAC = nil }, "zone": func(p *steer.Pod) { p.IPs = []netip.Addr{netip.MustParseAddr("fe80::1%x")} },
	} {
		p := good
		change(&p)
		if err := d.UpdatePod(p); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := d.SetWeight(1, 101); err == nil {
		t.Error("a weight of 101 was taken")
	}
	if err := d.SetListeners(1, 2, 1); err == nil {
		t.Error("a third generation was taken")
	}
}
