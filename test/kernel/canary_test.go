package kernel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/steer"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// firstBytes is how many connections a generation's histogram has.
func firstBytes(f *v1alpha1.GenerationFigures) (n int64) {
	for _, bucket := range f.FirstByte {
		n += bucket
	}
	return n
}

// How a canary's connections fare is counted beside those of what serves, from outside:
// what it can't connect to, what it resets, what handshakes fail, and how long it takes to
// answer. One whose Envoy keeps silent is still compared by what the kernel sees.
func TestCanaryFigures(t *testing.T) {
	const silent, resetting, closed, tries = 9101, 9102, 9103, 120
	l := lab.New(t)
	n := l.Node1
	n.Canary = 75 // the larger part, so that what is told of the other one is seen
	n.WritePlan()
	n.WaitReady()
	type figures = v1alpha1.GenerationFigures
	// until waits for what is told of both.
	until := func(what string, f func(first, canary *figures) error) {
		t.Helper()
		lab.Eventually(t, what, func() error {
			by := map[string]*figures{}
			for _, g := range n.Tenant("team-a").Generations {
				by[g.Role] = g.Figures
			}
			first, canary := by[string(v1alpha1.RoleFirst)], by[string(v1alpha1.RoleCanary)]
			if first == nil || canary == nil {
				return errors.New("they aren't compared")
			}
			if err := f(first, canary); err != nil {
				return fmt.Errorf("%w: %+v beside %+v", err, *canary, *first)
			}
			return nil
		})
	}
	// again is how many SYNs were repeated, as those are that a full queue drops. Each may
	// count once more.
	before := l.A1.Counter(t, "TcpExt TCPSynRetrans")
	again := func() int64 { return int64(l.A1.Counter(t, "TcpExt TCPSynRetrans") - before) }
	// all says that so many were counted of n connections.
	all := func(counted, n int64) bool { return counted >= n && counted <= n+again() }
	// shared says that each has its part of what was counted of n connections, and together
	// they have all of it.
	shared := func(first, canary int64, n int64) error {
		if first < n/20 || canary <= first || !all(first+canary, n) {
			return fmt.Errorf("%d and %d of %d, and %d SYNs were repeated", first, canary, n, again())
		}
		return nil
	}
	dialled := 0
	connect := func(connections, port int, within time.Duration, use func(c net.Conn)) {
		t.Helper()
		l.A1.Do(t, func() {
			for range connections {
				dialled++
				c, err := net.DialTimeout("tcp", lab.At(l.Outside.V4, uint16(port)).String(), within)
				if err != nil {
					continue // of a canary that stands still, when its backlog is full
				}
				c.SetDeadline(time.Now().Add(within))
				use(c)
				c.Close()
			}
		})
	}
	oneByte := func(c net.Conn) { c.Read(make([]byte, 1)) }
	toEnd := func(c net.Conn) { io.Copy(io.Discard, c) }
	listen := func(port int) (listener net.Listener) {
		l.Outside.Do(t, func() {
			var err error
			listener, err = net.Listen("tcp", fmt.Sprint(":", port))
			lab.Check(t, err)
		})
		t.Cleanup(func() { listener.Close() })
		return listener
	}
	resets := listen(resetting)
	go func() {
		for {
			c, err := resets.Accept()
			if err != nil {
				return
			}
			go func() {
				c.Write([]byte("x"))
				io.CopyN(io.Discard, c, 64<<10)
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}()
		}
	}()

	until("a comparison", func(*figures, *figures) error { return nil })
	// While the processes are new, how fast they are isn't counted.
	until("first bytes", func(first, canary *figures) error {
		connect(5, app.GreetPort, lab.Patience, oneByte)
		if firstBytes(first) < 5 || firstBytes(canary) < 5 {
			return errors.New("too few")
		}
		return nil
	})
	until("connections", func(first, canary *figures) error {
		for _, f := range []*figures{first, canary} {
			if f.Unread != "" || f.Unanswered+f.Resets+f.UpstreamFailures+f.HandshakeFailures > 0 || firstBytes(f) > f.Connections || f.Connections > int64(dialled)+again() {
				t.Fatalf("nothing went wrong of %d, and %d SYNs were repeated: %+v beside %+v", dialled, again(), *canary, *first)
			}
		}
		return nil
	})
	// Who leaves before there is an answer isn't the proxy's fault: the kernel takes these
	// connections, and resets them when the listener goes.
	listener := listen(silent)
	connect(tries, silent, lab.Patience, func(net.Conn) {})
	listener.Close()
	connect(tries, closed, lab.Patience, toEnd)
	until("failures to connect", func(first, canary *figures) error {
		if first.UpstreamFailures == 0 || canary.UpstreamFailures <= first.UpstreamFailures || first.Resets+canary.Resets > 0 {
			return errors.New("as Envoy says")
		}
		return shared(first.Unanswered, canary.Unanswered, tries)
	})
	connect(tries, resetting, lab.Patience, func(c net.Conn) {
		oneByte(c)
		for data := make([]byte, 64<<10); ; {
			if _, err := c.Write(data); err != nil {
				return
			}
		}
	})
	until("resets", func(first, canary *figures) error {
		if !all(first.Unanswered+canary.Unanswered, tries) {
			return errors.New("others aren't answered, too")
		}
		return shared(first.Resets, canary.Resets, tries)
	})
	// Who speaks no TLS to the tunnels' port.
	l.Outside.Do(t, func() {
		for range tries {
			c, err := net.DialTimeout("tcp", lab.At(l.A1.V4, steer.Inbound.Port()).String(), lab.Patience)
			lab.Check(t, err)
			c.SetDeadline(time.Now().Add(lab.Patience))
			fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
			toEnd(c)
			c.Close()
		}
	})
	until("handshakes that fail", func(first, canary *figures) error {
		if first.Unanswered+canary.Unanswered > tries+again() || first.Resets+canary.Resets > tries+again() {
			t.Fatalf("tunnels are counted as connections: %+v beside %+v", *canary, *first)
		}
		return shared(first.HandshakeFailures, canary.HandshakeFailures, tries)
	})

	// At another weight counting begins anew.
	n.Canary = 60
	n.WritePlan()
	n.WaitReady()
	for _, g := range n.Tenant("team-a").Generations {
		if g.Role == string(v1alpha1.RoleCanary) {
			lab.Check(t, unix.Kill(g.PID, unix.SIGSTOP))
			t.Cleanup(func() { unix.Kill(g.PID, unix.SIGCONT) })
		}
	}
	until("what the kernel sees of a canary that keeps silent", func(first, canary *figures) error {
		connect(5, app.GreetPort, 100*time.Millisecond, oneByte)
		if canary.Connections < 5 || firstBytes(first) < 5 || firstBytes(canary) > 0 {
			return errors.New("counting stands still")
		}
		return nil
	})
	// Silence is told of when it has lasted for 30 s, of which that took a part.
	until("word of its silence", func(first, canary *figures) error {
		if firstBytes(canary) > 0 {
			t.Fatalf("who stands still answers: %+v", *canary)
		}
		if first.Unread == "" || canary.Unread == "" {
			return errors.New("it answers")
		}
		return nil
	})
}
