package kernel

import (
	"net"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// A pod goes without a word while its connections, and with them its proxy's tunnels,
// are open; one of another service account has its addresses at once. Nothing of
// the new one goes by the name of the former.
func TestReplacedByAnotherIdentity(t *testing.T) {
	const held = 20
	l := lab.New(t)
	echo(t, l.B2)
	old := l.A1
	dial := func(h *lab.Host, family int, patience time.Duration) (conn net.Conn, err error) {
		done := make(chan struct{})
		h.Go(func() {
			defer close(done)
			conn, err = net.DialTimeout("tcp", lab.At(l.B2.Of(family), echoPort).String(), patience)
		})
		<-done
		return conn, err
	}
	for i := range held {
		c, err := dial(old, 4+2*(i%2), lab.Patience)
		lab.Check(t, err)
		defer c.Close()
		lab.Check(t, exchange(c))
	}
	next := l.ReplacePod(old, "a1next", "billing")
	replaced := time.Now().Truncate(time.Millisecond)
	// seen counts the new pod's connections by address and who the peer says it is:
	// a connection of the former one has begun before.
	seen := func() map[[2]string]int {
		count := map[[2]string]int{}
		for _, line := range l.Node2.AccessLog(l.B2.Tenant.String()) {
			began, err := time.Parse(time.RFC3339, line["time"])
			lab.Check(t, err)
			if line["bulkhead"] == "inbound" && !began.Before(replaced) {
				count[[2]string{line["source"], line["peer"]}]++
			}
		}
		return count
	}
	// From its first moment on, and until both addresses have come through the mesh often.
	want := [][2]string{{next.V4.String(), next.Identity.String()}, {next.V6.String(), next.Identity.String()}}
	for deadline, through := time.Now().Add(lab.Patience), false; !through; {
		for i := range 40 {
			c, err := dial(next, 4+2*(i%2), time.Second)
			if err != nil {
				continue // its network has just begun
			}
			exchange(c) // as well
			c.Close()
		}
		count := seen()
		through = count[want[0]] >= 50 && count[want[1]] >= 50
		if !through && time.Now().After(deadline) {
			t.Fatalf("connections of %s by address and identity: %v", next.Identity, count)
		}
	}
	if count := seen(); len(count) != len(want) {
		t.Errorf("connections of %s by address and identity: %v", next.Identity, count)
	}
}
