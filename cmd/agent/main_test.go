package main

import (
	"io"
	"os"
	"strings"
	"testing"
)

// written returns what do writes to one of the process's files.
func written(t *testing.T, to **os.File, do func()) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	had := *to
	*to = w
	do()
	*to = had
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// What is wrong with flags is said once, by main, and with where they are listed.
func TestWrongFlags(t *testing.T) {
	for _, args := range [][]string{{"inspect", "--tenant", "x"}, {"debug", "stats", "--nonsense"}} {
		var err error
		if said := written(t, &os.Stderr, func() { err = run(t.Context(), args) }); said != "" {
			t.Errorf("%q: it is said before by %q", args, said)
		}
		if err == nil || !strings.Contains(err.Error(), "not defined: -") || !strings.Contains(err.Error(), "see agent "+args[0]+" --help") {
			t.Errorf("%q: %v", args, err)
		}
	}
	for _, command := range []string{"log", "debug"} {
		said := written(t, &os.Stdout, func() { run(t.Context(), []string{command, "--help"}) })
		if !strings.Contains(said, "-tenant") || !strings.Contains(said, "-generation") {
			t.Errorf("%s: help is %q", command, said)
		}
	}
}
