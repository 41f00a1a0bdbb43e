package isolation

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	echo "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/echo/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

const echoPort = 18000

// echoListener sends back what it gets.
func echoListener(t *testing.T) map[string]proto.Message {
	t.Helper()
	filter, err := anypb.New(&echo.Echo{})
	if err != nil {
		t.Fatal(err)
	}
	return map[string]proto.Message{"echo": &listener.Listener{
		Name: "echo",
		Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
			Address: "0.0.0.0", PortSpecifier: &core.SocketAddress_PortValue{PortValue: echoPort},
		}}},
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "echo", ConfigType: &listener.Filter_TypedConfig{TypedConfig: filter},
		}}}},
	}}
}

// client is a connection that was made inside of a tenant's network.
type client struct {
	net.Conn
	lines *bufio.Reader
}

func dialInside(t *testing.T, netns string) client {
	t.Helper()
	var fd int
	err := inNetns(netns, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Port: echoPort, Addr: [4]byte{127, 0, 0, 1}})
	})
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "client")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client{c, bufio.NewReader(c)}
}

func (c client) echo(text string) error {
	if _, err := fmt.Fprintln(c, text); err != nil {
		return err
	}
	got, err := c.lines.ReadString('\n')
	if err == nil && got != text+"\n" {
		err = fmt.Errorf("got %q", got)
	}
	return err
}

// A generation that isn't wanted any more serves its connections until the last
// one is closed, and not a moment longer than its deadline; a manager that comes
// after keeps to the same deadline.
func TestDrain(t *testing.T) {
	n := newNode(t)
	m := n.open()
	n.serveXDS(m, tenantA, 1, echoListener(t))
	n.serveXDS(m, tenantA, 2, nil)
	both := Spec{Tenant: tenantA, Generations: []Generation{{1, dist.Default}, {2, dist.Default}}}
	// begin has generation 1 live with a connection, and then not wanted.
	begin := func(drain time.Duration) (client, Process) {
		t.Helper()
		if err := m.Update(t.Context(), both); err != nil {
			t.Fatal(err)
		}
		s := n.await(m, tenantA, "isn't live", func(s State) bool {
			return len(s.Processes) == 2 && s.Processes[0].Live && s.Processes[1].Live
		})
		c := dialInside(t, s.Netns)
		if err := c.echo("before"); err != nil {
			t.Fatal(err)
		}
		one := both
		one.Generations, one.Drain = both.Generations[1:], drain
		if s.Processes[0].Generation == 2 {
			s.Processes[0] = s.Processes[1]
		}
		if err := m.Update(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		return c, s.Processes[0]
	}
	gone := func(s State) bool { return len(s.Processes) == 1 && s.Processes[0].Generation == 2 }
	draining := func(pid int) Process {
		t.Helper()
		s, _ := m.State(tenantA)
		for _, p := range s.Processes {
			if p.PID == pid && !p.DrainUntil.IsZero() && alive(pid) {
				return p
			}
		}
		t.Fatalf("process %d doesn't drain: %+v", pid, s)
		return Process{}
	}

	t.Run("last connection", func(t *testing.T) {
		c, p := begin(5 * time.Minute)
		draining(p.PID)
		if err := c.echo("meanwhile"); err != nil {
			t.Errorf("a connection of a draining proxy: %v", err)
		}
		c.Close()
		n.await(m, tenantA, "drained and didn't end", gone)
		if alive(p.PID) {
			t.Error("the process is left")
		}
		n.await(m, tenantA, "left the folder of its socket", func(State) bool {
			_, err := os.Stat(n.o.mustDefault(t).xdsDir(tenantA, 1))
			return err != nil
		})
	})
	t.Run("deadline", func(t *testing.T) {
		n.serveXDS(m, tenantA, 1, echoListener(t))
		c, p := begin(5 * time.Second)
		until := draining(p.PID).DrainUntil
		for time.Now().Before(until.Add(-200 * time.Millisecond)) {
			if err := c.echo("meanwhile"); err != nil {
				if time.Now().Before(until) {
					t.Errorf("a connection ended before the deadline: %v", err)
				}
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		n.await(m, tenantA, "didn't end at its deadline", gone)
		if time.Now().Before(until) {
			t.Error("a connection was open, and it ended before the deadline")
		}
		if err := c.echo("afterwards"); err == nil {
			t.Error("the connection lives on")
		}
	})
	t.Run("next manager", func(t *testing.T) {
		n.serveXDS(m, tenantA, 1, echoListener(t))
		c, p := begin(5 * time.Minute)
		until := draining(p.PID).DrainUntil
		m.Close()
		if err := c.echo("without a manager"); err != nil {
			t.Error(err)
		}
		m = n.open()
		for range 2 {
			if now := draining(p.PID).DrainUntil; !now.Equal(until) {
				t.Errorf("the deadline is %s, was %s", now, until)
			}
			// Neither another manager nor another update prolongs it.
			if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: both.Generations[1:], Drain: time.Hour}); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
		n.await(m, tenantA, "drained and didn't end", gone)
	})
	t.Run("adopted", func(t *testing.T) {
		n.serveXDS(m, tenantA, 1, echoListener(t))
		if err := m.Update(t.Context(), both); err != nil {
			t.Fatal(err)
		}
		s := n.await(m, tenantA, "isn't live", func(s State) bool {
			return len(s.Processes) == 2 && s.Processes[0].Live && s.Processes[1].Live
		})
		c := dialInside(t, s.Netns)
		m.Close()
		m = n.open()
		// At once: the manager hasn't seen it live itself.
		if err := m.Update(t.Context(), Spec{Tenant: tenantA, Generations: both.Generations[1:], Drain: 5 * time.Minute}); err != nil {
			t.Fatal(err)
		}
		if err := c.echo("after adoption"); err != nil {
			t.Errorf("a connection of an adopted proxy that drains: %v", err)
		}
		c.Close()
		n.await(m, tenantA, "drained and didn't end", gone)
	})
	t.Run("wanted again", func(t *testing.T) {
		n.serveXDS(m, tenantA, 1, echoListener(t))
		_, p := begin(5 * time.Minute)
		draining(p.PID)
		// Wanted again: it has said goodbye to its clients, so another one comes.
		if err := m.Update(t.Context(), both); err != nil {
			t.Fatal(err)
		}
		if alive(p.PID) {
			t.Error("it still drains")
		}
		s := n.await(m, tenantA, "isn't live", func(s State) bool {
			return len(s.Processes) == 2 && s.Processes[0].Live && s.Processes[1].Live
		})
		for _, p := range s.Processes {
			if !p.DrainUntil.IsZero() {
				t.Errorf("%+v", p)
			}
		}
	})
	if logs := n.logs(m, tenantA); strings.Contains(logs, "rejected") {
		t.Error(logs)
	}
}
