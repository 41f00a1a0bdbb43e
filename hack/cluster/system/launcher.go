package system

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// launcherName is the name under which this program's executable is the
// launcher of a daemon.
const launcherName = "bulkhead-cluster-launcher"

// launch is what the launcher is told through its gate.
type launch struct {
	Path       string
	Args       []string
	Dir        string
	Cgroups    []string
	Namespaces []string
}

// Descriptors of the launcher.
const (
	gateFD   = 3 // a launch in JSON comes in, or an end without one
	statusFD = 4 // an error goes out; closed without one by executing
)

// Every program that imports this package can start daemons, and so must be
// able to be their launcher and the keeper of their logs.
func init() {
	if len(os.Args) == 0 {
		return
	}
	switch os.Args[0] {
	case launcherName:
		launcher()
	case logKeeperName:
		logKeeper()
	}
}

// launcher waits for its launch and becomes the daemon. It does not return.
func launcher() {
	unix.CloseOnExec(gateFD)
	unix.CloseOnExec(statusFD)
	// Namespaces and the execution belong to one thread.
	runtime.LockOSThread()
	var l launch
	if err := json.NewDecoder(os.NewFile(gateFD, "gate")).Decode(&l); err != nil {
		os.Exit(1) // who should tell has died
	}
	fmt.Fprint(os.NewFile(statusFD, "status"), l.exec())
	os.Exit(1)
}

// exec returns only an error.
func (l launch) exec() error {
	for _, dir := range l.Cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	if err := enter(l.Namespaces); err != nil {
		return err
	}
	if err := os.Chdir(l.Dir); err != nil {
		return fmt.Errorf("enter working directory: %w", err)
	}
	if err := unix.Exec(l.Path, append([]string{l.Path}, l.Args...), os.Environ()); err != nil {
		return fmt.Errorf("execute %s: %w", l.Path, err)
	}
	return nil
}

// enter moves this thread to namespaces.
func enter(paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	// All are opened first: in another mount namespace paths mean other files.
	var files []*os.File
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		defer f.Close()
		files = append(files, f)
	}
	// A thread that shares its root and working directory with others may not
	// change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("prepare to enter namespaces: %w", err)
	}
	for _, f := range files {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("enter namespace %s: %w", f.Name(), err)
		}
	}
	return nil
}
