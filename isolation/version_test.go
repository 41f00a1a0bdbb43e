package isolation

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Tenants' uids come into each folder of a copy, whether it was made under a umask or is a
// former version's that was.
func TestCopiesAreOpen(t *testing.T) {
	const version = "1.0.0"
	from, to := t.TempDir(), t.TempDir()
	lib := filepath.Join(from, version, "lib", "x86_64")
	if err := os.MkdirAll(lib, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(lib, "libc.so.6"), filepath.Join(from, version, "envoy")} {
		if err := os.WriteFile(path, []byte(path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree := func() string {
		t.Helper()
		v := &versions{from: from, to: to, digest: treeDigest, known: map[string]knownVersion{}} // an agent's
		tree, err := v.tree(version)
		if err != nil {
			t.Fatal(err)
		}
		if err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm() != 0o755 {
				t.Errorf("%s has mode %s", path, info.Mode())
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return tree
	}
	closeLib := func(tree string) {
		t.Helper()
		if err := os.Chmod(filepath.Join(tree, "lib"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	closeLib(tree())
	closeLib(tree())
	if err := os.RemoveAll(filepath.Join(from, version)); err != nil {
		t.Fatal(err)
	}
	tree() // of an image that no longer has it
}
