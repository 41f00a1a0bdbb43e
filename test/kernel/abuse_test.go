package kernel

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// An agent has little to do with what tenants do, however much that is: their proxies'
// logs are flooded, they have thousands of connections and open others as fast as they
// go, and a proxy refuses its configuration without end.
func TestAgentIsBounded(t *testing.T) {
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionEBPF, v1alpha1.RedirectionNetfilter} {
		t.Run(string(r), func(t *testing.T) { testAgentIsBounded(t, r) })
	}
}

func testAgentIsBounded(t *testing.T, redirection v1alpha1.Redirection) {
	const (
		services, held = 100, 3000
		once           = lab.Patience / 6 // for one try of several
		// It goes on for so long, and until so many connections were opened and so much
		// configuration refused.
		least, much = 10 * time.Second, 500
		// mostCPU is of one CPU; mostMemory is below what the agent's container has.
		mostCPU, mostMemory = 0.75, 256 << 20
	)
	var spoiled atomic.Bool
	l := lab.NewWith(t, lab.Options{
		Redirection: redirection,
		Rewrite: func(node string, tenant model.Tenant, r *discoveryv3.Resource) {
			if spoiled.Load() && node == "node1" && tenant.String() == "team-b" {
				if err := lab.SpoilEndpoints(r); err != nil {
					t.Error(err)
				}
			}
		},
		OnReject: func(xds.Rejection) {},
	})
	n := l.Node1
	service := func(i, version int) (s model.Service) {
		vip := lab.Addresses(fmt.Sprintf("10.96.7.%d", i), fmt.Sprintf("fd96::7:%d", i))
		s = model.Service{Namespace: "team-b", Name: fmt.Sprint("changing-", i), VIPs: vip.Both(), Ports: []model.ServicePort{{Port: app.GreetPort}}}
		for _, h := range []*lab.Host{l.B2, l.B1}[:1+version%2] {
			s.Ports[0].Endpoints = append(s.Ports[0].Endpoints, model.Endpoint{Addr: lab.At(h.V4, app.GreetPort), Identity: h.Identity})
		}
		return s
	}
	for i := range services {
		s := service(i, 0)
		lab.Check(t, l.Store.SetService(s))
		lab.Eventually(t, "service "+s.Name, func() (err error) {
			l.B1.Do(t, func() {
				var c net.Conn
				if c, err = net.DialTimeout("tcp", lab.At(s.VIPs[0], app.GreetPort).String(), once); err == nil {
					lab.Check(t, c.SetDeadline(time.Now().Add(once)))
					_, err = c.Read(make([]byte, 1))
					c.Close()
				}
			})
			return err
		})
	}
	agent := n.AgentPID()
	quiet := residentMemory(t, agent)

	ctx, cancel := context.WithTimeout(t.Context(), lab.Patience)
	defer cancel()
	_, err := n.CLI(ctx, "debug", "loglevel", "--tenant", "team-a", "--level", "trace")
	lab.Check(t, err)
	hold := l.A2.BeginUntil(t, "hold", fmt.Sprint("--connections=", held), "--interval=5s", "--timeout=30s", lab.At(l.A3.V4, app.GreetPort).String())
	waitConnections(t, n, "team-a", held)
	spoiled.Store(true)
	since := time.Now()
	stop, changed := make(chan struct{}), make(chan error, 1)
	go func() {
		tick := time.NewTicker(time.Second / 20)
		defer tick.Stop()
		for version := 1; ; version++ {
			select {
			case <-stop:
				changed <- nil
				return
			case <-tick.C:
			}
			for i := range services {
				if err := l.Store.SetService(service(i, version)); err != nil {
					changed <- err
					return
				}
			}
		}
	}()
	calm := sync.OnceFunc(func() {
		close(stop)
		if err := <-changed; err != nil {
			t.Errorf("change services: %v", err)
		}
	})
	defer calm() // whatever ends the test
	before := n.Tenant("team-a").Steered[0]
	open := l.A1.BeginUntil(t, "load", "--protocol=http", "--connections=32", "--new-connection-ratio=1", lab.At(l.A3.V4, app.HTTPPort).String())
	begun := time.Now() // before and after what is used in it
	used := n.AgentTime(t)
	turned := filepath.Join(n.Dir, "lib", "log", "team-a", "envoy0.log.1")
	lab.Eventually(t, "much of all", func() error {
		// Seldom, for asking is work for the agent, too.
		time.Sleep(least / 10)
		log, err := os.Stat(turned)
		refused, _ := rejected(t, n)
		if took, opened := time.Since(begun), n.Tenant("team-a").Steered[0]-before; took < least || opened < much || refused < much || err != nil || log.Size() < 1<<20 {
			return fmt.Errorf("in %s %d connections were opened, configuration was refused %d times, and the log was turned: %v", took, opened, refused, err)
		}
		return nil
	})
	used = n.AgentTime(t) - used
	took := time.Since(begun)
	memory := residentMemory(t, agent)
	var opened, kept app.RunResult
	open(&opened)
	calm()
	hold(&kept)
	refused, lines := rejected(t, n)
	t.Logf("in %s the agent used %s of CPU, and of memory it has %.1f MiB, had %.1f; %d connections were opened, configuration was refused %d times, %d connections are held",
		took, used, mib(memory), mib(quiet), opened.Connections, refused, kept.Held)
	if part := used.Seconds() / took.Seconds(); part > mostCPU || memory > mostMemory || n.AgentPID() != agent {
		t.Errorf("the agent used %.2f of a CPU, and has %.1f MiB", part, mib(memory))
	}
	// One proxy's are 50 at once, and one a second.
	if most := 51 + int(time.Since(since).Seconds()); lines > most {
		t.Errorf("the agent has %d lines about what a proxy refused, at most %d", lines, most)
	}
	if kept.Held != held {
		t.Errorf("%d of %d connections are held: %+v", kept.Held, held, kept.Failures)
	}
}

// rejected is how often proxies have refused configuration by the agent's log, which has
// a line now and then and how many it has left out, and how many lines those are.
func rejected(t *testing.T, n *lab.Node) (times, lines int) {
	t.Helper()
	for line := range strings.Lines(n.AgentLog(t)) {
		var l struct {
			Msg          string
			LinesLeftOut int
		}
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "proxy rejected configuration" {
			times += 1 + l.LinesLeftOut
			lines++
		}
	}
	return times, lines
}
