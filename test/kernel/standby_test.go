package kernel

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// With a warm standby a tenant takes new connections within 50 ms of a crash, and
// nobody has to notice it for that.
func TestWarmStandby(t *testing.T) { eachRedirection(t, testWarmStandby) }

func testWarmStandby(t *testing.T, l *lab.Lab) {
	// Three of so many kills, since a busy machine is late now and then.
	const kills, enough, within = 12, 3, 50 * time.Millisecond
	n := l.Node1
	n.Standby = true
	n.WritePlan()
	by := func(role string) agent.InspectedGeneration {
		t.Helper()
		var found agent.InspectedGeneration
		lab.Eventually(t, "the process in the role "+role, func() error {
			b := n.Tenant("team-b")
			i := slices.IndexFunc(b.Generations, func(g agent.InspectedGeneration) bool { return g.Role == role && g.Serving })
			if i < 0 || len(b.Generations) != 2 || !b.Generations[0].Serving || !b.Generations[1].Serving || !b.Ready {
				return fmt.Errorf("%s %+v", b.Reason, b.Generations)
			}
			found = b.Generations[i]
			return nil
		})
		return found
	}
	to := lab.At(l.B2.V4, app.GreetPort).String()
	greeted := func() bool {
		c, err := net.DialTimeout("tcp", to, 200*time.Millisecond)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(200 * time.Millisecond))
		_, err = c.Read(make([]byte, 1))
		return err == nil
	}
	var gaps []time.Duration
	good := 0
	for len(gaps) < kills && good < enough && !t.Failed() {
		first, standby := by("First"), by("Standby")
		l.B1.Do(t, func() {
			lab.Eventually(t, "a connection before the kill", func() error {
				if !greeted() {
					return errors.New("nothing gets through")
				}
				return nil
			})
			if err := unix.Kill(first.PID, unix.SIGKILL); err != nil {
				t.Error(err)
				return
			}
			killed, last := time.Now(), time.Duration(0)
			for time.Since(killed) < 500*time.Millisecond {
				begun := time.Since(killed)
				if !greeted() {
					last = begun
				}
			}
			gaps = append(gaps, last)
			if last <= within {
				good++
			}
		})
		if now := by("Standby"); now.PID != standby.PID {
			t.Errorf("the standby is %+v, was %+v", now, standby)
		}
	}
	t.Logf("after a kill the last connection that failed began after %v", gaps)
	if good < enough {
		t.Errorf("all but %d of %d kills were felt for more than %s", good, len(gaps), within)
	}
	n.Standby = false
	n.WritePlan()
	lab.Eventually(t, "the end of the standby", func() error {
		if b := n.Tenant("team-b"); len(b.Generations) != 1 || !b.Ready {
			return fmt.Errorf("%+v", b.Generations)
		}
		return nil
	})
	flow{from: l.B1, to: l.B2}.check(t, 4)
}
