// Package packages makes sure that the commands that a cluster needs are
// installed on the machine that it runs on.
package packages

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// tries are how often the lists are updated for packages that can't be installed.
const tries = 3

// pause is how long it is to the second time; it grows.
var pause = 5 * time.Second

// sbin is where distributions put commands that PATH of a plain user lacks.
var sbin = []string{"/usr/local/sbin", "/usr/sbin", "/sbin"}

// Ensure makes sure that commands are there, in PATH or where commands
// for root are: packages gives the Debian package of each. On Debian and its
// descendants missing ones are installed if this process is root; elsewhere the
// error names all that are missing. log is told before something is installed,
// and may be nil.
func Ensure(ctx context.Context, packages map[string]string, log func(format string, args ...any)) error {
	osRelease, err := os.ReadFile("/etc/os-release")
	mayInstall := err == nil && isDebian(string(osRelease)) && os.Geteuid() == 0
	return ensure(ctx, packages, log, mayInstall)
}

func ensure(ctx context.Context, packages map[string]string, log func(format string, args ...any), mayInstall bool) error {
	absent := missing(packages)
	if len(absent) == 0 {
		return nil
	}
	names := packagesOf(packages, absent)
	hint := fmt.Errorf("missing commands: %s; install them (Debian packages: %s)", strings.Join(absent, ", "), strings.Join(names, " "))
	if !mayInstall {
		return hint
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		return hint
	}
	if log != nil {
		log("installing %s", strings.Join(names, " "))
	}
	// The lists of a fresh container are empty, those of a machine mostly
	// good enough: update them only if they are not.
	install := append([]string{"install", "--yes", "--no-install-recommends"}, names...)
	first := run(ctx, apt, install...)
	for try := 1; first != nil; try++ {
		err := run(ctx, apt, "update")
		if err == nil {
			err = run(ctx, apt, install...)
		}
		if err == nil {
			break
		}
		// A mirror that is being changed has lists of what it doesn't have.
		if try == tries || ctx.Err() != nil {
			return fmt.Errorf("%w: %w", hint, errors.Join(first, err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause * time.Duration(try)):
		}
	}
	if absent := missing(packages); len(absent) > 0 {
		return fmt.Errorf("installed %s, but these commands are still missing: %s", strings.Join(names, " "), strings.Join(absent, ", "))
	}
	return nil
}

// missing returns the commands that are not there, sorted.
func missing(packages map[string]string) []string {
	var absent []string
	for _, command := range slices.Sorted(maps.Keys(packages)) {
		if !found(command) {
			absent = append(absent, command)
		}
	}
	return absent
}

func found(command string) bool {
	if _, err := exec.LookPath(command); err == nil {
		return true
	}
	return slices.ContainsFunc(sbin, func(dir string) bool {
		_, err := exec.LookPath(filepath.Join(dir, command))
		return err == nil
	})
}

// packagesOf returns the packages of commands, sorted, each once.
func packagesOf(packages map[string]string, commands []string) []string {
	var names []string
	for _, c := range commands {
		names = append(names, packages[c])
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// isDebian tells whether os-release(5) is that of Debian or a descendant.
func isDebian(osRelease string) bool {
	for line := range strings.Lines(osRelease) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if key != "ID" && key != "ID_LIKE" {
			continue
		}
		for id := range strings.FieldsSeq(strings.Trim(value, `"'`)) {
			if id == "debian" || id == "ubuntu" {
				return true
			}
		}
	}
	return false
}

func run(ctx context.Context, apt string, args ...string) error {
	// Another apt may be at work, such as unattended upgrades.
	cmd := exec.CommandContext(ctx, apt, append([]string{"-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=5"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	// Killed midway it would leave packages half configured.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("apt-get %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}
