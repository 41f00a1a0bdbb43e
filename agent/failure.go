package agent

import (
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
)

const (
	// recoveredAfter is for how long proxies have to serve after a failure for it to be
	// over: as long as until their next start is as quick as the first.
	recoveredAfter = 10 * time.Second
	// What of a failure's log goes into the status, which all tenants of a node share.
	maxFailureLines, maxFailureLog = 5, 512
	// startWarning is what each Envoy says when it starts: the agent bounds connections
	// in its place. It would be taken for the cause.
	startWarning = "There is no configured limit to the number of allowed active downstream connections."
)

// failure is how one of a tenant's processes ended last that wasn't asked to; nil
// if none did.
func failure(s isolation.State, now time.Time) *v1alpha1.ProxyFailure {
	var f *v1alpha1.ProxyFailure
	var at time.Time
	serving := true
	for _, p := range s.Processes {
		if p.DrainUntil.IsZero() {
			serving = serving && p.Live && now.Sub(p.StartedAt) >= recoveredAfter
		}
		if e := p.Exit; e.Cause != "" && e.Cause != isolation.CauseStopped && !e.At.Before(at) {
			at = e.At
			f = &v1alpha1.ProxyFailure{Generation: int32(p.Generation), Cause: string(e.Cause), Message: cut(e.Status, 256),
				At: metav1.NewTime(e.At.UTC().Truncate(time.Second)), Restarts: int32(p.Restarts), Log: lastWords(e.Log)}
		}
	}
	if f != nil {
		f.Recovered = serving
	}
	return f
}

// lastWords are the end of a log that says why: as much as there is room for.
func lastWords(log string) string {
	lines := slices.DeleteFunc(strings.Split(strings.TrimRight(log, "\n"), "\n"), func(line string) bool {
		// After [time][thread][level][logger] [place].
		_, line, _ = strings.Cut(line, "] [")
		_, line, _ = strings.Cut(line, "] ")
		return strings.HasPrefix(line, startWarning)
	})
	text := strings.Join(lines[max(0, len(lines)-maxFailureLines):], "\n")
	if len(text) > maxFailureLog {
		text = "…" + strings.ToValidUTF8(text[len(text)-maxFailureLog:], "")
	}
	return text
}

func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "")
}
