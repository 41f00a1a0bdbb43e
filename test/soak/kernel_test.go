package soak

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// kernel is an unpacked one of Debian's.
type kernel struct {
	release, image, dir string
	// modules in the order in which they can be loaded.
	modules []string
	// cmdline is added to the kernel's.
	cmdline string
}

// Newest first: the first that apt has is taken. All that isolation needs is in
// each; bpf needs 6.6.
var kernelPackages = []string{"linux-image-6.12-amd64", "linux-image-amd64"}

// wantedModules are what a guest needs beside what is built in; crc32c is only
// asked for when libcrc32c starts.
var wantedModules = []string{"crc32c_generic", "virtio_pci", "virtio_rng", "9pnet_virtio", "9p", "overlay", "veth", "nf_tables"}

// fetchKernel downloads a kernel once, into the cache, and installs nothing.
func fetchKernel(t *testing.T) kernel {
	t.Helper()
	pkg := kernelPackage(t)
	cache := os.Getenv("BULKHEAD_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		check(t, err)
		cache = filepath.Join(user, "bulkhead")
	}
	k := kernel{release: strings.TrimPrefix(pkg, "linux-image-"), dir: filepath.Join(cache, "soak", pkg)}
	k.image = filepath.Join(k.dir, "vmlinuz")
	if _, err := os.Stat(k.image); errors.Is(err, fs.ErrNotExist) {
		unpackKernel(t, pkg, k)
	}
	order := map[string]bool{}
	for _, name := range wantedModules {
		k.load(t, strings.ReplaceAll(name, "-", "_"), order)
	}
	return k
}

// kernelPackage is the package that the newest of kernelPackages stands for.
func kernelPackage(t *testing.T) string {
	t.Helper()
	for _, meta := range kernelPackages {
		out, err := exec.CommandContext(t.Context(), "apt-cache", "depends", meta).Output()
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(out)) {
			if pkg, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
				return "linux-image-" + pkg
			}
		}
	}
	t.Fatalf("apt knows none of %q: is this Debian 12 or newer, and was there an apt-get update?", kernelPackages)
	return ""
}

func unpackKernel(t *testing.T, pkg string, k kernel) {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf(`set -e
apt-get download %[1]s >/dev/null 2>&1
dpkg-deb --fsys-tarfile *.deb | tar x --wildcards './boot/vmlinuz*' './lib/modules/*.ko.xz'
find lib/modules -name '*.ko.xz' | while read f; do n=$(basename $f .ko.xz); mv $f $(echo $n | tr - _).ko.xz; done
mv boot/vmlinuz-* vmlinuz
rm -rf *.deb boot lib`, pkg)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("download %s: %v: %s", pkg, err, out)
	}
	check(t, os.MkdirAll(filepath.Dir(k.dir), 0o755))
	check(t, os.RemoveAll(k.dir))
	if out, err := exec.CommandContext(t.Context(), "cp", "-r", dir, k.dir).CombinedOutput(); err != nil {
		t.Fatalf("keep %s: %v: %s", pkg, err, out)
	}
}

// load adds a module after those that it depends on. One that has no file is built
// in.
func (k *kernel) load(t *testing.T, name string, seen map[string]bool) {
	t.Helper()
	if seen[name] {
		return
	}
	seen[name] = true
	path := filepath.Join(k.dir, name+".ko")
	if _, err := os.Stat(path + ".xz"); err != nil {
		return
	}
	if _, err := os.Stat(path); err != nil {
		out, err := exec.CommandContext(t.Context(), "xz", "-dc", path+".xz").Output()
		check(t, err)
		check(t, os.WriteFile(path, out, 0o644))
	}
	f, err := elf.Open(path)
	check(t, err)
	defer f.Close()
	info, err := f.Section(".modinfo").Data()
	check(t, err)
	for _, field := range strings.Split(string(info), "\x00") {
		if depends, ok := strings.CutPrefix(field, "depends="); ok && depends != "" {
			for _, on := range strings.Split(depends, ",") {
				k.load(t, strings.ReplaceAll(on, "-", "_"), seen)
			}
		}
	}
	if !slices.Contains(k.modules, name) {
		k.modules = append(k.modules, name)
	}
}
