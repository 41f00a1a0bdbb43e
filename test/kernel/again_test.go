package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A connection that a pod had when it joined may end without a word to the node. The next
// with its ports is a new one: Strict refuses it, or the proxy has it, and nobody waits.
func TestBeginsAgain(t *testing.T) { eachRedirection(t, testBeginsAgain) }

func testBeginsAgain(t *testing.T, l *lab.Lab) {
	const served, firstPort = 8093, 42000
	n := l.Node1
	n.Planned = []*lab.Host{l.A2, l.B1}
	n.WritePlan()
	n.WaitReady()
	lab.Eventually(t, "the pod's leave", func() error { return onlyPlanned(t, n) })

	accepted := make(chan net.Conn, 16)
	l.A1.Do(t, func() {
		server, err := net.Listen("tcp", fmt.Sprint(":", served))
		lab.Check(t, err)
		t.Cleanup(func() { server.Close() })
		go func() {
			for {
				c, err := server.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, "hello")
				accepted <- c
			}
		}()
	})
	type ends struct {
		family, port int
		peer         net.Conn
	}
	call := func(e *ends) (err error) {
		t.Helper()
		l.Outside.Do(t, func() {
			d := net.Dialer{Timeout: lab.Patience, LocalAddr: net.TCPAddrFromAddrPort(lab.At(l.Outside.Of(e.family), uint16(e.port)))}
			e.peer, err = d.Dial("tcp", lab.At(l.A1.Of(e.family), served).String())
		})
		if err != nil {
			return err
		}
		c := e.peer
		t.Cleanup(func() { c.Close() })
		lab.Check(t, e.peer.SetDeadline(time.Now().Add(lab.Patience)))
		_, err = bufio.NewReader(e.peer).ReadString('\n')
		return err
	}
	var all []*ends
	var pods []net.Conn
	for i := range 4 {
		e := &ends{family: []int{4, 6}[i%2], port: firstPort + i}
		lab.Check(t, call(e))
		all, pods = append(all, e), append(pods, <-accepted)
	}
	n.Planned = n.Pods
	n.Namespaces = []v1alpha1.NodeNamespace{{Name: "team-a", PlainText: v1alpha1.PlainTextStrict}}
	apply(t, n, func(p agent.InspectedPod) bool { return p.Strict })
	n.WaitReady()
	for i, e := range all {
		b := []byte("x")
		_, writeErr := e.peer.Write(b)
		if _, err := pods[i].Read(b); err != nil || writeErr != nil {
			t.Fatalf("what the pod had when it joined: %v, %v", writeErr, err)
		}
		vanish(t, pods[i])
		vanish(t, e.peer)
	}
	for _, e := range all[:2] {
		if err := call(e); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the next with its ports, IPv%d, with Strict: %v, want a refusal", e.family, err)
		}
	}
	n.Namespaces = nil
	apply(t, n, func(p agent.InspectedPod) bool { return !p.Strict })
	for _, e := range all[2:] {
		before := n.Tenant("team-a").Steered[0]
		if err := call(e); err != nil {
			t.Errorf("the next with its ports, IPv%d: %v", e.family, err)
		}
		if after := n.Tenant("team-a").Steered[0]; after == before {
			t.Errorf("the next with its ports, IPv%d, passed its proxy", e.family)
		}
	}
}

// vanish has an end of a connection go without a packet.
func vanish(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	lab.Check(t, err)
	var failed error
	lab.Check(t, raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1) }))
	lab.Check(t, errors.Join(failed, c.Close()))
}
