package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

const (
	scanned = 100_000
	// scanProxy is what they may cost their tenant's proxy: 1,024 clusters of about
	// 40 KiB, and 1.3 KiB for each name, which Envoy never forgets.
	scanProxy = 256 << 20
	// scanOthers is what they may cost the agent and the operator each, and scanNames
	// the names that the operator may hold for them: 1,024 clusters, and the endpoints
	// of those that are services'.
	scanOthers = 32 << 20
	scanNames  = 2 * 1100
)

// scanner dials addresses without waiting, as a port scanner does.
type scanner struct{ open []int }

// dial begins a connection. At most 512 are open: before one more, the oldest's end
// is waited for.
func (s *scanner) dial(to netip.AddrPort) error {
	if len(s.open) == 512 {
		if err := s.wait(); err != nil {
			return err
		}
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	s.open = append(s.open, fd)
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}); err != unix.EINPROGRESS {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	return nil
}

// wait waits until the proxy has closed the oldest connection.
func (s *scanner) wait() error {
	fd := s.open[0]
	s.open = s.open[1:]
	defer unix.Close(fd)
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, int(lab.Patience.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if n == 0 {
			return fmt.Errorf("a connection to an address that nobody has stays open for %s", lab.Patience)
		}
		return err
	}
}

// everywhere are addresses of pods and services, of which nobody has any.
func everywhere(i int) netip.AddrPort {
	a := netip.MustParseAddr([]string{"fd77:1234:5678:9abc:def1:2345::", "fd96:1234:5678:9abc:def1:2345::"}[i%2]).As16()
	a[12], a[13], a[14], a[15] = 0x12, byte(i>>16)|0x80, byte(i>>8), byte(i)
	return netip.AddrPortFrom(netip.AddrFrom16(a), 60000)
}

// operatorMemory is what the server of configuration has on its heap, among the
// rest of this process.
func operatorMemory() int64 {
	runtime.GC()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

func residentMemory(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	lab.Check(t, err)
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kb int64
	_, err = fmt.Sscan(rest, &kb)
	lab.Check(t, err)
	return kb << 10
}

// names are those that all proxies hold at the operator.
func names(t *testing.T, n *lab.Node) (sum float64) {
	t.Helper()
	r := prometheus.NewRegistry()
	for _, c := range n.Configuration().Collectors() {
		lab.Check(t, r.Register(c))
	}
	families, err := r.Gather()
	lab.Check(t, err)
	for _, f := range families {
		if f.GetName() == "bulkhead_xds_names" {
			for _, m := range f.Metric {
				sum += m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// A pod that dials 100,000 addresses which nobody has costs its own tenant's proxy,
// the agent and the operator what is bounded, and the node's other tenant doesn't
// notice. What the proxy asked for in vain doesn't keep it from coming back to a new
// agent.
func TestPodDialsEverything(t *testing.T) {
	l := lab.NewWith(t, lab.Options{NoAccessLog: true})
	n := l.Node1
	quiet := flow{from: l.B1, to: l.B2}
	quiet.check(t, 6)
	proxy, agent, operator, held := n.Memory(t, "team-a"), residentMemory(t, n.AgentPID()), operatorMemory(), names(t, n)

	// The other tenant's configuration goes on to change, and its connections to begin.
	type change struct{ took, call time.Duration }
	stop, changes := make(chan struct{}), make(chan []change)
	go func() {
		var all []change
		defer func() { changes <- all }()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
			}
			c, err := changeTenant(t, l, l.B1, i)
			if err != nil {
				t.Errorf("change %d of the other tenant: %v", i, err)
				return
			}
			began := time.Now()
			if r := l.B1.Call(t, "tcp", "--timeout", "20s", lab.At(l.B2.V4, app.GreetPort).String()); !r.OK {
				t.Errorf("a connection of the other tenant: %+v", r.Failure)
			}
			all = append(all, change{c, time.Since(began)})
		}
	}()
	began := time.Now()
	l.A1.Do(t, func() {
		s := &scanner{}
		defer func() {
			for _, fd := range s.open {
				unix.Close(fd)
			}
		}()
		for i := range scanned {
			lab.Check(t, s.dial(everywhere(i)))
		}
		for len(s.open) > 0 {
			lab.Check(t, s.wait())
		}
	})
	took := time.Since(began)
	close(stop)
	all := <-changes
	// A machine that stands still for a second has a few of them be late, whoever is on it.
	slow := func(of func(change) time.Duration) time.Duration {
		var each []time.Duration
		for _, c := range all {
			each = append(each, of(c))
		}
		slices.Sort(each)
		return slices.Concat([]time.Duration{0}, each)[len(each)*9/10]
	}
	took9, call9 := slow(func(c change) time.Duration { return c.took }), slow(func(c change) time.Duration { return c.call })
	costs := fmt.Sprintf("%d addresses in %s: the proxy has %.1f MiB more, the agent %.1f, the operator %.1f, %.0f names; of ten of %d changes of the other tenant nine took up to %s, a connection and its process %s",
		scanned, took.Round(time.Millisecond), mib(n.Memory(t, "team-a")-proxy), mib(residentMemory(t, n.AgentPID())-agent), mib(operatorMemory()-operator), names(t, n)-held, len(all), took9, call9)
	t.Log(costs)
	if n.Memory(t, "team-a")-proxy > scanProxy || residentMemory(t, n.AgentPID())-agent > scanOthers || operatorMemory()-operator > scanOthers || names(t, n)-held > scanNames {
		t.Error("that is too much")
	}
	if len(all) < 10 || took9 > time.Second || call9 > 2*time.Second {
		t.Error("the other tenant noticed")
	}
	for _, tenant := range []string{"team-a", "team-b"} {
		if g := n.Running(tenant); g.Restarts > 0 {
			t.Errorf("the proxy of %s was started again: %+v", tenant, g)
		}
	}

	// A new agent: the proxy asks for all of it at once.
	n.Kill()
	n.Start()
	n.WaitReady()
	for _, h := range []*lab.Host{l.A2, l.B1} {
		if _, err := changeTenant(t, l, h, 0); err != nil {
			t.Errorf("with a new agent: %v", err)
		}
	}
	late := model.Service{Namespace: "team-b", Name: "late", VIPs: []netip.Addr{netip.MustParseAddr("10.96.200.1")},
		Ports: []model.ServicePort{{Port: app.GreetPort, Endpoints: []model.Endpoint{{Addr: lab.At(l.B2.V4, app.GreetPort), Identity: l.B2.Identity}}}}}
	lab.Check(t, l.Store.SetService(late))
	if r := l.A2.Call(t, "tcp", "--timeout", "10s", lab.At(late.VIPs[0], app.GreetPort).String()); !r.OK {
		t.Errorf("a service that is new, from a pod of the tenant: %+v", r.Failure)
	}
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// changeTenant adds a pod to the proxy of h's tenant on its node, or replaces it, and
// returns how long the proxy took to acknowledge it.
func changeTenant(t *testing.T, l *lab.Lab, h *lab.Host, i int) (time.Duration, error) {
	t.Helper()
	p := model.Proxy{Node: h.Node.Name, Tenant: h.Tenant}
	for _, pod := range h.Node.Pods {
		if pod.Tenant == h.Tenant {
			p.Workloads = append(p.Workloads, model.Workload{UID: pod.Name, Namespace: pod.Identity.Namespace, Name: pod.Name, Node: h.Node.Name, Identity: pod.Identity, Tenant: pod.Tenant, IPs: pod.Both()})
		}
	}
	ghost := slices.Clone(p.Workloads)[0]
	ghost.UID, ghost.Name, ghost.IPs = fmt.Sprint("ghost-", i), "ghost", []netip.Addr{netip.AddrFrom4([4]byte{10, 77, byte(100 + i>>8), byte(i)})}
	p.Workloads = append(p.Workloads, ghost)
	began := time.Now()
	if err := l.Store.SetProxy(p); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(t.Context(), lab.Patience)
	defer cancel()
	err := h.Node.Configuration().WaitServed(ctx, p.Key(), ghost.UID)
	return time.Since(began), err
}
