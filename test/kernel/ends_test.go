package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A tenant without pods doesn't end while something is in its tunnels that isn't a
// connection of a pod yet: here its proxy is so slow, as on a busy machine, that its time
// is over before it reads what comes through tunnels that it had from before.
func TestTenantEndsAtRest(t *testing.T) { eachRedirection(t, testTenantEndsAtRest) }

func testTenantEndsAtRest(t *testing.T, l *lab.Lab) {
	const rounds, connections = 6, 8
	n := l.Node1
	n.Args = append(n.Args, "--linger", "3s") // long enough to stop its proxy within it
	n.Kill()
	n.Start()
	n.WaitReady()
	// greetings begins connections at once, each of which is greeted by the pod; wait tells
	// how many weren't.
	greetings := func() (wait func() (failed []error)) {
		results := make(chan error, 2*connections)
		for i := range 2 * connections {
			to := lab.At(l.A1.Of([]int{4, 6}[i%2]), app.GreetPort).String()
			l.B2.Go(func() {
				c, err := net.DialTimeout("tcp", to, lab.Patience)
				if err != nil {
					results <- err
					return
				}
				t.Cleanup(func() { c.Close() })
				go func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(lab.Patience))
					_, err := bufio.NewReader(c).ReadString('\n')
					results <- err
				}()
			})
		}
		return func() (failed []error) {
			for range 2 * connections {
				if err := <-results; err != nil {
					failed = append(failed, err)
				}
			}
			return failed
		}
	}
	tenant := func(name string) (agent.InspectedTenant, bool, error) {
		i, err := n.Inspect()
		k := slices.IndexFunc(i.Tenants, func(t agent.InspectedTenant) bool { return t.Name == name })
		if err != nil || k < 0 {
			return agent.InspectedTenant{}, false, err
		}
		return i.Tenants[k], true, nil
	}
	for round, seen := 0, 0; seen < rounds; round++ {
		if round == 3*rounds {
			t.Fatalf("in %d of %d moves something came before the former tenant's time was over", seen, round)
		}
		if failed := greetings()(); len(failed) > 0 {
			t.Fatalf("before move %d: %v", round, failed)
		}
		former := l.A1.Tenant
		netns := n.Proxy(former.FileName()).Path
		proxy := n.Running(former.String())
		for _, p := range n.Pods {
			if p.Identity.Namespace != l.A1.Identity.Namespace {
				continue
			}
			p.Tenant = model.NamespaceTenant(p.Identity.Namespace)
			if round%2 == 0 {
				p.Tenant = model.Tenant{Scope: model.ScopeServiceAccount, Namespace: p.Identity.Namespace, Name: p.Identity.ServiceAccount}
			}
		}
		l.Publish()
		n.WritePlan()
		lab.Eventually(t, "the pods' leave", func() error {
			leaving, there, err := tenant(former.String())
			if err == nil && there && (len(leaving.Pods) > 0 || leaving.Reason == "" || strings.Contains(leaving.Reason, "wait there")) {
				err = fmt.Errorf("%d are there: %s", len(leaving.Pods), leaving.Reason)
			}
			return err
		})
		unix.Kill(proxy.PID, unix.SIGSTOP) // on a machine that stands still it may have ended
		wait := greetings()
		came := false
		lab.Eventually(t, "a connection that comes through a tunnel to the former tenant", func() error {
			untaken, err := bpf.Untaken(netns)
			if came = untaken > 0; came || err != nil {
				return err
			}
			if _, there, err := tenant(former.String()); err != nil || !there {
				return err // its time was over before
			}
			return errors.New("none is there")
		})
		// What comes just when the agent stops the proxy has it go on, whoever stopped it before.
		lab.Eventually(t, "the end of the former tenant's time", func() error {
			leaving, there, err := tenant(former.String())
			if err == nil && there && !strings.Contains(leaving.Reason, "came through its tunnels") && !strings.Contains(leaving.Reason, "connections that began there") {
				err = fmt.Errorf("it waits for something else: %s", leaving.Reason)
			}
			return err
		})
		unix.Kill(proxy.PID, unix.SIGCONT) // it may have ended
		failed := wait()
		if came {
			seen++
		}
		if came && len(failed) > 0 {
			t.Errorf("move %d: %d of %d connections failed: %v", round, len(failed), 2*connections, failed)
		}
		lab.Eventually(t, "the end of the former tenant", func() error {
			leaving, there, err := tenant(former.String())
			if err == nil && there {
				err = fmt.Errorf("it waits: %s", leaving.Reason)
			}
			return err
		})
	}
}
