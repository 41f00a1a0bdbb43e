package build

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// goFlags replaces what the user has set: it must not change what is built.
const goFlags = "-mod=readonly -buildvcs=false"

// cacheKeys returns a directory name for each group, and one for all, that
// change with everything that the programs are made of and by.
func cacheKeys(root string, groups []group) (keys []string, all string, err error) {
	for _, g := range groups {
		key, err := g.key(root, runtime.Version(), runtime.GOARCH)
		if err != nil {
			return nil, "", err
		}
		keys = append(keys, key)
	}
	return keys, digest(strings.Join(keys, "\n")), nil
}

// key names the programs of g built from the tree at root by a version of Go
// for an architecture.
func (g group) key(root, goVersion, arch string) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\n%s\n%q\n", goVersion, arch, goFlags, g.stamps)
	for _, p := range g.programs {
		fmt.Fprintf(&b, "%s %s\n", p.name, p.pkg)
	}
	files := slices.Clone(g.sources)
	if files == nil {
		err := fs.WalkDir(os.DirFS(root), g.dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			return "", fmt.Errorf("list what %s is built from: %w", g.name, err)
		}
	}
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(root, f))
		if err != nil {
			return "", fmt.Errorf("read what %s is built from: %w", g.name, err)
		}
		fmt.Fprintf(&b, "%s %x\n", f, sha256.Sum256(data))
	}
	return g.name + "-" + digest(b.String()), nil
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
