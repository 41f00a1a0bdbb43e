package kernel

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// bulk is what is sent each way.
const bulk = 64 << 20

// Large transfers arrive unchanged, also where packets have to be smaller than
// either end thinks.
func TestBulk(t *testing.T) { eachRedirection(t, testBulk) }

func testBulk(t *testing.T, l *lab.Lab) {
	too := map[int]string{4: "Icmp InDestUnreachs", 6: "Icmp6InPktTooBigs"}
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range []flow{
			{name: "same node, same tenant", from: l.A1, to: l.A2},
			{name: "same node, other tenant", from: l.A1, to: l.B1},
			{name: "other node", from: l.A1, to: l.B2},
			{name: "from outside, narrow", from: l.Outside, to: l.B2},
			{name: "to outside, narrow", from: l.B2, to: l.Outside},
		} {
			t.Run(f.name, func(t *testing.T) {
				r := f.from.Call(t, "bulk", fmt.Sprint("--up=", bulk), fmt.Sprint("--down=", bulk), f.address(family, app.BulkPort).String())
				if !r.OK {
					t.Errorf("%d bytes sent, %d got: %+v", r.Up, r.Down, r.Failure)
				}
			})
		}
		// Probing would have found a size that fits, too, after a long silence.
		for _, p := range []struct {
			n      *lab.Node
			tenant string
		}{{l.Node1, "team-a"}, {l.Node2, "team-b"}} {
			if n := p.n.Proxy(p.tenant).Counter(t, too[family]); n == 0 {
				t.Errorf("no router's word on the path's MTU reached the proxy of %s on %s", p.tenant, p.n.Name)
			}
		}
	})
}

// With SYN cookies, the kernel forgets a connection until its ACK comes, which is
// steered anew: a listener takes it only if cookies were sent for it lately, and
// the generations' are no group that would share that knowledge. So the ACK must
// find the generation that its SYN found, here while two generations listen.
func TestSYNCookies(t *testing.T) { eachRedirection(t, testSYNCookies) }

func testSYNCookies(t *testing.T, l *lab.Lab) {
	var proxies []*lab.Namespace
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		n.Canary = 50
		n.WritePlan()
		n.WaitReady()
		for _, tenant := range []string{"team-a", "team-b"} {
			proxies = append(proxies, n.Proxy(tenant))
		}
	}
	for _, p := range proxies {
		p.Do(t, func() { lab.Sysctl(t, "ipv4/tcp_syncookies=2") })
	}
	received := func() (sum uint64) {
		for _, p := range proxies {
			sum += p.Counter(t, "TcpExt SyncookiesRecv")
		}
		return sum
	}
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range flows(l) {
			t.Run(f.name, func(t *testing.T) {
				f.check(t, family)
				if !f.mesh {
					return
				}
				const connections = 40
				before := received()
				var r app.RunResult
				f.from.Run(t, &r, "hold", fmt.Sprint("--connections=", connections), "--interval=100ms", "--duration=100ms", "--timeout=20s", f.address(family, app.GreetPort).String())
				if !r.OK || received() < before+connections {
					t.Errorf("%d of %d connections held, %d cookies came back: %+v", r.Held, connections, received()-before, r.Failures)
				}
			})
		}
	})
	if steered := l.Node1.Tenant("team-a").Steered; steered[0] < 100 || steered[1] < 100 {
		t.Errorf("the generations got %d connections", steered)
	}
}

// An end that has said its last word still listens: the client's in every flow,
// the server's where there is no tunnel. (In one, Envoy resets the CONNECT as soon
// as the server's half is closed: envoyproxy/envoy#47378 is to change that.)
func TestHalfClose(t *testing.T) { eachRedirection(t, testHalfClose) }

func testHalfClose(t *testing.T, l *lab.Lab) {
	const port = 9000
	halfClosed := map[*lab.Host]chan int64{}
	for _, h := range []*lab.Host{l.A1, l.A2, l.B2, l.Outside} {
		halfClosed[h] = serveHalfClose(t, h, port)
	}
	eachFamily(t, func(t *testing.T, family int) {
		for _, f := range []flow{
			{name: "same node", from: l.A1, to: l.A2, mesh: true},
			{name: "other node", from: l.A1, to: l.B2, mesh: true},
			{name: "to outside", from: l.A1, to: l.Outside},
			{name: "from outside", from: l.Outside, to: l.A1},
		} {
			t.Run(f.name, func(t *testing.T) {
				c := dial(t, f.from, f.address(family, port).String())
				lab.Check(t, c.CloseWrite())
				if b, err := io.ReadAll(c); err != nil || len(b) != afterwards {
					t.Errorf("read %d bytes after the client's end, %v", len(b), err)
				}
				c = dial(t, f.from, f.address(family, port+1).String())
				if b, err := io.ReadAll(c); err != nil || string(b) != "goodbye" {
					t.Fatalf("read %q, %v", b, err)
				}
				if f.mesh {
					return
				}
				if _, err := c.Write(make([]byte, afterwards)); err != nil {
					t.Fatalf("write after the server's end: %v", err)
				}
				lab.Check(t, c.CloseWrite())
				select {
				case n := <-halfClosed[f.to]:
					if n != afterwards {
						t.Errorf("the server got %d bytes after its end", n)
					}
				case <-time.After(lab.Patience):
					t.Error("the server saw no end")
				}
			})
		}
	})
}

// afterwards is how many bytes go one way when the other is closed.
const afterwards = 4 << 20

// dial connects from a host.
func dial(t *testing.T, h *lab.Host, to string) *net.TCPConn {
	t.Helper()
	var c net.Conn
	var err error
	h.Do(t, func() { c, err = net.DialTimeout("tcp", to, lab.Patience) })
	lab.Check(t, err)
	t.Cleanup(func() { c.Close() })
	lab.Check(t, c.SetDeadline(time.Now().Add(lab.Patience)))
	return c.(*net.TCPConn)
}

// serveHalfClose listens to the end on a port before it talks, and on the next one
// says goodbye and then listens. It tells how much it got after its own end.
func serveHalfClose(t *testing.T, h *lab.Host, port int) (halfClosed chan int64) {
	t.Helper()
	halfClosed = make(chan int64, 16)
	for i, serve := range []func(*net.TCPConn){
		func(c *net.TCPConn) {
			if _, err := io.Copy(io.Discard, c); err == nil {
				c.Write(make([]byte, afterwards))
			}
		},
		func(c *net.TCPConn) {
			io.WriteString(c, "goodbye")
			c.CloseWrite()
			n, _ := io.Copy(io.Discard, c)
			halfClosed <- n
		},
	} {
		var listener net.Listener
		h.Do(t, func() {
			var err error
			listener, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port+i))
			lab.Check(t, err)
		})
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(lab.Patience))
					serve(c.(*net.TCPConn))
				}()
			}
		}()
	}
	return halfClosed
}

// Idle connections cost memory that has a bound, and are there when they are used
// again.
func TestIdleConnections(t *testing.T) { eachRedirection(t, testIdleConnections) }

func testIdleConnections(t *testing.T, l *lab.Lab) {
	const connections, perConnection = 10_000, 64 << 10
	memory := func(n *lab.Node, tenant string) int64 { return n.Memory(t, tenant) }
	before1, before2 := memory(l.Node1, "team-a"), memory(l.Node2, "team-b")
	wait := l.A1.Begin(t, "hold", fmt.Sprint("--connections=", connections), "--interval=8s", "--duration=14s", "--timeout=20s", lab.At(l.B2.V4, app.GreetPort).String())
	var most1, most2 int64
	done := make(chan struct{})
	var r app.RunResult
	go func() {
		defer close(done)
		wait(&r)
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(500 * time.Millisecond):
			most1, most2 = max(most1, memory(l.Node1, "team-a")), max(most2, memory(l.Node2, "team-b"))
		}
	}
	if !r.OK || r.Held != connections || r.Exchanges < connections {
		t.Errorf("%d of %d connections held, %d exchanges, failures %+v", r.Held, connections, r.Exchanges, r.Failures)
	}
	t.Logf("the client's proxy: %d bytes a connection, the server's: %d", (most1-before1)/connections, (most2-before2)/connections)
	if most := max(most1-before1, most2-before2) / connections; most > perConnection || most == 0 {
		t.Errorf("%d bytes a connection, more than %d", most, perConnection)
	}
}
