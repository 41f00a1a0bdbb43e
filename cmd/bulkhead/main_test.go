package main

import (
	"strings"
	"testing"
)

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
