// Command images builds the project's container images without Docker and
// writes one archive each, which containerd, Docker and skopeo can read:
//
//	go run ./hack/images                  # all
//	go run ./hack/images operator agent
//	go run ./hack/images --out DIR --tag v0.1.0
//
// The same sources give the same bytes, and an archive that already holds them
// is left alone. One line per image is printed: name, image ID, archive.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

// options is what the flags say.
type options struct {
	// root is the module's directory.
	root string
	// out is the directory of the archives; default out/images in the module.
	out string
	// repository is what image names start with, without a slash at the end.
	repository string
	tag        string
}

func main() {
	var opts options
	flag.StringVar(&opts.out, "out", "", "directory for the archives (default out/images in the repository)")
	flag.StringVar(&opts.repository, "repository", "ghcr.io/bulkhead-mesh", "what the images' names start with")
	flag.StringVar(&opts.tag, "tag", "dev", "tag of the images")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: images [flags] [%s]…\n", strings.Join(names(), "|"))
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, opts, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, opts options, wanted []string) error {
	specs, err := choose(wanted)
	if err != nil {
		return err
	}
	if opts.root, err = moduleRoot(ctx); err != nil {
		return err
	}
	if opts.out == "" {
		opts.out = filepath.Join(opts.root, "out", "images")
	}
	if err := os.MkdirAll(opts.out, 0o755); err != nil {
		return fmt.Errorf("create %s: %w", opts.out, err)
	}
	for _, s := range specs {
		result, err := make1(ctx, opts, s)
		if err != nil {
			return fmt.Errorf("make image %s: %w", s.name, err)
		}
		fmt.Println(result)
	}
	return nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find module with go list: %w; run it in the repository", err)
	}
	return strings.TrimSpace(string(out)), nil
}
