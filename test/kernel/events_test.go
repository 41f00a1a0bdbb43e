package kernel

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// eventLog is what `agent events` has told.
type eventLog struct {
	mu    sync.Mutex
	lines []agent.ConnectionEvent
}

// watchEvents begins to watch the connections of node 1, until stop or the test's end.
// When it returns, it has seen one of b1 to outside.
func watchEvents(t *testing.T, l *lab.Lab) (log *eventLog, stop func()) {
	t.Helper()
	log = &eventLog{}
	// Not the test's own context, which ends before stop has heard that nothing else did.
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		o := agent.Options{RunDir: filepath.Join(l.Node1.Dir, "run")}
		for err := errors.New("another reader"); strings.Contains(err.Error(), "another reader"); {
			// Who watched before may not have ended yet.
			if err = agent.Control(ctx, o.ControlSocket(), http.MethodGet, "/events", url.Values{}, w); err == nil {
				err = io.EOF
			}
			if !strings.Contains(err.Error(), "another reader") {
				ended <- err
			}
		}
		w.Close()
	}()
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(r); lines.Scan(); {
			var e agent.ConnectionEvent
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				if ctx.Err() == nil { // else it is one that stop has cut
					t.Errorf("%s: %v", lines.Bytes(), err)
				}
				continue
			}
			log.mu.Lock()
			log.lines = append(log.lines, e)
			log.mu.Unlock()
		}
	}()
	stop = sync.OnceFunc(func() {
		select {
		case err := <-ended:
			t.Errorf("watching ended: %v", err)
		default:
		}
		cancel()
		r.Close()
		<-read
	})
	t.Cleanup(stop)
	lab.Eventually(t, "the first event", func() error {
		if r := l.B1.Call(t, "tcp", lab.At(l.Outside.V4, app.GreetPort).String()); !r.OK {
			return fmt.Errorf("%+v", r.Failure)
		}
		if !log.has(func(agent.ConnectionEvent) bool { return true }) {
			return errors.New("there is none")
		}
		return nil
	})
	return log, stop
}

// await waits for an event that fits.
func (l *eventLog) await(t *testing.T, what string, fits func(agent.ConnectionEvent) bool) (found agent.ConnectionEvent) {
	t.Helper()
	lab.Eventually(t, "event: "+what, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, e := range l.lines {
			if fits(e) {
				found = e
				return nil
			}
		}
		return fmt.Errorf("the last of %d: %+v", len(l.lines), l.lines[max(0, len(l.lines)-8):])
	})
	return found
}

// denied tries to connect until an event of it fits: of several denials at a time not each
// is told.
func denied(t *testing.T, log *eventLog, from *lab.Namespace, as netip.Addr, to netip.AddrPort, fits func(agent.ConnectionEvent) bool) {
	t.Helper()
	lab.Eventually(t, fmt.Sprintf("word of a denied connection from %s to %s", as, to), func() error {
		if err := connectAs(t, from, as, to); err == nil {
			t.Errorf("connected from %s to %s", as, to)
		}
		if !log.has(func(e agent.ConnectionEvent) bool { return e.Event == "denied" && fits(e) }) {
			log.mu.Lock()
			defer log.mu.Unlock()
			return fmt.Errorf("the last of %d: %+v", len(log.lines), log.lines[max(0, len(log.lines)-8):])
		}
		return nil
	})
}

func (l *eventLog) has(fits func(agent.ConnectionEvent) bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.lines {
		if fits(e) {
			return true
		}
	}
	return false
}

// Who watches is told of each connection when it opens, closes or is denied: whose it
// is, with whom, how it goes, and what it carried.
func TestEvents(t *testing.T) { eachRedirection(t, testEvents) }

func testEvents(t *testing.T, l *lab.Lab) {
	n := l.Node1
	const up, down = 100_000, 50_000
	// one is a connection as the events have it: podPort or peerPort is known.
	type one struct {
		way           string
		tenant        *lab.Host
		pod           *lab.Host
		podPort       uint16
		peer          netip.Addr
		peerPort      uint16
		peerUID       string
		sent, receive uint64
	}
	fits := func(o one, event string, family int) func(agent.ConnectionEvent) bool {
		return func(e agent.ConnectionEvent) bool {
			return e.Event == event && e.Way == o.way && e.Tenant == o.tenant.Tenant.String() && e.PodUID == o.pod.Name && e.Name == o.pod.Name &&
				e.Namespace == o.pod.Identity.Namespace && e.Pod.Addr() == o.pod.Of(family) && e.Peer.Addr() == o.peer && e.PeerUID == o.peerUID &&
				(o.podPort == 0 || e.Pod.Port() == o.podPort) && (o.peerPort == 0 || e.Peer.Port() == o.peerPort)
		}
	}
	carried := func(t *testing.T, log *eventLog, o one, family int) {
		t.Helper()
		log.await(t, o.way+" opened", fits(o, "opened", family))
		e := log.await(t, o.way+" closed", fits(o, "closed", family))
		// What the protocol says around it is short; SYN and FIN count.
		within := func(n, want uint64) bool { return n >= want && n <= want+4096 }
		if !within(e.BytesSent, o.sent) || !within(e.BytesReceived, o.receive) {
			t.Errorf("%s closed: %+v, want %d bytes sent and %d received", o.way, e, o.sent, o.receive)
		}
		if o.podPort != 0 && o.peerPort != 0 || e.Pod.Port() == 0 || e.Peer.Port() == 0 {
			t.Errorf("ports of %+v", e)
		}
	}
	call := func(t *testing.T, from *lab.Host, to netip.AddrPort) {
		t.Helper()
		if r := from.Call(t, "bulk", fmt.Sprint("--up=", up), fmt.Sprint("--down=", down), to.String()); !r.OK {
			t.Fatalf("%+v", r.Failure)
		}
	}
	eachFamily(t, func(t *testing.T, family int) {
		outside := l.Outside.Of(family)
		t.Run("to outside", func(t *testing.T) {
			log, stop := watchEvents(t, l)
			defer stop()
			call(t, l.A1, lab.At(outside, app.BulkPort))
			for _, way := range []string{"outbound", "upstream"} {
				carried(t, log, one{way: way, tenant: l.A1, pod: l.A1, peer: outside, peerPort: app.BulkPort, sent: up, receive: down}, family)
			}
		})
		t.Run("from outside", func(t *testing.T) {
			log, stop := watchEvents(t, l)
			defer stop()
			call(t, l.Outside, lab.At(l.A1.Of(family), app.BulkPort))
			for _, way := range []string{"inbound", "delivered"} {
				carried(t, log, one{way: way, tenant: l.A1, pod: l.A1, podPort: app.BulkPort, peer: outside, sent: down, receive: up}, family)
			}
		})
		t.Run("to another tenant's pod", func(t *testing.T) {
			log, stop := watchEvents(t, l)
			defer stop()
			call(t, l.A1, lab.At(l.B1.Of(family), app.BulkPort))
			b1, a1 := l.B1.Of(family), l.A1.Of(family)
			carried(t, log, one{way: "outbound", tenant: l.A1, pod: l.A1, peer: b1, peerPort: app.BulkPort, peerUID: "b1", sent: up, receive: down}, family)
			carried(t, log, one{way: "delivered", tenant: l.B1, pod: l.B1, podPort: app.BulkPort, peer: a1, peerUID: "a1", sent: down, receive: up}, family)
		})
		t.Run("denied", func(t *testing.T) {
			log, stop := watchEvents(t, l)
			defer stop()
			for _, c := range []struct {
				reason, way, uid string
				from             *lab.Namespace
			}{
				{"Spoofed", "outbound", "a1", l.A1.Namespace},
				{"Foreign", "upstream", "", n.Proxy("team-a")},
			} {
				as, to := l.B1.Of(family), lab.At(outside, app.GreetPort)
				denied(t, log, c.from, as, to, func(e agent.ConnectionEvent) bool {
					return e.Reason == c.reason && e.Way == c.way && e.Tenant == l.A1.Tenant.String() && e.PodUID == c.uid && e.Pod.Addr() == as && e.Pod.Port() != 0 && e.Peer == to
				})
			}
			// Refused at the pod's veth.
			tunnel := lab.At(outside, 15008)
			denied(t, log, l.A1.Namespace, l.A1.Of(family), tunnel, func(e agent.ConnectionEvent) bool {
				return e.Reason == "Unsteered" && e.Way == "outbound" && e.PodUID == "a1" && e.Pod.Addr() == l.A1.Of(family) && e.Peer == tunnel
			})
		})
	})
	t.Run("a tunnel", func(t *testing.T) {
		log, stop := watchEvents(t, l)
		defer stop()
		flow{from: l.A2, to: l.B2}.check(t, 4)
		log.await(t, "upstream", func(e agent.ConnectionEvent) bool {
			return e.Event == "opened" && e.Way == "upstream" && e.PodUID == "a2" && e.Peer == lab.At(l.B2.V4, 15008)
		})
		flow{from: l.B2, to: l.A2}.check(t, 4)
		log.await(t, "inbound", func(e agent.ConnectionEvent) bool {
			return e.Event == "opened" && e.Way == "inbound" && e.Pod == lab.At(l.A2.V4, 15008) && e.PodUID == "a2" && e.Peer.Addr() == l.B2.V4
		})
	})
	t.Run("opened before anybody watched", func(t *testing.T) {
		var c net.Conn
		l.A1.Do(t, func() {
			var err error
			c, err = net.Dial("tcp", lab.At(l.Outside.V4, app.GreetPort).String())
			lab.Check(t, err)
		})
		log, stop := watchEvents(t, l)
		defer stop()
		c.Close()
		port := c.LocalAddr().(*net.TCPAddr).AddrPort()
		e := log.await(t, "closed", func(e agent.ConnectionEvent) bool { return e.Event == "closed" && e.Pod == port })
		want := map[v1alpha1.Redirection]string{v1alpha1.RedirectionEBPF: "outbound", v1alpha1.RedirectionNetfilter: "unknown"}[n.Redirection]
		if e.Way != want || e.PodUID != "a1" || e.Peer != lab.At(l.Outside.V4, app.GreetPort) || e.BytesReceived == 0 {
			t.Errorf("%+v, want the way %s", e, want)
		}
	})
	t.Run("plain text", func(t *testing.T) {
		n.Namespaces = []v1alpha1.NodeNamespace{{Name: "team-a", PlainText: v1alpha1.PlainTextStrict}}
		apply(t, n, func(p agent.InspectedPod) bool { return p.Strict })
		log, stop := watchEvents(t, l)
		defer stop()
		eachFamily(t, func(t *testing.T, family int) {
			to := lab.At(l.A1.Of(family), app.GreetPort)
			if r := l.Outside.Call(t, "tcp", "--timeout", "3s", to.String()); r.OK {
				t.Errorf("%+v", r)
			}
			log.await(t, "denied", func(e agent.ConnectionEvent) bool {
				return e.Event == "denied" && e.Reason == "PlainText" && e.Way == "inbound" && e.PodUID == "a1" && e.Pod == to && e.Peer.Addr() == l.Outside.Of(family)
			})
		})
		n.Namespaces = nil
		apply(t, n, func(p agent.InspectedPod) bool { return !p.Strict })
	})
	t.Run("in the clear", func(t *testing.T) {
		n.Exclusions = map[string][]v1alpha1.Exclusion{"a1": {{Direction: v1alpha1.DirectionOutbound, Port: app.BulkPort}, {Direction: v1alpha1.DirectionInbound, Port: app.BulkPort}}}
		apply(t, n, func(p agent.InspectedPod) bool { return (len(p.Excluded) == 2) == (p.Name == "a1") })
		log, stop := watchEvents(t, l)
		defer stop()
		eachFamily(t, func(t *testing.T, family int) {
			for _, c := range []struct {
				way      string
				from, to *lab.Host
			}{{"direct-outbound", l.A1, l.Outside}, {"direct-inbound", l.Outside, l.A1}} {
				to := lab.At(c.to.Of(family), app.BulkPort)
				call(t, c.from, to)
				for _, event := range []string{"opened", "closed"} {
					e := log.await(t, c.way+" "+event, func(e agent.ConnectionEvent) bool {
						return e.Event == event && e.Way == c.way && e.PodUID == "a1" && e.Tenant == l.A1.Tenant.String() && (e.Pod == to || e.Peer == to)
					})
					if event == "closed" && n.Redirection == v1alpha1.RedirectionEBPF && (e.BytesSent < down || e.BytesReceived < down) {
						t.Errorf("closed with %+v", e)
					}
				}
			}
		})
		n.Exclusions = nil
		apply(t, n, func(p agent.InspectedPod) bool { return len(p.Excluded) == 0 })
	})
}

// Who watches goes on to be told when the node redirects in another way.
func TestEventsWhileRedirectionChanges(t *testing.T) {
	l := lab.New(t)
	log, _ := watchEvents(t, l)
	for _, r := range []v1alpha1.Redirection{v1alpha1.RedirectionNetfilter, v1alpha1.RedirectionEBPF} {
		l.Node1.Redirection = r
		l.Node1.WritePlan()
		lab.Eventually(t, "the redirection by "+string(r), func() error {
			i, err := l.Node1.Inspect()
			if err != nil || i.Redirection != string(r) {
				return fmt.Errorf("it is by %s: %s, %v", i.Redirection, i.Problem, err)
			}
			return onlyRedirection(t, l.Node1)
		})
		l.Node1.WaitReady()
		begun := time.Now()
		flow{from: l.A1, to: l.Outside}.check(t, 4)
		for _, event := range []string{"opened", "closed"} {
			log.await(t, event+" by "+string(r), func(e agent.ConnectionEvent) bool {
				return e.Event == event && e.Way == "outbound" && e.PodUID == "a1" && e.Time.After(begun) && e.Peer == lab.At(l.Outside.V4, app.GreetPort)
			})
		}
	}
}
