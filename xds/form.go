package xds

import (
	"slices"
	"strconv"
	"strings"
)

// Envoy drains a filter chain whose content changes, and ends what still goes on in it
// ten minutes later. So a process keeps its listeners in the form in which it got them,
// whatever newer operators make of new ones; the next process gets the newest form.
//
// Nothing remembers forms but the processes: the version of a listener says its form, and
// a process tells the versions that it has when its stream begins (decision 57). What it
// tells decides nothing but what it gets itself.
//
// A change of what a chain has, in whatever way, is a new form. What a form has refers to
// clusters by name, which stay as long as the form does; and listeners of all forms work
// beside each other in one process, for Envoy's drained chains do, and last good may mix
// them.

// Form is how listeners are made, chains among them.
type Form int

const (
	// OldestForm is that of versions without a mark.
	OldestForm Form = 1
	// formAgain tries again what is refused; see parts.go.
	formAgain Form = 2
	// NewestForm is what processes get that have no listener yet.
	NewestForm = formAgain
)

// formEnd ends the mark of a form, which begins a version. Neither hashes nor what a former
// operator gave out has it before marksBegin.
const formEnd = "-"

// mark adds to a listener's version which form it has.
func (f Form) mark(r *resource) {
	if f != OldestForm {
		r.wire.Version = strconv.Itoa(int(f)) + formEnd + r.wire.Version
	}
}

// formOf is the form of a listener with a version, or the nearest up to newest.
func formOf(version string, newest Form) Form {
	version, _, _ = strings.Cut(version, marksBegin)
	mark, _, marked := strings.Cut(version, formEnd)
	n, err := strconv.Atoi(mark)
	if !marked || err != nil {
		return OldestForm
	}
	return min(max(Form(n), OldestForm), newest)
}

// form is that in which the process has a listener, or the newest if it has none.
// Store.mu is held.
func (st *stream) form(listener string) Form {
	newest := st.server.store.newest
	st.mu.Lock()
	defer st.mu.Unlock()
	sub := st.types[TypeListener]
	if sub == nil || !sub.has(listener) {
		return newest
	}
	return formOf(sub.held[listener].acked, newest)
}

// streamsOf counts the streams whose process has chains of a form, in any of the listeners
// that each process has: a form that one of them still needs must not look unused.
func (s *Store) streamsOf(f Form) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.proxies {
		for st := range p.streams {
			if slices.ContainsFunc(listenerNames, func(name string) bool { return st.form(name) == f }) {
				n++
			}
		}
	}
	return n
}
