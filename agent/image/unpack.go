package image

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// unpack writes the image's files. Each layer is read to its end and must be what
// its digest, which the configuration's digest covers, says.
func (p puller) unpack(img v1.Image, dir string) error {
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tree{root: root, reserve: p.reserve}
	for i, l := range layers {
		if err := t.layer(l, config.RootFS.DiffIDs[i]); err != nil {
			return err
		}
	}
	info, err := root.Lstat("envoy")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%w: it has no file /envoy", ErrInvalid)
	}
	return err
}

// tree is what is unpacked so far. Names can't lead out of root.
type tree struct {
	root    *os.Root
	reserve uint64
	entries int
	size    int64
}

// layer brings a layer here whole, which its digest is checked with, and only then
// looks at what is in it.
func (t *tree) layer(l v1.Layer, want v1.Hash) error {
	f, err := t.download(l)
	if err != nil {
		return fmt.Errorf("fetch layer %s: %w", want, err)
	}
	defer f.Close()
	content := bufio.NewReader(f)
	var plain io.Reader = content
	if magic, err := content.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		if plain, err = gzip.NewReader(content); err != nil {
			return fmt.Errorf("%w: layer %s: %w", ErrInvalid, want, err)
		}
	}
	sum := sha256.New()
	// Zeroes compress well: what comes out is bounded, whatever the manifest says.
	bounded := &io.LimitedReader{R: plain, N: 2*maxTree - t.size}
	all := io.TeeReader(bounded, sum)
	readErr := t.files(tar.NewReader(all))
	if readErr == nil {
		// What is behind the archive's end counts as well.
		_, readErr = io.Copy(io.Discard, all)
	}
	if bounded.N <= 0 {
		return fmt.Errorf("%w: it has more than %d bytes", ErrInvalid, maxTree)
	}
	if readErr != nil {
		return readErr
	}
	if got := hex.EncodeToString(sum.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return fmt.Errorf("%w: layer %s is sha256:%s", ErrTampered, want, got)
	}
	return nil
}

// download writes a layer as it comes to a file without a name.
func (t *tree) download(l v1.Layer) (*os.File, error) {
	size, err := l.Size()
	if err != nil {
		return nil, err
	}
	if err := t.room(size); err != nil {
		return nil, err
	}
	in, err := l.Compressed() // ends with an error unless it is what its digest says
	if err != nil {
		return nil, err
	}
	defer in.Close()
	fd, err := unix.Open(t.root.Name(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make a file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "layer")
	_, err = io.Copy(f, io.LimitReader(in, maxTree+1))
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (t *tree) files(in *tar.Reader) error {
	for {
		h, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: read layer: %w", ErrInvalid, err)
		}
		if t.entries++; t.entries > maxEntries {
			return fmt.Errorf("%w: it has more than %d files", ErrInvalid, maxEntries)
		}
		name := path.Clean(h.Name)
		switch {
		case !filepath.IsLocal(name):
			return fmt.Errorf("%w: %.128q leads out of the image", ErrInvalid, h.Name)
		case strings.Count(name, "/") > maxDepth:
			return fmt.Errorf("%w: %.128q is in more than %d folders", ErrInvalid, h.Name, maxDepth)
		case strings.HasPrefix(path.Base(name), ".wh."):
			return fmt.Errorf("%w: %.128q removes a file of another layer: build it in one", ErrInvalid, h.Name)
		case h.Typeflag == tar.TypeDir:
			err = t.root.MkdirAll(name, 0o755)
		case h.Typeflag == tar.TypeReg:
			err = t.file(name, h.Size, in)
		default:
			return fmt.Errorf("%w: %.128q is no regular file", ErrInvalid, h.Name)
		}
		if err != nil {
			return err
		}
	}
}

// file writes one. Owner and mode of the archive are of no interest: all of it can
// be run by all, and nothing as somebody else.
func (t *tree) file(name string, size int64, in io.Reader) error {
	if t.size += size; t.size > maxTree {
		return fmt.Errorf("%w: it has more than %d bytes", ErrInvalid, maxTree)
	}
	if err := t.room(size); err != nil {
		return err
	}
	if err := t.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	// A later layer's file takes the place of an earlier one's.
	if err := t.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := t.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, in)
	err = errors.Join(err, f.Chmod(0o755), f.Sync())
	if err == nil {
		// The pages are charged to whom reads them next, which is none of the agent's.
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	return errors.Join(err, f.Close())
}

// room reports whether size more bytes leave the node's disk its reserve.
func (t *tree) room(size int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(t.root.Name(), &s); err != nil {
		return fmt.Errorf("look at the disk: %w", err)
	}
	if free := s.Bavail * uint64(s.Bsize); free < uint64(size)+t.reserve {
		return fmt.Errorf("%w: %d MiB are free, %d MiB are to stay free", ErrDiskFull, free>>20, t.reserve>>20)
	}
	return nil
}
