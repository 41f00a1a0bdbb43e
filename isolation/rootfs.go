package isolation

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Paths in a proxy's root.
const (
	rootEnvoy     = "/envoy"
	rootBootstrap = "/etc/envoy.json"
	rootXDS       = "/run/xds"
)

// buildRoot makes an empty, read-only root with Envoy's tree, the bootstrap, the
// folder of the xDS socket and the log, and nothing else: no /proc, no /sys, no
// devices. The calling thread has a mount namespace of its own.
func buildRoot(c initConfig) error {
	// Nothing that is mounted from here on shows outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root := c.Root
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=256k,nr_inodes=64,mode=0755"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, dir := range []string{"etc", "run/xds", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return fmt.Errorf("create root: %w", err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, rootBootstrap), c.Bootstrap, 0o444); err != nil {
		return fmt.Errorf("write bootstrap: %w", err)
	}
	entries, err := os.ReadDir(c.EnvoyTree)
	if err != nil {
		return fmt.Errorf("read Envoy's tree: %w", err)
	}
	for _, e := range entries {
		if err := bind(filepath.Join(c.EnvoyTree, e.Name()), filepath.Join(root, e.Name()), e.IsDir()); err != nil {
			return err
		}
	}
	if err := bind(c.XDSDir, filepath.Join(root, rootXDS), true); err != nil {
		return err
	}
	// Envoy's access log opens these by name.
	logs := []string{filepath.Join(root, "dev/stdout"), filepath.Join(root, "dev/stderr")}
	for _, log := range logs {
		if err := bind(c.Log, log, false); err != nil {
			return err
		}
	}
	readOnly := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(unix.AT_FDCWD, root, unix.AT_RECURSIVE, readOnly); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	for _, data := range append(logs, filepath.Join(root, rootXDS)) {
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOEXEC}
		if data != filepath.Join(root, rootXDS) {
			attr.Attr_clr = unix.MOUNT_ATTR_RDONLY
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, data, 0, attr); err != nil {
			return fmt.Errorf("set mount of %s: %w", data, err)
		}
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	// The old root is put over the new one and taken off again: no folder needed.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	return unix.Chdir("/")
}

// bind mounts source at target, which it creates.
func bind(source, target string, dir bool) error {
	var err error
	if dir {
		err = os.MkdirAll(target, 0o755)
	} else {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o444); err == nil {
			err = f.Close()
		}
	}
	if err == nil {
		err = unix.Mount(source, target, "", unix.MS_BIND, "")
	}
	if err != nil {
		return fmt.Errorf("bring %s into root: %w", source, err)
	}
	return nil
}
