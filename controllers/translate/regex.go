package translate

import (
	"fmt"
	"regexp/syntax"
	"strings"
	"unicode"
)

// maxRegex is how large the program of an expression may be, by our estimate.
// Envoy refuses, and with it all routes of the service, what doesn't fit into its
// RE2's memory, some ten times as much.
const maxRegex = 4096

// regex checks an expression. Go's syntax is RE2's, but for the names of classes. Once
// something is wrong with the route it does nothing: a route may have hundreds of the
// worst, and the mesh waits while it is read.
func (r *routeReader) regex(field, expression string) {
	if !r.refused.isZero() {
		return
	}
	if expression == "" {
		r.unsupported("%s: the expression is empty", field)
		return
	}
	size, err := regexSize(expression)
	r.expressions, r.steps = r.expressions+1, r.steps+size
	if err == nil {
		err = regexClasses(expression)
	}
	if err != nil {
		r.unsupported("%s: %v", field, err)
	} else if size > maxRegex {
		r.unsupported("%s: the expression is too large (more than %d steps)", field, maxRegex)
	}
}

// regexClasses says which class of an expression that Go takes RE2 doesn't know: Go has
// other names for many, in any case and with blanks.
func regexClasses(expression string) error {
	for rest := expression; rest != ""; {
		_, after, found := strings.Cut(rest, `\`)
		if !found || after == "" {
			return nil
		}
		escape := after[0]
		rest = after[1:]
		switch escape {
		case 'Q': // up to \E all is literal
			_, rest, _ = strings.Cut(rest, `\E`)
		case 'p', 'P':
			name := rest[:min(1, len(rest))]
			if name == "{" {
				name, _, _ = strings.Cut(rest[1:], "}")
			}
			name = strings.TrimPrefix(name, "^")
			// Go's own inventions among the categories.
			_, category := unicode.Categories[name]
			_, script := unicode.Scripts[name]
			if name == "LC" || name == "Cn" || !category && !script && name != "Any" {
				return fmt.Errorf("the class %q of characters isn't known; take a general category as L or Lu, or a script as Greek", name)
			}
		}
	}
	return nil
}

// regexSize estimates the steps of RE2's program: it works on bytes, so that a range of
// runes takes several. Nothing is compiled for it: what repetitions make of a line takes
// hundreds of megabytes.
func regexSize(expression string) (int, error) {
	parsed, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return 0, err
	}
	return stepsOf(parsed), nil
}

// stepsOf an expression, up to a few more than maxRegex.
func stepsOf(e *syntax.Regexp) int {
	n := 1
	switch e.Op {
	case syntax.OpLiteral:
		n = 3 * len(e.Rune)
		if e.Flags&syntax.FoldCase != 0 {
			n *= 2
		}
	case syntax.OpCharClass:
		n += 2 * len(e.Rune)
	case syntax.OpAnyChar, syntax.OpAnyCharNotNL:
		n = 9
	}
	for _, sub := range e.Sub {
		if n += stepsOf(sub); n > maxRegex {
			return maxRegex + 1
		}
	}
	if e.Op == syntax.OpRepeat {
		n *= max(e.Min, e.Max, 1) // at most 1000
	}
	return min(n, maxRegex+1)
}
