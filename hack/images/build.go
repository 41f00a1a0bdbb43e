package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/hack/images/oci"
)

const envoyDir = "/opt/bulkhead/envoy"

// make1 builds one image and returns the line that tells of it.
func make1(ctx context.Context, opts options, s spec) (string, error) {
	tag, err := name.NewTag(cmp.Or(s.reference, opts.repository+"/"+s.name+":"+opts.tag))
	if err != nil {
		return "", err
	}
	img, err := assemble(ctx, opts, s)
	if err != nil {
		return "", err
	}
	id, err := img.ConfigName()
	if err != nil {
		return "", err
	}
	archive := filepath.Join(opts.out, s.name+".tar")
	changed, err := save(archive, tag, img)
	if err != nil {
		return "", err
	}
	state := "unchanged"
	if changed {
		state = "written"
	}
	return fmt.Sprintf("%s %s %s %s", tag, id, archive, state), nil
}

func assemble(ctx context.Context, opts options, s spec) (v1.Image, error) {
	if s.proxy != "" {
		return oci.Proxy(ctx, s.proxy)
	}
	var layers []v1.Layer
	if s.envoy {
		for _, version := range dist.Versions() {
			l, err := envoyLayer(ctx, version)
			if err != nil {
				return nil, err
			}
			layers = append(layers, l)
		}
	}
	for _, p := range s.programs {
		binary, err := compile(ctx, opts, p)
		if err != nil {
			return nil, err
		}
		l, err := oci.NewLayer([]oci.File{{Source: binary, Path: p.path}})
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	if len(s.files) > 0 {
		var files []oci.File
		for _, f := range s.files {
			dir, err := moduleDir(ctx, filepath.Join(opts.root, f.module), f.of)
			if err != nil {
				return nil, err
			}
			files = append(files, oci.File{Source: filepath.Join(dir, f.source), Path: f.path})
		}
		l, err := oci.NewLayer(files)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, fmt.Errorf("append layers: %w", err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Config = s.config()
	return mutate.ConfigFile(img, cfg)
}

func envoyLayer(ctx context.Context, version string) (v1.Layer, error) {
	envoy, err := dist.Fetch(ctx, version)
	if err != nil {
		return nil, err
	}
	return oci.NewLayer(oci.EnvoyFiles(envoy, path.Join(envoyDir, version)))
}

// compile builds a static binary that depends on its sources alone: no paths of
// this machine, no state of git, no C compiler. Go itself skips what is fresh.
func compile(ctx context.Context, opts options, p program) (string, error) {
	pkg := p.source
	if p.module == "" {
		pkg = "./" + p.source
		if _, err := os.Stat(filepath.Join(opts.root, p.source)); errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("compile %s: this folder does not exist in %s", p.source, opts.root)
		}
	}
	binary := filepath.Join(opts.out, "bin", path.Base(p.path))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w -X main.version="+opts.tag, "-o", binary, pkg)
	cmd.Dir = filepath.Join(opts.root, p.module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile %s: %w\n%s", p.source, err, bytes.TrimSpace(out))
	}
	return binary, nil
}

// moduleDir is where the files of a module are that the one in dir needs.
func moduleDir(ctx context.Context, dir, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find module %s in %s: %w", module, dir, err)
	}
	if strings.TrimSpace(string(out)) == "" {
		return "", fmt.Errorf("find module %s in %s: it isn't there; run go mod download", module, dir)
	}
	return strings.TrimSpace(string(out)), nil
}

// save writes the archive, whole or not at all, unless it holds this very image.
func save(archive string, tag name.Tag, img v1.Image) (changed bool, err error) {
	same, err := holds(archive, tag, img)
	if err != nil || same {
		return false, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(archive), ".tmp-")
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if err := tarball.Write(tag, img, tmp); err != nil {
		return false, fmt.Errorf("write archive: %w", err)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return false, err
	}
	if err := tmp.Close(); err != nil {
		return false, err
	}
	return true, os.Rename(tmp.Name(), archive)
}

// holds compares the archive's image ID, a digest of everything in the image.
func holds(archive string, tag name.Tag, img v1.Image) (bool, error) {
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(archive) })
	if err != nil {
		// Missing or not one of ours: either way it is written anew.
		return false, nil
	}
	id, err := img.ConfigName()
	if err != nil {
		return false, err
	}
	return len(manifest) == 1 && manifest[0].Config == id.String() &&
		len(manifest[0].RepoTags) == 1 && manifest[0].RepoTags[0] == tag.String(), nil
}
