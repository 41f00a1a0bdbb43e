package soak

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ended is what a guest says last, with the command's exit status.
const ended = "soak: the command ended with "

// guest is process 1 of the virtual machine. It ends with the machine.
func guest() {
	if err := runGuest(); err != nil {
		fmt.Println("soak: the machine isn't as it should be:", err)
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func runGuest() error {
	data, err := os.ReadFile("/order.json")
	if err != nil {
		return err
	}
	var o order
	if err := json.Unmarshal(data, &o); err != nil {
		return err
	}
	for _, name := range o.Modules {
		if err := loadModule("/modules/" + name + ".ko"); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	if err := enterRoot(); err != nil {
		return err
	}
	if lo, err := netlink.LinkByName("lo"); err != nil || netlink.LinkSetUp(lo) != nil {
		return fmt.Errorf("no loopback: %v", err)
	}
	if o.Systemd {
		return becomeSystemd(o)
	}
	if err := mountCgroups(); err != nil {
		return err
	}
	cmd := exec.Command(o.Command[0], o.Command[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = o.Dir, o.Env, os.Stdout, os.Stdout
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	fmt.Printf("%s%d\n", ended, cmd.ProcessState.ExitCode())
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// enterRoot makes the outer machine's root this one's: it is read, and what is
// written stays here.
func enterRoot() error {
	for _, m := range []struct {
		source, target, kind, options string
		flags                         uintptr
	}{
		{"host", "/host", "9p", "trans=virtio,version=9p2000.L,msize=524288,cache=loose", unix.MS_RDONLY},
		{"tmpfs", "/writes", "tmpfs", "mode=0755", 0},
		{"overlay", "/root", "overlay", "lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work", 0},
		{"proc", "/root/proc", "proc", "", 0}, {"sysfs", "/root/sys", "sysfs", "", 0}, {"devtmpfs", "/root/dev", "devtmpfs", "", 0},
		{"tmpfs", "/root/tmp", "tmpfs", "mode=1777", 0}, {"tmpfs", "/root/run", "tmpfs", "mode=0755", 0},
		{"bpf", "/root/sys/fs/bpf", "bpf", "", 0},
	} {
		os.MkdirAll(m.target, 0o755)
		if m.kind == "overlay" {
			os.Mkdir("/writes/upper", 0o755)
			os.Mkdir("/writes/work", 0o755)
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	// Not chroot alone: nobody can pivot away from a root that isn't a mount.
	if err := unix.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount("/root", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("soak")); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// mountCgroups mounts version 2, with this process in a cgroup of its own, as on a
// machine that is in use.
func mountCgroups() error {
	const root = "/sys/fs/cgroup"
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroups: %w", err)
	}
	if err := os.Mkdir(filepath.Join(root, "init"), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "init", "cgroup.procs"), []byte("1"), 0)
}

// becomeSystemd has systemd start the command as a service, and end the machine
// after it.
func becomeSystemd(o order) error {
	unit := "[Unit]\nDefaultDependencies=no\nAfter=systemd-journald.socket\n[Service]\nType=oneshot\nStandardOutput=file:/dev/ttyS0\nStandardError=file:/dev/ttyS0\n" +
		"WorkingDirectory=" + o.Dir + "\n"
	for _, e := range o.Env {
		unit += fmt.Sprintf("Environment=%q\n", e)
	}
	unit += "ExecStart=/bin/sh -c '\"$0\" \"$@\"; echo \"" + ended + "$?\"'"
	for _, arg := range o.Command {
		unit += fmt.Sprintf(" %q", strings.ReplaceAll(strings.ReplaceAll(arg, "$", "$$"), "%", "%%"))
	}
	unit = strings.ReplaceAll(unit, `"$0" "$@"`, `"$$0" "$$@"`)
	unit = strings.ReplaceAll(unit, `$?`, `$$?`)
	unit += "\nExecStopPost=/bin/systemctl --no-block poweroff --force --force\n"
	if err := os.WriteFile("/run/soak.service", []byte(unit), 0o644); err != nil {
		return err
	}
	if err := os.MkdirAll("/run/systemd/system", 0o755); err != nil {
		return err
	}
	if err := os.Rename("/run/soak.service", "/run/systemd/system/soak.service"); err != nil {
		return err
	}
	return unix.Exec("/lib/systemd/systemd", []string{"systemd", "--unit=soak.service", "--log-level=warning", "--show-status=no"}, []string{"container=", "TERM=dumb"})
}
