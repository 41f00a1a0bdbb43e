package machine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Init is the machine's pid 1; args are the program's arguments after InitArg. It
// doesn't return.
func Init(args []string) {
	runtime.LockOSThread()
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		fmt.Fprintln(os.NewFile(4, "status"), strings.ReplaceAll(err.Error(), "\n", " "))
		os.Exit(1)
	}
	if os.Getpid() != 1 || len(args) == 0 {
		fail(errors.New("the machine's init is started by hack/cluster only"))
	}
	spec, err := readSpec(args[0])
	if err != nil {
		fail(err)
	}
	if len(args) == 1 {
		if err := enterCgroups(spec.Cgroup); err != nil {
			fail(err)
		}
		// A cgroup namespace belongs to the thread that made it; exec makes that
		// thread the only one.
		fail(unix.Exec("/proc/self/exe", []string{os.Args[0], InitArg, args[0], "2"}, os.Environ()))
	}
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	if err := leaveRootOfV2(spec.Cgroup); err != nil {
		fail(err)
	}
	if err := makeRoot(spec); err != nil {
		fail(err)
	}
	if err := unix.Sethostname([]byte(spec.Name)); err != nil {
		fail(fmt.Errorf("set hostname: %w", err))
	}
	if _, err := io.ReadFull(os.NewFile(3, "go"), make([]byte, 1)); err != nil {
		fail(fmt.Errorf("the program that started this machine is gone: %w", err))
	}
	if err := configure(spec); err != nil {
		fail(err)
	}
	s, err := newSupervisor(spec)
	if err != nil {
		fail(err)
	}
	fmt.Fprintln(os.NewFile(4, "status"), "ready")
	unix.Close(4)
	s.run()
	os.Exit(0)
}

// enterCgroups moves this process into the machine's cgroups and makes them the
// roots of what it sees.
func enterCgroups(name string) error {
	if name == "" {
		return nil
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := os.WriteFile(filepath.Join(h.Dir, name, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup namespace: %w", err)
	}
	return nil
}

// leaveRootOfV2 moves the init out of the machine's v2 root: a cgroup that has
// processes can't hand controllers to its children.
func leaveRootOfV2(name string) error {
	if name == "" {
		return nil
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if !h.V2 {
			continue
		}
		dir := filepath.Join(h.Dir, name, "init")
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup %s: %w", dir, err)
		}
		controllers, err := os.ReadFile(filepath.Join(h.Dir, name, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, c := range strings.Fields(string(controllers)) {
			if err := os.WriteFile(filepath.Join(h.Dir, name, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
				return fmt.Errorf("cgroup controller %s: %w", c, err)
			}
		}
	}
	return nil
}

// makeRoot gives the machine its file systems. Everything is mounted in this
// mount namespace alone and goes with it.
func makeRoot(spec Spec) error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if !spec.Root {
		if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return err
		}
		return mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "")
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	root := filepath.Join(spec.Dir, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := mount("root", root, "tmpfs", 0, "mode=755,size=64m"); err != nil {
		return err
	}
	in := func(path string) string { return filepath.Join(root, path) }
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc", "root", "var/log", "var/lib", "var/tmp"} {
		if err := os.MkdirAll(in(dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", in("/var/run")); err != nil {
		return err
	}
	if err := programs(root); err != nil {
		return err
	}
	for path, content := range spec.Files {
		if err := os.MkdirAll(filepath.Dir(in(path)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(in(path), []byte(content), 0o644); err != nil {
			return err
		}
	}
	if err := mount("/dev", in("/dev"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	for _, m := range []struct{ path, options string }{{"/run", "mode=755"}, {"/tmp", "mode=1777"}, {"/var/tmp", "mode=1777"}} {
		if err := mount("tmpfs", in(m.path), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, m.options); err != nil {
			return err
		}
	}
	for _, m := range append([]Mount{{Source: spec.LogDir(), Target: logDir(spec)}}, spec.Mounts...) {
		if err := bind(m, in(m.Target)); err != nil {
			return err
		}
	}
	if err := kernelFiles(root, all); err != nil {
		return err
	}
	old := in("/tmp/old")
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/tmp/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := os.Remove("/tmp/old"); err != nil {
		return err
	}
	// As on a node that systemd set up: volumes with mount propagation need it.
	return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// programs puts this machine's programs into the root, read-only.
func programs(root string) error {
	if err := bind(Mount{Source: "/usr", ReadOnly: true}, root+"/usr"); err != nil {
		return err
	}
	for _, dir := range []string{"/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32"} {
		target, err := os.Readlink(dir)
		switch {
		case err == nil:
			err = os.Symlink(target, root+dir)
		case errors.Is(err, os.ErrNotExist):
			err = nil
		case errors.Is(err, unix.EINVAL): // a directory: /usr isn't merged here
			err = bind(Mount{Source: dir, ReadOnly: true}, root+dir)
		}
		if err != nil {
			return err
		}
	}
	for _, path := range []string{"alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group",
		"nsswitch.conf", "protocols", "services", "iproute2", "ssl/certs"} {
		if _, err := os.Stat("/etc/" + path); err != nil {
			continue
		}
		if err := bind(Mount{Source: "/etc/" + path, ReadOnly: true}, root+"/etc/"+path); err != nil {
			return err
		}
	}
	return nil
}

// kernelFiles mounts the kernel's own file systems as the machine's namespaces
// show them.
func kernelFiles(root string, all []hierarchy) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := mount("proc", root+"/proc", "proc", flags, ""); err != nil {
		return err
	}
	if err := mount("sysfs", root+"/sys", "sysfs", flags, ""); err != nil {
		return err
	}
	if err := mount("bpf", root+"/sys/fs/bpf", "bpf", flags, "mode=700"); err != nil {
		return err
	}
	const cgroups = "/sys/fs/cgroup"
	if len(all) == 1 && all[0].V2 {
		return mount("cgroup2", root+cgroups, "cgroup2", flags, "")
	}
	if err := mount("tmpfs", root+cgroups, "tmpfs", flags, "mode=755"); err != nil {
		return err
	}
	for _, h := range all {
		dir := root + cgroups + "/" + filepath.Base(h.Dir)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		fstype := "cgroup"
		if h.V2 {
			fstype = "cgroup2"
		}
		if err := mount(fstype, dir, fstype, flags, h.Options); err != nil {
			return err
		}
	}
	return mount("", root+cgroups, "", unix.MS_REMOUNT|unix.MS_BIND|flags|unix.MS_RDONLY, "")
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s %s on %s: %w", fstype, source, target, err)
	}
	return nil
}

// bind mounts a directory or file, making what it is mounted on.
func bind(m Mount, target string) error {
	info, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(target), 0o755); err == nil {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := mount(m.Source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if !m.ReadOnly {
		return nil
	}
	return mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}
