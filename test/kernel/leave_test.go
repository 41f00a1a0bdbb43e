package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// A tenant whose pods another one has by now leaves the node, whatever became of its
// proxy before: it was killed, also for its memory, and its pods keep their ends of what
// they had through it, or it refused what it was told.
func TestTenantLeavesAfterFaults(t *testing.T) {
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		t.Run(string(r), func(t *testing.T) { testTenantLeavesAfterFaults(t, r) })
	}
}

func testTenantLeavesAfterFaults(t *testing.T, r v1alpha1.Redirection) {
	var spoils atomic.Bool
	var refused atomic.Int64
	l := lab.NewWith(t, lab.Options{Redirection: r,
		Rewrite: func(node string, _ model.Tenant, r *discoveryv3.Resource) {
			if !spoils.Load() || node != "node1" {
				return
			}
			if err := lab.SpoilEndpoints(r); err != nil {
				t.Error(err)
			}
		},
		OnReject: func(r xds.Rejection) {
			if !strings.Contains(r.Message, lab.NoAddress) {
				t.Errorf("Envoy refused %+v", r)
			}
			refused.Add(1)
		},
	})
	n := l.Node1
	namespaces := func(p *lab.Host) model.Tenant { return model.NamespaceTenant(p.Identity.Namespace) }
	first := func(processes int) (g agent.InspectedGeneration) {
		t.Helper()
		lab.Eventually(t, "the processes of team-b", func() error {
			b := n.Tenant("team-b")
			if len(b.Generations) != processes || !b.Ready {
				return fmt.Errorf("%s %+v", b.Reason, b.Generations)
			}
			for _, each := range b.Generations {
				if !each.Serving {
					return fmt.Errorf("%+v", each)
				}
				if each.Role == "First" {
					g = each
				}
			}
			return nil
		})
		return g
	}
	// hoard opens connections while a condition holds, and keeps also those that aren't
	// answered within a time. Whoever closes them resets them: of the greeting all but a byte
	// is unread.
	hoard := func(to lab.Pair, within time.Duration, while func(have int) bool) (all []net.Conn, unanswered int) {
		t.Helper()
		l.B1.Do(t, func() {
			for begun := time.Now(); while(len(all)); {
				if time.Since(begun) > lab.Patience {
					t.Fatalf("there are %d connections, of which %d aren't answered", len(all), unanswered)
				}
				c, err := net.DialTimeout("tcp", lab.At(to.V4, app.GreetPort).String(), within)
				if err != nil {
					continue
				}
				all = append(all, c)
				lab.Check(t, c.SetDeadline(time.Now().Add(within)))
				if _, err := c.Read(make([]byte, 1)); err != nil {
					unanswered++
				}
			}
		})
		return all, unanswered
	}
	outOfMemory := func(processes int, bound int64) {
		t.Helper()
		pid := first(processes).PID
		limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: bound})
		// At 20 KB each. A proxy that is near its bound answers late: that isn't the end.
		all, _ := hoard(l.B2.Pair, time.Second, func(int) bool { return unix.Kill(pid, 0) == nil })
		for _, c := range all {
			c.Close()
		}
		lab.Eventually(t, "the kill", func() error {
			b := n.Tenant("team-b")
			if !slices.ContainsFunc(b.Generations, func(g agent.InspectedGeneration) bool { return strings.HasSuffix(g.LastExit, "out of memory") }) {
				return fmt.Errorf("after %d connections: %+v", len(all), b.Generations)
			}
			return nil
		})
		limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
		first(processes)
	}
	for _, fault := range []struct {
		name    string
		standby bool
		happen  func()
	}{
		{"killed, and the pod doesn't close", false, func() {
			all, unanswered := hoard(l.B2.Pair, lab.Patience, func(have int) bool { return have < 20 })
			if unanswered > 0 {
				t.Fatalf("%d of %d connections aren't answered", unanswered, len(all))
			}
			t.Cleanup(func() {
				for _, c := range all {
					c.Close()
				}
			})
			lab.Check(t, unix.Kill(first(1).PID, unix.SIGKILL))
		}},
		{"out of memory", false, func() { outOfMemory(1, 72<<20) }},
		{"out of memory with a standby", true, func() { outOfMemory(2, 96<<20) }},
		{"refused", false, func() {
			all, unanswered := hoard(l.B2.VIP, lab.Patience, func(have int) bool { return have < 8 })
			if unanswered > 0 {
				t.Fatalf("%d of %d connections aren't answered", unanswered, len(all))
			}
			for range 8 { // that end by a FIN
				all = append(all, mustOpen(t, l.B1, &lab.Host{Name: "a service of b2", Pair: l.B2.VIP}, 4))
			}
			endpoint := func(ip netip.Addr) model.Endpoint {
				return model.Endpoint{Addr: lab.At(ip, app.GreetPort), Identity: l.B2.Identity}
			}
			tell := func(endpoints ...model.Endpoint) {
				t.Helper()
				lab.Check(t, l.Store.SetService(model.Service{Namespace: "team-b", Name: l.B2.Name, VIPs: l.B2.VIP.Both(),
					Ports: []model.ServicePort{{Port: app.GreetPort, Endpoints: endpoints}}}))
			}
			was := refused.Load()
			spoils.Store(true)
			draining := model.Endpoint{Addr: lab.At(l.A3.V4, app.GreetPort), Identity: l.A3.Identity, Draining: true}
			tell(endpoint(l.B2.V4), draining)
			lab.Eventually(t, "the refusal", func() error {
				if refused.Load() == was {
					return errors.New("there is none")
				}
				return nil
			})
			flow{from: l.B1, to: l.B2, dial: l.B2.VIP}.check(t, 4)
			spoils.Store(false)
			tell(endpoint(l.B2.V4))
			flow{from: l.B1, to: l.B2, dial: l.B2.VIP}.check(t, 4)
			for _, c := range all {
				lab.Check(t, c.Close())
			}
		}},
	} {
		t.Log(fault.name)
		n.Standby = fault.standby
		l.SetTenants(namespaces)
		fault.happen()
		n.Standby = false
		l.SetTenants(func(*lab.Host) model.Tenant { return model.Tenant{Scope: model.ScopeNode} })
		flow{from: l.B1, to: l.B2}.check(t, 4)
	}
}

// Whoever asks why a tenant is still there that no pod needs is told what keeps it.
func TestWhatKeepsTenant(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	var folder string
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		if found, _ := filepath.Glob(filepath.Join(pattern, n.Isolation().CgroupName, "team-b")); len(found) > 0 {
			folder = found[0]
		}
	}
	other := filepath.Join(folder, "other")
	lab.Check(t, os.Mkdir(other, 0o755)) // somebody else's, in which nothing runs
	t.Cleanup(func() { os.Remove(other) })
	for _, p := range l.Pods {
		p.Tenant = model.Tenant{Scope: model.ScopeNode}
	}
	l.Publish()
	n.WritePlan()
	l.Node2.WritePlan()
	lab.Eventually(t, "what keeps the tenant", func() error {
		if b := n.Tenant("team-b"); !strings.Contains(b.Reason, "isn't removed") || !strings.Contains(b.Reason, folder) {
			return errors.New(b.Reason)
		}
		return nil
	})
	flow{from: l.B1, to: l.B2}.check(t, 4)
	lab.Check(t, os.Remove(other))
	lab.Eventually(t, "the tenant's end", func() error {
		i, err := n.Inspect()
		if err == nil && slices.ContainsFunc(i.Tenants, func(t agent.InspectedTenant) bool { return t.Name == "team-b" }) {
			err = errors.New("it is still there")
		}
		return err
	})
}
