package oci

import (
	"context"
	"fmt"
	"path"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// EnvoyFiles are Envoy and its libraries below a folder.
func EnvoyFiles(envoy dist.Envoy, folder string) []File {
	files := []File{{envoy.Binary, path.Join(folder, dist.BinaryName)}}
	for _, library := range envoy.Libraries {
		files = append(files, File{filepath.Join(envoy.Dir, library), path.Join(folder, library)})
	}
	return files
}

// Proxy is an image as agents fetch it: a pinned Envoy, with its libraries, and
// nothing else.
func Proxy(ctx context.Context, version string) (v1.Image, error) {
	envoy, err := dist.Fetch(ctx, version)
	if err != nil {
		return nil, err
	}
	return ProxyOf(version, EnvoyFiles(envoy, "/"))
}

// ProxyOf is an image that says it is an Envoy of that version.
func ProxyOf(version string, files []File) (v1.Image, error) {
	l, err := NewLayer(files)
	if err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, fmt.Errorf("append layer: %w", err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = runtime.GOOS, runtime.GOARCH
	config.Config.Labels = map[string]string{"org.opencontainers.image.version": version}
	config.Config.Entrypoint = []string{"/" + dist.BinaryName}
	return mutate.ConfigFile(img, config)
}
