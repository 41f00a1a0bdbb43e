package agent

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// A tenant that waited for connections has the same time as any other for what is in its
// tunnels, as long as it hasn't had all that there is.
func TestEndingTenantsHaveTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, err := newAgent(Options{Node: "n", Operator: "localhost:1", Linger: 10 * time.Second, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		tenant, since := model.NamespaceTenant("team-a"), time.Now()
		left := func(when string, want time.Duration) {
			t.Helper()
			if got := time.Until(a.restsUntil(tenant, since)); got != want {
				t.Errorf("%s: %s left; want %s", when, got, want)
			}
		}
		time.Sleep(2 * time.Minute) // with connections
		left("at first", untakenLimit)
		time.Sleep(untakenLimit / 3)
		left("then", untakenLimit-untakenLimit/3)
		time.Sleep(untakenLimit)
		left("later", -untakenLimit/3)

		a.forgetEnd(tenant)
		since = time.Now()
		time.Sleep(a.o.Linger)
		left("when it ends again", untakenLimit)

		a.forgetEnd(tenant)
		since = time.Now()
		time.Sleep(heldLimit)
		left("when its connections are to be cut", 0)
	})
}
