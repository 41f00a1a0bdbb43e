package identity

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The authority is away: what there is is served to its end, with a warning when
// half of the time to do something has passed.
func TestHealth(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		n.start()
		defer func() { n.stop() }()
		n.SetPods([]Pod{pod("1", reviews), pod("2", ratings)})
		n.bundle()
		n.ready("1")
		n.ready("2")
		if digest, version := n.Bundle(); digest != BundleDigest(n.signer.authority.Roots()) || version != n.rootCA.GetVersion() {
			t.Errorf("bundle %q of version %q", digest, version)
		}
		first, _, _ := n.certificate(teamA, reviews)
		n.signer.set(func(Pod) error { return status.Error(codes.Unavailable, "operator is away") })
		// Signed for 60 minutes and 5 before: renewed at 27.5 ± 3.25, and overdue when
		// half of what is left then has passed, at 43.75 ± 1.7.
		time.Sleep(41 * time.Minute)
		if h := n.Health(); h.Identities != 2 || h.Overdue != 0 || h.Expired != 0 {
			t.Errorf("after 41 minutes: %+v", h)
		}
		time.Sleep(5 * time.Minute)
		h := n.Health()
		if h.Overdue != 2 || h.Expired != 0 || h.LastError == nil || !strings.Contains(h.LastError.Error(), "away") || h.FirstEnd.After(first.Leaf.NotAfter) {
			t.Errorf("after 46 minutes: %+v", h)
		}
		// An agent that is started again meanwhile knows as much, and serves.
		n.stop()
		n.start()
		n.bundle()
		n.SetPods([]Pod{pod("1", reviews), pod("2", ratings)})
		n.ready("1")
		if again, _, _ := n.certificate(teamA, reviews); again.Leaf.SerialNumber.Cmp(first.Leaf.SerialNumber) != 0 {
			t.Error("another certificate, with nobody to sign it")
		}
		if h := n.Health(); h.Overdue != 2 {
			t.Errorf("after a restart: %+v", h)
		}
		time.Sleep(time.Until(first.Leaf.NotAfter) - time.Second)
		n.certificate(teamA, reviews)
		time.Sleep(2 * time.Second)
		n.refused(teamA, reviews, false)
		if h := n.Health(); h.Expired != 2 || h.Overdue != 0 {
			t.Errorf("after the end: %+v", h)
		}
		n.signer.set(nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := n.WaitReady(ctx, "1"); err != nil {
			t.Fatal(err)
		}
		n.ready("2")
		if h := n.Health(); h.Expired+h.Overdue != 0 {
			t.Errorf("after its return: %+v", h)
		}
	})
}
