// Package oci makes images out of files of this machine, without Docker. The same
// files give the same bytes.
package oci

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// File puts a file of this machine, Source, as an executable into a layer at Path.
type File struct {
	Source string
	Path   string
}

// layer is an uncompressed layer that is read from its files whenever it is
// needed, never held in memory: Envoy's are 100 MB each. Uncompressed, since
// the archive goes from this disk to a containerd on this machine.
type layer struct {
	files  []File
	digest v1.Hash
	size   int64
}

var _ v1.Layer = (*layer)(nil)

// NewLayer returns a layer of files. It reads them once for the digest; they must not change afterwards.
func NewLayer(files []File) (v1.Layer, error) {
	l := &layer{files: slices.Clone(files)}
	slices.SortFunc(l.files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	sum := sha256.New()
	counted := &countingWriter{w: sum}
	if err := l.write(counted); err != nil {
		return nil, err
	}
	l.digest = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	l.size = counted.n
	return l, nil
}

// write makes the tar: no times, no owners, sorted, so the same files always
// give the same bytes.
func (l *layer) write(w io.Writer) error {
	tw := tar.NewWriter(w)
	written := map[string]bool{}
	for _, f := range l.files {
		name := strings.TrimPrefix(f.Path, "/")
		for _, dir := range parents(name) {
			if written[dir] {
				continue
			}
			written[dir] = true
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
				return fmt.Errorf("write %s: %w", dir, err)
			}
		}
		if err := writeFile(tw, f.Source, name); err != nil {
			return fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	return tw.Close()
}

func writeFile(tw *tar.Writer, source, name string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: info.Size(), ModTime: time.Unix(0, 0)}
	if err := tw.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.Copy(tw, in)
	return err
}

// parents lists the directories above a relative path, the outermost first.
func parents(name string) []string {
	var dirs []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		dirs = append(dirs, dir)
	}
	slices.Reverse(dirs)
	return dirs
}

func (l *layer) open() (io.ReadCloser, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(l.write(w)) }()
	return r, nil
}

func (l *layer) Digest() (v1.Hash, error)             { return l.digest, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return l.digest, nil }
func (l *layer) Size() (int64, error)                 { return l.size, nil }
func (l *layer) Compressed() (io.ReadCloser, error)   { return l.open() }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return l.open() }
func (l *layer) MediaType() (types.MediaType, error)  { return types.DockerUncompressedLayer, nil }

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
