package dist

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// searchDirs is where glibc's loader looks without any configuration. A library
// keeps its directory in the tree, since that is where its own loader looks.
var searchDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// needed returns the absolute paths of the loader and of every library that the
// binary needs, directly or through another, sorted.
func needed(binary string) ([]string, error) {
	loader, names, err := dynamic(binary)
	if err != nil {
		return nil, err
	}
	if loader == "" {
		return nil, nil
	}
	found := map[string]bool{loader: true}
	for len(names) > 0 {
		name := names[0]
		names = names[1:]
		if name == filepath.Base(loader) {
			continue
		}
		path, err := find(name)
		if err != nil {
			return nil, fmt.Errorf("resolve libraries of %s: %w", binary, err)
		}
		if found[path] {
			continue
		}
		found[path] = true
		_, more, err := dynamic(path)
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
	}
	var paths []string
	for path := range found {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths, nil
}

func find(name string) (string, error) {
	for _, dir := range searchDirs {
		path := filepath.Join(dir, name)
		_, err := os.Stat(path)
		if err == nil {
			return path, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("find %s: not in %s; this machine needs glibc for x86-64", name, strings.Join(searchDirs, ", "))
}

// dynamic reads what an ELF file asks of the loader.
func dynamic(path string) (loader string, libraries []string, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()
	for _, segment := range f.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		raw, err := io.ReadAll(segment.Open())
		if err != nil {
			return "", nil, fmt.Errorf("read loader of %s: %w", path, err)
		}
		loader = strings.TrimRight(string(raw), "\x00")
	}
	libraries, err = f.ImportedLibraries()
	if err != nil {
		return "", nil, fmt.Errorf("read libraries of %s: %w", path, err)
	}
	return loader, libraries, nil
}
