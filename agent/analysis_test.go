package agent

import (
	"cmp"
	"fmt"
	"reflect"
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

// The status says of each process each count of its own.
func TestFiguresStatus(t *testing.T) {
	n := int64(0)
	// distinct puts another number into each field.
	var distinct func(v reflect.Value)
	distinct = func(v reflect.Value) {
		n++
		switch v.Kind() {
		case reflect.Uint64:
			v.SetUint(uint64(n))
		case reflect.Int64:
			v.SetInt(n)
		case reflect.Array:
			for i := range v.Len() {
				distinct(v.Index(i))
			}
		case reflect.Struct:
			for i := range v.NumField() {
				distinct(v.Field(i))
			}
		default:
			t.Fatalf("a field of kind %s", v.Kind())
		}
	}
	at := time.Unix(1e9, 5e8)
	f := figures.Figures{At: at, Unread: silence, Over: 61*time.Second + 400*time.Millisecond}
	// Levels first, so that of tunnels there are more than are open.
	distinct(reflect.ValueOf(&f.Levels).Elem())
	distinct(reflect.ValueOf(&f.Counts).Elem())
	named := map[string]string{"CPUMilliseconds": "CPU"}
	for i := range f.Counts {
		got := figuresStatus(f, i)
		if !got.At.Time.Equal(time.Unix(1e9, 0)) || got.Seconds != 61 || got.Unread != silence {
			t.Errorf("process %d: at %s, %d s, %q", i, got.At, got.Seconds, got.Unread)
		}
		status, counts, levels := reflect.ValueOf(got).Elem(), reflect.ValueOf(f.Counts[i]), reflect.ValueOf(f.Levels[i])
		for k := range status.NumField() {
			name := status.Type().Field(k).Name
			if name == "At" || name == "Seconds" || name == "Unread" {
				continue
			}
			of := cmp.Or(named[name], name)
			want := counts.FieldByName(of)
			if !want.IsValid() {
				want = levels.FieldByName(of)
			}
			if got, want := fmt.Sprint(status.Field(k)), fmt.Sprint(want); got != want {
				t.Errorf("process %d: %s is %s, want %s", i, name, got, want)
			}
		}
	}
	// Of those that are open, some were opened before the time.
	f.Levels[1].OpenTunnelConnections, f.Levels[1].OpenRequestConnections = 1000, 2000
	if got := figuresStatus(f, 1); got.TunnelConnections != 1000 || got.RequestConnections != 2000 {
		t.Errorf("%d tunnels and %d connections of requests, want those that are open", got.TunnelConnections, got.RequestConnections)
	}
}
