package kernel

import (
	"bufio"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// What a pod has open when it joins, or leaves, goes on where it began, what it opens
// then goes the new way, and a pod that has left is let go when the last one has ended.
func TestConnectionsStay(t *testing.T) { eachRedirection(t, testConnectionsStay) }

func testConnectionsStay(t *testing.T, l *lab.Lab) {
	n := l.Node1
	plan := func(pods ...*lab.Host) {
		t.Helper()
		n.Planned = pods
		n.WritePlan()
		n.WaitReady()
	}
	plan(l.A2, l.B1)
	lab.Eventually(t, "the pod's leave", func() error { return onlyPlanned(t, n) })

	plain := openAll(t, l, "in the clear")
	plan(n.Pods...)
	plain.talk(t, "when the pod has joined")
	meshed := openAll(t, l, "through the proxy")
	for _, family := range []int{4, 6} {
		meshed.open(t, fmt.Sprintf("through a tunnel to the pod, IPv%d", family), flow{from: l.B2, to: l.A1}, family)
	}
	for _, f := range flows(l) {
		f.check(t, 4)
		f.check(t, 6)
	}
	// Those in the clear aren't the proxy's to end.
	proxied := n.Tenant("team-a").Steered[0]
	if proxied < uint64(len(meshed)) {
		t.Errorf("%d connections were steered, opened %d", proxied, len(meshed))
	}

	plan(l.A2, l.B1)
	plain.talk(t, "when it has left")
	meshed.talk(t, "when the pod has left")
	before := n.Tenant("team-a").Steered[0]
	again := openAll(t, l, "in the clear again")
	if after := n.Tenant("team-a").Steered[0]; after != before {
		t.Errorf("%d connections of a pod that has left were steered", after-before)
	}
	meshed.talk(t, "with others in the clear")
	// What comes by a tunnel that its former tenant has, that one opens.
	for _, family := range []int{4, 6} {
		flow{from: l.B2, to: l.A1}.check(t, family)
	}
	if err := onlyPlanned(t, n); err == nil {
		t.Error("the pod was let go with connections through its proxy")
	}
	meshed.close()
	lab.Eventually(t, "the end of the pod that has left", func() error { return onlyPlanned(t, n) })
	plain.talk(t, "when it is let go")
	again.talk(t, "when it is let go")
}

// onlyPlanned fails while other pods than the planned ones are steered.
func onlyPlanned(t *testing.T, n *lab.Node) error {
	pods, _, err := steered(t, n)
	if err == nil && pods != len(n.Planned) {
		err = fmt.Errorf("%d pods are steered, %d are planned", pods, len(n.Planned))
	}
	return err
}

// openConnections are some that stay open, by what they are.
type openConnections map[string]openConnection

type openConnection struct {
	*net.TCPConn
	lines *bufio.Reader
}

// openAll opens connections from and to a1, and has each talk.
func openAll(t *testing.T, l *lab.Lab, when string) openConnections {
	t.Helper()
	all := openConnections{}
	for _, family := range []int{4, 6} {
		for _, f := range []flow{{from: l.A1, to: l.Outside}, {from: l.Outside, to: l.A1}, {from: l.A1, to: l.B2}} {
			all.open(t, fmt.Sprintf("%s, from %s to %s, IPv%d", when, f.from.Name, f.to.Name, family), f, family)
		}
	}
	all.talk(t, "at once")
	return all
}

func (o openConnections) open(t *testing.T, name string, f flow, family int) {
	t.Helper()
	c := dial(t, f.from, f.address(family, app.GreetPort).String())
	o[name] = openConnection{c, bufio.NewReader(c)}
	if _, err := o[name].lines.ReadString('\n'); err != nil {
		t.Fatalf("%s: read greeting: %v", name, err)
	}
}

// talk sends a line over each and waits for it to come back.
func (o openConnections) talk(t *testing.T, when string) {
	t.Helper()
	for name, c := range o {
		lab.Check(t, c.SetDeadline(time.Now().Add(lab.Patience)))
		want := name + ", " + when + "\n"
		if _, err := c.Write([]byte(want)); err != nil {
			t.Errorf("%s: %s: %v", name, when, err)
		} else if got, err := c.lines.ReadString('\n'); err != nil || got != want {
			t.Errorf("%s: %s: got %q, %v", name, when, got, err)
		}
	}
}

func (o openConnections) close() {
	for _, c := range o {
		c.Close()
	}
}
