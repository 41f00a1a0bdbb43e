package agent

import (
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/figures"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// An Envoy that answers late now and then isn't told of, one that is silent is, in words
// of the agent's own.
func TestSilenceIsToldOnceItLasts(t *testing.T) {
	began := time.Unix(1e9, 0)
	canary := process{pid: 2}
	c := &comparison{pair: pair{processes: [2]process{{pid: 1}, canary}}}
	a := &Agent{}
	read := func(after time.Duration, unread string) (told bool) {
		t.Helper()
		if unread != "" && c.unread == "" {
			c.silentSince = began.Add(after)
		}
		c.unread = unread
		c.series.Add(figures.Reading{At: began.Add(after), Unread: unread})
		return a.tellFigures(map[model.Tenant]*comparison{{Scope: model.ScopeNamespace, Namespace: "a"}: c}, false)
	}
	unread := func(when, want string) {
		t.Helper()
		if got := a.toldFigures[canary].Unread; got != want {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	read(0, "")
	if !read(time.Second, "") {
		t.Fatal("nothing is told at first")
	}
	for after := 2 * time.Second; after < tellWell; after += time.Second {
		if read(after, [2]string{"", "status 503: what I like"}[after/time.Second%2]) {
			t.Errorf("told after %s", after)
		}
	}
	silent := tellWell + time.Second
	read(silent-time.Second, "")
	read(silent, "status 503: what I like")
	read(silent+tellSilence-time.Second, "status 503: and this")
	unread("before it has lasted", "")
	if !read(silent+tellSilence, "status 503: or that") {
		t.Error("not told that it lasts")
	}
	unread("when it has lasted", silence)
	if read(silent+tellSilence+time.Second, "another") {
		t.Error("told again")
	}
	if !read(silent+tellSilence+2*time.Second, "") {
		t.Error("not told of an answer")
	}
	unread("when it answers", "")
}
