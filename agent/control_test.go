package agent

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What a proxy has written does nothing to the terminal of who reads it.
func TestLogIsPrintable(t *testing.T) {
	a, err := newAgent(Options{Node: "n", Operator: "localhost:1", RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	a.bulkheads = &isolation.Manager{} // its folders are below the working directory
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	socket := a.o.ControlSocket()
	go func() { ended <- a.serveControl(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	log := a.bulkheads.LogFile(model.NamespaceTenant("team-a"), 1)
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, []byte("one\ttwo ä\n\x1b]0;mine\a\x1b[2J\x9b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	for err = os.ErrNotExist; err != nil && ctx.Err() == nil; { // until it listens
		if _, err = os.Stat(socket); err == nil {
			err = Control(ctx, socket, http.MethodGet, "/log", url.Values{"tenant": {"team-a"}, "generation": {"1"}}, &got)
		}
	}
	if want := "one\ttwo ä\n?]0;mine??[2J?\n"; got.String() != want {
		t.Errorf("the log reads %q, want %q", &got, want)
	}
}

// What else is made meanwhile has its own mode: Envoy's files, of which the tenants'
// proxies would be kept out.
func TestControlSocketChangesNoOthersMode(t *testing.T) {
	a, err := newAgent(Options{Node: "n", Operator: "localhost:1", RunDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	made := make(chan fs.FileMode)
	dir := t.TempDir()
	go func() {
		defer close(made)
		for over.Err() == nil {
			path := filepath.Join(dir, "d")
			if os.Mkdir(path, 0o700) != nil {
				return
			}
			info, err := os.Stat(path)
			if err != nil || info.Mode().Perm() != 0o700 {
				made <- info.Mode()
				return
			}
			os.Remove(path)
		}
	}()
	ended, end := context.WithCancel(t.Context())
	end()
	for range 2000 {
		if err := a.serveControl(ended); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if mode, other := <-made; other {
		t.Errorf("a folder got mode %s", mode)
	}
}
