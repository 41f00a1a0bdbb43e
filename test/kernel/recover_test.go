package kernel

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/bpf"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/test/nodestate"
)

var recoveries = flag.Int("recoveries", 2, "how often each bound is driven into shedding and back; make soak does it more often")

// overload is one bound of team-b, and a load beyond it.
type overload struct {
	name   string
	limits v1alpha1.Limits
	// shed counts what was dropped beyond the bound; "" is for one that queues.
	shed string
	// exceed drives the tenant beyond the bound, and returns once the load has ended.
	exceed func()
	// serves says what of a load within the bound isn't served.
	serves func() error
}

// Each bound holds back what is new of the tenant's own, lets go of it by itself when the
// load falls, however often, and keeps nothing of what it held back.
func TestLimitsRecover(t *testing.T) { eachRedirection(t, testLimitsRecover) }

func testLimitsRecover(t *testing.T, l *lab.Lab) {
	n := l.Node1
	proxy, pid := n.Proxy("team-b"), n.Running("team-b").PID
	for _, o := range overloads(t, l) {
		began, before := mustOpen(t, l.B1, l.Outside, 4), map[string]int{}
		lines := bufio.NewReader(began)
		limit(t, n, "team-b", o.limits)
		for round := range *recoveries + 1 {
			was := n.Tenant("team-b").Drops[o.shed]
			o.exceed()
			lab.Eventually(t, fmt.Sprintf("%s, round %d: what is dropped as %s", o.name, round, o.shed), func() error {
				if o.shed != "" && n.Tenant("team-b").Drops[o.shed] == was {
					return errors.New("there is nothing")
				}
				return nil
			})
			// Neither another tenant nor what has begun has to do with it.
			c, err := open(t, l.A1, l.Outside, 4, lab.Patience)
			if err != nil {
				t.Fatalf("%s, round %d: a neighbour's connection: %v", o.name, round, err)
			}
			c.Close()
			lab.Check(t, began.SetDeadline(time.Now().Add(lab.Patience)))
			line := fmt.Sprintf("%s %d\n", o.name, round)
			if _, err := began.Write([]byte(line)); err != nil {
				t.Fatalf("%s, round %d: a connection from before: %v", o.name, round, err)
			}
			if got, err := lines.ReadString('\n'); got != line {
				t.Fatalf("%s, round %d: a connection from before: %q, %v", o.name, round, got, err)
			}
			lab.Eventually(t, fmt.Sprintf("%s, round %d: a load within the bound", o.name, round), o.serves)
			// The first time makes what stays.
			if round == 0 {
				lab.Eventually(t, "the end of the load", func() error {
					var err error
					before, err = remains(t, l, proxy)
					// Two sockets of the one that the test keeps: from the pod, and to the server.
					if open := before["connections"]; err != nil || open > 2 {
						return fmt.Errorf("%d connections are open, %v", open, err)
					}
					return nil
				})
				continue
			}
			lab.Eventually(t, fmt.Sprintf("%s, round %d: as much as after the first one", o.name, round), func() error {
				now, err := remains(t, l, proxy)
				for what, have := range now {
					if have > before[what] {
						return fmt.Errorf("%d %s, there were %d", have, what, before[what])
					}
				}
				return err
			})
		}
		lab.Check(t, began.Close())
		limit(t, n, "team-b", v1alpha1.Limits{MemoryMax: 1 << 30})
		t.Logf("%s: %d times", o.name, *recoveries+1)
	}
	if g := n.Running("team-b"); g.PID != pid || g.Restarts > 0 {
		t.Errorf("the proxy is %+v, its pid was %d", g, pid)
	}
}

func overloads(t *testing.T, l *lab.Lab) []overload {
	t.Helper()
	const most, rate, bandwidth, port = 8, 20, 1 << 20, 9977
	const streamed = bandwidth / 2
	n := l.Node1
	sink(t, l.Outside, port)
	sink(t, l.B1, port)
	// fill sends more than passes in a moment, and says how long that took.
	fill := func(from, to *lab.Host) {
		t.Helper()
		begun := time.Now()
		s := stream(t, from, to.Of(4), port)
		defer s.stop()
		lab.Eventually(t, "the stream", func() error {
			if got := s.received(); got < streamed {
				return fmt.Errorf("%d bytes have arrived", got)
			}
			return nil
		})
		if took := time.Since(begun); took < time.Second/4 {
			t.Errorf("%d bytes from %s to %s took %s at %d a second", streamed, from.Name, to.Name, took, bandwidth)
		}
	}
	// several are that many connections after another, none of which is dropped.
	several := func(connections int, shed string) func() error {
		return func() error {
			was := n.Tenant("team-b").Drops[shed]
			for range connections {
				c, err := open(t, l.B1, l.Outside, 4, time.Second)
				if err != nil {
					return err
				}
				c.Close()
			}
			if dropped := n.Tenant("team-b").Drops[shed] - was; dropped > 0 {
				return fmt.Errorf("%d were dropped", dropped)
			}
			return nil
		}
	}
	all := []overload{
		{"concurrent", v1alpha1.Limits{MemoryMax: 1 << 30, Connections: most}, "tooMany", func() {
			var held []net.Conn
			for range most - 1 { // one has begun before
				held = append(held, mustOpen(t, l.B1, l.Outside, 4))
			}
			if c, err := open(t, l.B1, l.Outside, 4, 100*time.Millisecond); err == nil {
				t.Errorf("one connection more than %d", most)
				c.Close()
			}
			for _, c := range held {
				lab.Check(t, c.Close())
			}
		}, func() error {
			var held []net.Conn
			defer func() {
				for _, c := range held {
					c.Close()
				}
			}()
			for range most - 1 {
				c, err := open(t, l.B1, l.Outside, 4, time.Second)
				if err != nil {
					return fmt.Errorf("after %d: %w", len(held), err)
				}
				held = append(held, c)
			}
			return nil
		}},
		{"newPerSecond", v1alpha1.Limits{MemoryMax: 1 << 30, NewConnections: rate}, "tooFast", func() {
			was := n.Tenant("team-b").Drops["tooFast"]
			lab.Eventually(t, "connections that are too fast", func() error {
				for range 3 * rate {
					if c, err := open(t, l.B1, l.Outside, 4, 10*time.Millisecond); err == nil {
						c.Close()
					}
				}
				if n.Tenant("team-b").Drops["tooFast"] == was {
					return errors.New("none was dropped")
				}
				return nil
			})
		}, several(rate/2, "tooFast")},
		{"egress", v1alpha1.Limits{MemoryMax: 1 << 30, Egress: bandwidth}, "", func() { fill(l.B1, l.Outside) }, several(1, "")},
		{"ingress", v1alpha1.Limits{MemoryMax: 1 << 30, Ingress: bandwidth}, "", func() { fill(l.Outside, l.B1) }, several(1, "")},
	}
	// Without who listens there, an error comes back for each.
	var server net.PacketConn
	l.Outside.Do(t, func() {
		var err error
		server, err = net.ListenPacket("udp4", lab.At(l.Outside.V4, port).String())
		lab.Check(t, err)
	})
	t.Cleanup(func() { server.Close() })
	datagrams := func(flows int) {
		t.Helper()
		l.B1.Do(t, func() {
			for range flows {
				c, err := net.Dial("udp4", lab.At(l.Outside.V4, port).String())
				lab.Check(t, err)
				_, err = c.Write([]byte("x"))
				lab.Check(t, err)
				lab.Check(t, c.Close())
			}
		})
	}
	arrived := func() (n int) {
		for b := make([]byte, 1); ; n++ {
			lab.Check(t, server.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
			if _, _, err := server.ReadFrom(b); err != nil {
				return n
			}
		}
	}
	return append(all, overload{"newDirectPerSecond", v1alpha1.Limits{MemoryMax: 1 << 30, NewDirect: rate}, "directTooFast", func() {
		datagrams(3 * rate)
		arrived()
	}, func() error {
		// One by one: what is repeated at once would be a load beyond the bound.
		pace := time.NewTicker(2 * time.Second / rate)
		defer pace.Stop()
		for i := range rate / 4 {
			<-pace.C
			datagrams(1)
			if got := arrived(); got != 1 {
				return fmt.Errorf("%d of flow %d arrive", got, i)
			}
		}
		return nil
	}})
}

// remains counts what a node, the agent and the proxy of team-b keep. It fails where
// something goes while it is read.
func remains(t *testing.T, l *lab.Lab, proxy *lab.Namespace) (map[string]int, error) {
	t.Helper()
	n := l.Node1
	counts := map[string]int{}
	for name, pid := range map[string]int{"files of the proxy": n.Running("team-b").PID, "files of the agent": n.AgentPID()} {
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return counts, err
		}
		counts[name] = len(files)
	}
	entries, err := nodestate.MapEntries(filepath.Join(n.PinDir(), "maps"))
	if err != nil {
		return counts, err
	}
	for name, count := range entries {
		counts["entries of map "+name] = count
	}
	for where, namespace := range map[string]*lab.Namespace{"the node": n.Namespace, "the proxy": proxy} {
		namespace.Do(t, func() {
			c := &nftables.Conn{}
			var tables []*nftables.Table
			tables, err = c.ListTables()
			for _, table := range tables {
				if !strings.HasPrefix(table.Name, "bulkhead") {
					continue
				}
				sets, listErr := c.GetSets(table)
				err = errors.Join(err, listErr)
				for _, set := range sets {
					// Flows beside the proxy go by themselves, when they have been silent for long.
					if slices.ContainsFunc([]string{"begun_", "heard_", "answered_"}, func(of string) bool { return strings.HasPrefix(set.Name, of) }) {
						continue
					}
					elements, listErr := c.GetSetElements(set)
					err = errors.Join(err, listErr)
					counts["elements of set "+set.Name+" of "+where] += len(elements)
				}
			}
		})
		if err != nil {
			return counts, err
		}
	}
	flows, err := bpf.EstablishedFlows(proxy.Path, l.B1.V4, l.B1.V6)
	for _, f := range flows {
		if !f.IsTunnel() {
			counts["connections"]++
		}
	}
	return counts, err
}
