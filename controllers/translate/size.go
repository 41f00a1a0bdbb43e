package translate

import "github.com/bulkhead-mesh/bulkhead/model"

// What a rule takes at each proxy that has it, in bytes: what is written in it, and
// about what Envoy and RE2 make of that. It is of each match, for Envoy has the action
// of a rule once for each of its matches.
const (
	matchBytes      = 256
	entryBytes      = 64 // a header, a parameter, a backend
	mirrorBytes     = 512
	expressionBytes = 1024
	stepBytes       = 8 // of the program of an expression
)

// matchSize is of a match whose expressions have so many steps together.
func matchSize(m model.RequestMatch, expressions, steps int) int {
	n := matchBytes + len(m.Path.Value) + len(m.Method) + expressions*expressionBytes + steps*stepBytes
	for _, list := range [][]model.ValueMatch{m.Headers, m.Query} {
		for _, v := range list {
			n += entryBytes + len(v.Name) + len(v.Value)
		}
	}
	return n
}

func actionSize(a *model.Action) int {
	n := changeSize(a.RequestHeaders) + changeSize(a.ResponseHeaders) + len(a.Host) + len(a.Mirrors)*mirrorBytes
	for _, b := range a.Backends {
		n += entryBytes + len(b.To.Namespace) + len(b.To.Name) + changeSize(b.RequestHeaders) + changeSize(b.ResponseHeaders)
	}
	if a.Path != nil {
		n += len(a.Path.Value)
	}
	if a.Redirect != nil {
		n += len(a.Redirect.Host)
		if a.Redirect.Path != nil {
			n += len(a.Redirect.Path.Value)
		}
	}
	return n
}

func changeSize(c model.HeaderChange) (n int) {
	for _, list := range [][]model.Header{c.Set, c.Add} {
		for _, h := range list {
			n += entryBytes + len(h.Name) + len(h.Value)
		}
	}
	for _, name := range c.Remove {
		n += entryBytes + len(name)
	}
	return n
}
