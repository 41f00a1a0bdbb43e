package isolation

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrVersion is returned when a wanted version of Envoy isn't on the node.
var ErrVersion = errors.New("no such version of Envoy")

var versionName = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$`)

// ErrVersionInUse is returned when a version to be removed is one that runs.
var ErrVersionInUse = errors.New("a proxy runs that version")

// isFetched tells versions that AddVersion brought from those of EnvoyDir.
func isFetched(version string) bool { return strings.Contains(version, "+") }

// versions copies Envoy to where it outlives the agent's image: by digest, so
// that a running process keeps exactly the file that it maps. Safe for
// concurrent use.
type versions struct {
	from, to string
	// digest reads a copy, and so has its pages charged to whom it runs as.
	digest func(tree string) (string, error)

	mu    sync.Mutex
	known map[string]knownVersion
}

// knownVersion is a copy that was read whole in this process's life.
type knownVersion struct {
	// source is nil when only the copy is left.
	source os.FileInfo
	tree   string
}

// tree returns the folder with the version, copied and read. Reading it is not
// only a check: the pages are then charged to no tenant.
func (v *versions) tree(version string) (string, error) {
	if !versionName.MatchString(version) {
		return "", fmt.Errorf("%w: %q is no version", ErrVersion, version)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	source := filepath.Join(v.from, version)
	info, err := os.Stat(filepath.Join(source, "envoy"))
	known, ok := v.known[version]
	if errors.Is(err, fs.ErrNotExist) {
		if ok {
			return known.tree, nil
		}
		return v.leftover(version)
	}
	if err != nil {
		return "", fmt.Errorf("find Envoy %s: %w", version, err)
	}
	if ok && known.source != nil && sameFile(known.source, info) {
		return known.tree, nil
	}
	tree, err := v.copy(version, source)
	if err != nil {
		return "", fmt.Errorf("copy Envoy %s: %w", version, err)
	}
	v.known[version] = knownVersion{info, tree}
	return tree, nil
}

func sameFile(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// leftover is a copy of a version that the agent's image no longer has: what runs
// must be able to restart until the plan says otherwise.
func (v *versions) leftover(version string) (string, error) {
	trees, err := filepath.Glob(filepath.Join(v.to, version+"-*"))
	if err != nil || len(trees) == 0 {
		return "", fmt.Errorf("%w: %s is not in %s; use an agent image that has it", ErrVersion, version, v.from)
	}
	for _, tree := range trees {
		if err := openFolders(tree); err != nil {
			return "", err
		}
		digest, err := v.digest(tree)
		if err == nil && filepath.Base(tree) == version+"-"+digest[:12] {
			v.known[version] = knownVersion{tree: tree}
			return tree, nil
		}
	}
	return "", fmt.Errorf("%w: %s is damaged in %s", ErrVersion, version, v.to)
}

func (v *versions) copy(version, source string) (string, error) {
	digest, err := treeDigest(source)
	if err != nil {
		return "", err
	}
	target := filepath.Join(v.to, version+"-"+digest[:12])
	if have, err := v.digest(target); err == nil && have == digest {
		return target, openFolders(target)
	}
	tmp, err := os.MkdirTemp(v.to, ".tmp-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := copyTree(source, tmp); err != nil {
		return "", err
	}
	if have, err := v.digest(tmp); err != nil || have != digest {
		return "", errors.Join(err, errors.New("the files changed meanwhile; try again"))
	}
	// A damaged copy goes away; whoever runs from it keeps its files.
	if err := os.RemoveAll(target); err != nil {
		return "", err
	}
	return target, os.Rename(tmp, target)
}

// prune removes copies that nothing runs from and that aren't the last of a
// version that the agent brings along.
func (v *versions) prune(used []string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	entries, err := os.ReadDir(v.to)
	if err != nil {
		return fmt.Errorf("look at copies of Envoy: %w", err)
	}
	var errs []error
	for _, e := range entries {
		tree := filepath.Join(v.to, e.Name())
		version := e.Name()
		if i := strings.LastIndex(version, "-"); i > 0 {
			version = version[:i]
		}
		_, err := os.Stat(filepath.Join(v.from, version, "envoy"))
		known, ok := v.known[version]
		// What was fetched goes when its owner says so.
		if slices.Contains(used, tree) || isFetched(version) || (err == nil && (!ok || known.tree == tree)) {
			continue
		}
		errs = append(errs, os.RemoveAll(tree))
	}
	return errors.Join(errs...)
}

// add takes a tree as the copy of a version.
func (v *versions) add(version, tree string) error {
	if !versionName.MatchString(version) || !isFetched(version) {
		return fmt.Errorf("%w: %q is no version that can be added", ErrVersion, version)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := openFolders(tree); err != nil {
		return err
	}
	digest, err := v.digest(tree)
	if err != nil {
		return err
	}
	target := filepath.Join(v.to, version+"-"+digest[:12])
	// Another copy goes; whoever runs from it keeps its files.
	if err := v.removeCopies(version); err != nil {
		return err
	}
	if err := os.Rename(tree, target); err != nil {
		return err
	}
	v.known[version] = knownVersion{tree: target}
	return nil
}

// remove removes an added version.
func (v *versions) remove(version string) error {
	if !versionName.MatchString(version) || !isFetched(version) {
		return fmt.Errorf("%w: %q is no version that was added", ErrVersion, version)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.removeCopies(version)
}

func (v *versions) removeCopies(version string) error {
	delete(v.known, version)
	trees, err := filepath.Glob(filepath.Join(v.to, version+"-*"))
	for _, tree := range trees {
		// A version's name may begin as another one's does.
		if len(tree) == len(filepath.Join(v.to, version))+13 {
			err = errors.Join(err, os.RemoveAll(tree))
		}
	}
	return err
}

// files are a tree's regular files, sorted. Anything else in it is refused.
func files(tree string) (paths []string, err error) {
	err = filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", path)
		}
		rel, err := filepath.Rel(tree, path)
		paths = append(paths, rel)
		return err
	})
	return paths, err
}

// treeDigest covers names and contents.
func treeDigest(tree string) (string, error) {
	paths, err := files(tree)
	if err != nil {
		return "", err
	}
	if !slices.Contains(paths, "envoy") {
		return "", fmt.Errorf("%s has no envoy: %w", tree, fs.ErrNotExist)
	}
	sum := sha256.New()
	for _, path := range paths {
		f, err := os.Open(filepath.Join(tree, path))
		if err != nil {
			return "", err
		}
		one := sha256.New()
		_, err = io.Copy(one, f)
		f.Close()
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%x %q\n", one.Sum(nil), path)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// copyTree copies regular files; tenants' uids must be able to read and run them.
func copyTree(source, target string) error {
	paths, err := files(source)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(target, path)), 0o755); err != nil {
			return err
		}
		if err := copyFile(filepath.Join(source, path), filepath.Join(target, path)); err != nil {
			return err
		}
	}
	return openFolders(target)
}

// openFolders lets tenants' uids into a copy's folders, whatever the umask was when they were
// made: former versions' own kept them out now and then, and the digest has no modes.
func openFolders(tree string) error {
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return os.Chmod(path, 0o755)
	})
}

func copyFile(source, target string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	err = errors.Join(err, out.Chmod(0o755), out.Sync())
	// Written pages are charged to this process; the next reader is to pay.
	if err == nil {
		err = dropCache(out)
	}
	return errors.Join(err, out.Close())
}

// dropCache drops a file's clean pages that nobody has mapped. On a tmpfs it does
// nothing.
func dropCache(f *os.File) error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("drop cache of %s: %w", f.Name(), err)
	}
	return nil
}
