package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// The versions stand in versions.go and in the programs' go.mod: they must agree.
func TestModuleAgreesWithVersions(t *testing.T) {
	g := groups[0]
	mod, err := os.ReadFile("programs/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for module, version := range g.versions {
		if want := regexp.MustCompile(`(?m)^(require |\t)` + regexp.QuoteMeta(module+" "+version) + `$`); !want.Match(mod) {
			t.Errorf("go.mod does not require %s %s itself", module, version)
		}
	}
	for _, s := range g.stamps {
		variable, value, _ := strings.Cut(s, "=")
		want := ""
		switch {
		case strings.HasPrefix(variable, "github.com/containerd/"):
			want = g.versions["github.com/containerd/containerd/v2"]
		case strings.HasPrefix(variable, "github.com/containernetworking/"):
			want = g.versions["github.com/containernetworking/plugins"]
		case strings.HasSuffix(variable, ".gitVersion"):
			want = g.versions["k8s.io/kubernetes"]
		}
		if want != "" && value != want {
			t.Errorf("stamped %s, built from %s", s, want)
		}
	}
	file, err := parser.ParseFile(token.NewFileSet(), "programs/tools.go", nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var imported, built []string
	for _, i := range file.Imports {
		path, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		imported = append(imported, path)
	}
	for _, p := range g.programs {
		if !strings.HasPrefix(p.pkg, programsModule) {
			built = append(built, p.pkg)
		}
	}
	slices.Sort(imported)
	slices.Sort(built)
	if !slices.Equal(imported, built) {
		t.Errorf("tools.go imports %q, built are %q", imported, built)
	}
}

func TestKeyChangesWithWhatIsBuilt(t *testing.T) {
	base := func() group {
		return group{name: "g-1.2.3", dir: "programs", stamps: []string{"a.b=c"}, programs: []program{{"p", "example.com/g/p"}}}
	}
	key := func(t *testing.T, g group, mod, sum, goVersion, arch string) string {
		t.Helper()
		root := t.TempDir()
		dir := filepath.Join(root, g.dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string]string{"go.mod": mod, "go.sum": sum} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		k, err := g.key(root, goVersion, arch)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key(t, base(), "m", "s", "go1", "amd64")
	if !strings.HasPrefix(first, "g-1.2.3-") {
		t.Errorf("key %q does not begin with name and version", first)
	}
	if again := key(t, base(), "m", "s", "go1", "amd64"); again != first {
		t.Errorf("the same in another tree has key %q, want %q", again, first)
	}
	version, stamps, programs := base(), base(), base()
	version.name = "g-1.2.4"
	stamps.stamps = nil
	programs.programs = append(programs.programs, program{"q", "example.com/g/q"})
	for what, got := range map[string]string{
		"version":  key(t, version, "m", "s", "go1", "amd64"),
		"stamps":   key(t, stamps, "m", "s", "go1", "amd64"),
		"programs": key(t, programs, "m", "s", "go1", "amd64"),
		"go.mod":   key(t, base(), "m2", "s", "go1", "amd64"),
		"go.sum":   key(t, base(), "m", "s2", "go1", "amd64"),
		"go":       key(t, base(), "m", "s", "go2", "amd64"),
		"arch":     key(t, base(), "m", "s", "go1", "arm64"),
	} {
		if got == first {
			t.Errorf("key does not change with %s", what)
		}
	}
}

// fake is a cache whose programs are files that say what they are.
func fake(t *testing.T, dir string, compiled *atomic.Int32) (cache, []group) {
	t.Helper()
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "src"), []byte("source"), 0o644); err != nil {
		t.Fatal(err)
	}
	groups := []group{
		{name: "one", sources: []string{"src"}, programs: []program{{"a", "x/a"}, {"alias", "x/a"}, {"sub/b", "x/b/v2"}}},
		{name: "two", sources: []string{"src"}, programs: []program{{"c", "x/c"}}},
	}
	return cache{dir: dir, root: root, log: t.Logf, compile: func(_ context.Context, _ string, g group, dir, _ string) error {
		compiled.Add(1)
		for _, p := range g.programs {
			if err := os.WriteFile(filepath.Join(dir, executable(p.pkg)), []byte(p.pkg), 0o755); err != nil {
				return err
			}
		}
		return nil
	}}, groups
}

func TestEnsureBuildsOnceForAll(t *testing.T) {
	var compiled atomic.Int32
	c, groups := fake(t, t.TempDir(), &compiled)
	var wg sync.WaitGroup
	dirs := make([]string, 4)
	for i := range dirs {
		wg.Go(func() {
			b, err := c.ensure(t.Context(), groups)
			if err != nil {
				t.Error(err)
			}
			dirs[i] = b.Dir
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	if n := compiled.Load(); n != 2 {
		t.Errorf("compiled %d times, want once each group", n)
	}
	for _, dir := range dirs {
		if dir != dirs[0] {
			t.Errorf("directories %q differ", dirs)
		}
	}
	data, err := os.ReadFile(Binaries{Dir: dirs[0]}.Path("sub/b"))
	if err != nil || string(data) != "x/b/v2" {
		t.Errorf("sub/b is %q, %v", data, err)
	}
	if _, err := os.Stat(filepath.Join(c.dir, "tmp")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the build left its directory: %v", err)
	}
}

func TestEnsureTakesUpAfterAnyInterruption(t *testing.T) {
	var compiled atomic.Int32
	c, groups := fake(t, t.TempDir(), &compiled)
	// A build that ended midway keeps the finished group and nothing else.
	whole := c.compile
	c.compile = func(ctx context.Context, root string, g group, dir, tmp string) error {
		if g.name == "two" {
			return fmt.Errorf("interrupted")
		}
		return whole(ctx, root, g, dir, tmp)
	}
	if b, err := c.ensure(t.Context(), groups); err == nil {
		t.Fatalf("a failed build gives %v", b)
	}
	c.compile = whole
	// A killed one leaves its directory as well, and someone may have removed
	// a file by hand.
	if err := os.MkdirAll(filepath.Join(c.dir, "tmp", "two", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := c.ensure(t.Context(), groups)
	if err != nil {
		t.Fatal(err)
	}
	if n := compiled.Load(); n != 2 {
		t.Errorf("compiled %d times, want 2: the first group once", n)
	}
	if err := os.Remove(b.Path("c")); err != nil {
		t.Fatal(err)
	}
	if b, err = c.ensure(t.Context(), groups); err != nil || !b.complete(groups) {
		t.Errorf("after a file was removed: %v, %v", b, err)
	}
}

func TestWaitingForTheCacheEndsWithTheContext(t *testing.T) {
	var compiled atomic.Int32
	c, groups := fake(t, t.TempDir(), &compiled)
	unlock, err := c.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c.log = func(string, ...any) { cancel() } // said when it begins to wait
	if _, err := c.ensure(ctx, groups); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	unlock()
	c.log = t.Logf
	if _, err := c.ensure(t.Context(), groups); err != nil {
		t.Errorf("after the lock was given back: %v", err)
	}
}

// The smallest real program: built statically, ends at SIGTERM.
func TestCompilePause(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	root, err := findRoot(wd)
	if err != nil {
		t.Fatal(err)
	}
	g := groups[slices.IndexFunc(groups, func(g group) bool { return g.name == "pause" })]
	dir := t.TempDir()
	if err := compile(t.Context(), root, g, dir, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "pause"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, []byte("ld-linux")) {
		t.Error("pause is linked dynamically")
	}
	bad := g
	bad.programs = []program{{"none", rootModule + "/hack/cluster/none"}}
	err = compile(t.Context(), root, bad, dir, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "hack/cluster/none") {
		t.Errorf("building a package that is not there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := compile(ctx, root, g, dir, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("a build called off: %v", err)
	}
}
