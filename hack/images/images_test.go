package main

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// module writes a module with one small program and returns options for it.
func module(t *testing.T) options {
	t.Helper()
	root := t.TempDir()
	put(t, filepath.Join(root, "go.mod"), "module example.test/m\n\ngo 1.26\n")
	put(t, filepath.Join(root, "cmd/one/main.go"), "package main\n\nvar version string\n\nfunc main() { println(version, 1) }\n")
	put(t, filepath.Join(root, "cmd/two/main.go"), "package main\n\nfunc main() { println(2) }\n")
	return options{root: root, out: t.TempDir(), repository: "example.test/r", tag: "v1"}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

var both = spec{
	name:     "both",
	programs: []program{{source: "cmd/two", path: "/opt/x/two"}, {source: "cmd/one", path: "/bulkhead/one"}},
	user:     nonroot,
	args:     []string{"serve"},
}

func TestSameSourcesGiveTheSameBytes(t *testing.T) {
	a, b := module(t), module(t)
	for _, opts := range []options{a, b} {
		if line, err := make1(t.Context(), opts, both); err != nil || !strings.HasSuffix(line, " written") {
			t.Fatalf("%q, %v", line, err)
		}
	}
	first, second := read(t, a, "both.tar"), read(t, b, "both.tar")
	if string(first) != string(second) {
		t.Error("two modules in different folders with the same sources gave different archives")
	}
	for _, secret := range []string{a.root, a.out} {
		if strings.Contains(string(first), secret) {
			t.Errorf("the archive names %s", secret)
		}
	}
}

func read(t *testing.T, opts options, file string) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join(opts.out, file))
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func TestOnlyWhatChangedIsWritten(t *testing.T) {
	opts := module(t)
	archive := filepath.Join(opts.out, "both.tar")
	state := func() string {
		t.Helper()
		line, err := make1(t.Context(), opts, both)
		if err != nil {
			t.Fatal(err)
		}
		return line[strings.LastIndex(line, " ")+1:]
	}
	layers := func() []string {
		t.Helper()
		img, err := tarball.ImageFromPath(archive, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, id := range cfg.RootFS.DiffIDs {
			ids = append(ids, id.String())
		}
		return ids
	}
	state()
	before := layers()
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(archive, past, past); err != nil {
		t.Fatal(err)
	}
	if got := state(); got != "unchanged" {
		t.Errorf("nothing changed: %s", got)
	}
	if info, err := os.Stat(archive); err != nil || !info.ModTime().Equal(past.Truncate(0)) {
		t.Errorf("an unchanged archive was touched: %v, %v", info.ModTime(), err)
	}
	put(t, filepath.Join(opts.root, "cmd/one/main.go"), "package main\n\nfunc main() { println(3) }\n")
	if got := state(); got != "written" {
		t.Errorf("a program changed: %s", got)
	}
	if after := layers(); after[0] != before[0] || after[1] == before[1] {
		t.Errorf("layers %v became %v, wanted only the last to change", before, after)
	}
	put(t, archive, "broken")
	if got := state(); got != "written" {
		t.Errorf("a broken archive: %s", got)
	}
	opts.tag = "v2"
	if got := state(); got != "written" {
		t.Errorf("another tag: %s", got)
	}
	left, err := filepath.Glob(filepath.Join(opts.out, ".tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestImageIsWhatItSays(t *testing.T) {
	opts := module(t)
	if _, err := make1(t.Context(), opts, both); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag("example.test/r/both:v1")
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(filepath.Join(opts.out, "both.tar"), &tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Config.User != nonroot || !slices.Equal(cfg.Config.Entrypoint, []string{"/bulkhead/one"}) ||
		!slices.Equal(cfg.Config.Cmd, []string{"serve"}) || cfg.OS != "linux" || cfg.Architecture != "amd64" {
		t.Errorf("config %+v", cfg)
	}
	var found []string
	for _, l := range layersOf(t, img) {
		content, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, list(t, content)...)
	}
	want := []string{"opt/", "opt/x/", "opt/x/two", "bulkhead/", "bulkhead/one"}
	if !slices.Equal(found, want) {
		t.Errorf("files %v, wanted %v", found, want)
	}
}

func layersOf(t *testing.T, img v1.Image) []v1.Layer {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	return layers
}

// list names a layer's entries and checks what is the same for all of them.
func list(t *testing.T, content io.ReadCloser) []string {
	t.Helper()
	defer content.Close()
	var found []string
	for r := tar.NewReader(content); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Mode != 0o755 || header.Uid != 0 || header.Gid != 0 || header.ModTime.Unix() != 0 {
			t.Errorf("header %+v", header)
		}
		found = append(found, header.Name)
	}
}

func TestRefusals(t *testing.T) {
	if _, err := choose([]string{"operator", "nothing"}); err == nil || !strings.Contains(err.Error(), `unknown image "nothing"`) {
		t.Errorf("unknown image: %v", err)
	}
	opts := module(t)
	missing := spec{name: "x", programs: []program{{source: "cmd/three", path: "/three"}}}
	if _, err := make1(t.Context(), opts, missing); err == nil || !strings.Contains(err.Error(), "cmd/three: this folder does not exist") {
		t.Errorf("missing folder: %v", err)
	}
	put(t, filepath.Join(opts.root, "cmd/one/main.go"), "package main\n\nfunc main() { undefined() }\n")
	if _, err := make1(t.Context(), opts, both); err == nil || !strings.Contains(err.Error(), "undefined: undefined") {
		t.Errorf("a program that doesn't compile: %v", err)
	}
	if _, err := os.Stat(filepath.Join(opts.out, "both.tar")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an archive was written: %v", err)
	}
}
