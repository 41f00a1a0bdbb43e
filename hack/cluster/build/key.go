package build

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
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
	fmt.Fprintf(&b, "%s\n%s\n%s\n%q\n%q\n%q\n", goVersion, arch, goFlags, g.module, g.version, g.stamps)
	for _, p := range g.programs {
		fmt.Fprintf(&b, "%s %s\n", p.name, p.pkg)
	}
	files := []string{}
	if g.module != "" {
		files = append(files, filepath.Join(g.dir(root), "go.mod"), filepath.Join(g.dir(root), "go.sum"))
	}
	for _, s := range g.sources {
		files = append(files, filepath.Join(root, s))
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return "", fmt.Errorf("read what %s is built from: %w", g.title(), err)
		}
		fmt.Fprintf(&b, "%s %x\n", filepath.Base(f), sha256.Sum256(data))
	}
	name := g.name
	if g.version != "" {
		name += "-" + strings.TrimPrefix(g.version, "v")
	}
	return name + "-" + digest(b.String()), nil
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
