package bpf

import (
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Linux before 6.9 rounds what each function takes of the stack up to 32 bytes, later ones
// to 16, so that a program may be loaded by this kernel and not by the oldest there may be.
func TestStackOnOldKernels(t *testing.T) {
	const most, granule = 512, 32
	spec, err := loadDatapath()
	check(t, err)
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
	check(t, err)
	defer c.Close()
	for name, p := range c.Programs {
		functions, calls := callGraph(spec.Programs[name].Instructions)
		stack := stackOf(t, p.VerifierLog, functions)
		var deepest func(string) (int, []string)
		deepest = func(function string) (size int, chain []string) {
			for _, callee := range calls[function] {
				if n, of := deepest(callee); n > size {
					size, chain = n, of
				}
			}
			rounded := (max(stack[function], 1) + granule - 1) / granule * granule
			return size + rounded, append([]string{function}, chain...)
		}
		size, chain := deepest(functions[0])
		t.Logf("%s: %d bytes", strings.Join(chain, ", "), size)
		if size > most {
			t.Errorf("%s take %d bytes of stack before Linux 6.9, and there are %d", strings.Join(chain, ", "), size, most)
		}
	}
}

// callGraph is the functions of a program in their order, and what each calls.
func callGraph(program asm.Instructions) (functions []string, calls map[string][]string) {
	calls = map[string][]string{}
	for _, i := range program {
		if s := i.Symbol(); s != "" {
			functions = append(functions, s)
		}
		if i.IsFunctionCall() {
			in := functions[len(functions)-1]
			calls[in] = append(calls[in], i.Reference())
		}
	}
	return functions, calls
}

// stackOf is how much of the stack each function takes by itself, as the verifier says.
func stackOf(t *testing.T, verifierLog string, functions []string) map[string]int {
	t.Helper()
	said := regexp.MustCompile(`(?m)^stack depth ([0-9+]+)`).FindStringSubmatch(verifierLog)
	if said == nil {
		t.Fatalf("the verifier doesn't say what stack %s takes: %s", functions[0], verifierLog)
	}
	depths := strings.Split(said[1], "+")
	if len(depths) != len(functions) {
		t.Fatalf("the verifier says %q of the functions %v", said[1], functions)
	}
	stack := map[string]int{}
	for i, f := range functions {
		var err error
		stack[f], err = strconv.Atoi(depths[i])
		check(t, err)
	}
	return stack
}
