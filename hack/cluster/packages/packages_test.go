package packages

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestIsDebian(t *testing.T) {
	for osRelease, want := range map[string]bool{
		"PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\n": true,
		"ID=ubuntu\nID_LIKE=debian\n":                      true,
		"ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n":        true,
		"ID=\"fedora\"\nNAME=debian\n":                     false,
		"ID=notdebian\n":                                   false,
		"":                                                 false,
	} {
		if got := isDebian(osRelease); got != want {
			t.Errorf("%q: got %v, want %v", osRelease, got, want)
		}
	}
}

// script makes a command in the only directory of PATH.
func script(t *testing.T, dir, name, body string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestEnsure(t *testing.T) {
	packages := map[string]string{"x-have": "p0", "x-one": "p1", "x-two": "p1", "x-three": "p3"}
	// install makes the commands of p1, and logs how it was called; with no
	// lists it fails, as in a fresh container.
	const apt = `echo "$@" >>"$DIR/called"
case "$*" in
*update*)
  if [ -e "$DIR/outage" ]; then /bin/rm "$DIR/outage"; exit 100; fi
  : >"$DIR/lists" ;;
*"install --yes --no-install-recommends p1 p3")
  [ -e "$DIR/lists" ] || exit 100
  for c in $MAKES; do printf '#!/bin/sh\n' >"$DIR/$c"; /bin/chmod +x "$DIR/$c"; done ;;
*) exit 1 ;;
esac`
	before := pause
	pause = time.Millisecond
	t.Cleanup(func() { pause = before })
	for _, tc := range []struct {
		name, makes, wantErr string
		mayInstall, lists    bool
		outage               bool // of the mirror, when it is first asked
		calls                int
	}{
		{name: "may not install", wantErr: "missing commands: x-one, x-three, x-two; install them (Debian packages: p1 p3)"},
		{name: "installs", mayInstall: true, lists: true, makes: "x-one x-two x-three", calls: 1},
		{name: "updates first", mayInstall: true, makes: "x-one x-two x-three", calls: 3},
		{name: "updates again", mayInstall: true, outage: true, makes: "x-one x-two x-three", calls: 4},
		{name: "wrong package", mayInstall: true, lists: true, makes: "x-one x-two", calls: 1, wantErr: "still missing: x-three"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("PATH", dir)
			t.Setenv("DIR", dir)
			t.Setenv("MAKES", tc.makes)
			script(t, dir, "apt-get", apt)
			script(t, dir, "x-have", "")
			for file, is := range map[string]bool{"lists": tc.lists, "outage": tc.outage} {
				if !is {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, file), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			err := ensure(t.Context(), packages, t.Logf, tc.mayInstall)
			if tc.wantErr == "" && err != nil || tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)) {
				t.Errorf("got %v, want %q", err, tc.wantErr)
			}
			called, _ := os.ReadFile(filepath.Join(dir, "called"))
			if n := strings.Count(string(called), "\n"); n != tc.calls {
				t.Errorf("apt-get ran %d times, want %d:\n%s", n, tc.calls, called)
			}
			// What is there is not installed again.
			if tc.wantErr == "" {
				if err := ensure(t.Context(), packages, t.Logf, false); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
