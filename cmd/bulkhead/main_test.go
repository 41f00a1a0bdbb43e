package main

import (
	"strings"
	"testing"
)

// A wrong word ends with what to do about it.
func TestUnknownWords(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"bulkhead", []string{"status"}, []string{`unknown command "status"`, "\n\trollout\n", "see bulkhead --help"}},
		{"kubectl-bulkhead", []string{"nonsense"}, []string{`unknown command "nonsense"`, "see kubectl bulkhead --help"}},
		{"bulkhead", []string{"--nonsense"}, []string{"unknown flag: --nonsense", "see bulkhead --help"}},
		{"bulkhead", []string{"rollout", "--nonsense"}, []string{"unknown flag: --nonsense", "see bulkhead rollout --help"}},
	} {
		command := command(c.name)
		command.SetArgs(c.args)
		err := run(t.Context(), command)
		if err == nil {
			t.Errorf("%s %q is taken", c.name, c.args)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s %q: no %q in %q", c.name, c.args, want, err)
			}
		}
	}
}

// Under a plugin's name it tells how it is called as one.
func TestPluginName(t *testing.T) {
	for name, want := range map[string]string{"bulkhead": "bulkhead cost [flags]", "kubectl-bulkhead": "kubectl bulkhead cost [flags]"} {
		c, out := command(name), &strings.Builder{}
		c.SetArgs([]string{"cost", "--help"})
		c.SetOut(out)
		if err := c.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "Usage:\n  "+want+"\n") || !strings.Contains(out.String(), "--since") {
			t.Errorf("as %s: %s", name, out)
		}
	}
}
