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

// regex checks an expression. Go's syntax is RE2's, but for the names of classes.
func (r *routeReader) regex(field, expression string) {
	size, err := regexSize(expression)
	if err == nil {
		err = regexClasses(expression)
	}
	if err != nil {
		r.unsupported("%s: %v", field, err)
	} else if size > maxRegex {
		r.unsupported("%s: the expression is too large (%d steps, at most %d)", field, size, maxRegex)
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
