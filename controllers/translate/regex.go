package translate

import (
	"regexp/syntax"
)

// maxRegex is how large the program of an expression may be, by our estimate.
// Envoy refuses, and with it all routes of the service, what doesn't fit into its
// RE2's memory, some ten times as much.
const maxRegex = 4096

// regex checks an expression. Go's syntax is RE2's.
func (r *routeReader) regex(field, expression string) {
	size, err := regexSize(expression)
	if err != nil {
		r.unsupported("%s: %v", field, err)
	} else if size > maxRegex {
		r.unsupported("%s: the expression is too large (%d steps, at most %d)", field, size, maxRegex)
	}
}

// regexSize estimates the steps of RE2's program: it works on bytes, so that a
// range of runes takes several.
func regexSize(expression string) (int, error) {
	parsed, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return 0, err
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return 0, err
	}
	size := 0
	for _, i := range program.Inst {
		size += 1 + 2*len(i.Rune)
	}
	return size, nil
}
