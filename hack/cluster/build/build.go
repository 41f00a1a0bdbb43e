// Package build makes the programs of a Kubernetes cluster from their Go
// modules, with no container engine and no download but Go's own, whose sums
// are pinned in programs/go.sum. What is built stays in a cache.
package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// rootModule is the module that the source tree is recognized by.
const rootModule = "github.com/bulkhead-mesh/bulkhead"

// group is a set of programs built by one go command.
type group struct {
	name     string
	dir      string            // slash-separated, from the root: where the go command runs
	versions map[string]string // of the modules that the programs come from
	takes    string            // how long the first build takes, if minutes
	stamps   []string          // importpath.variable=value, set by the linker
	sources  []string          // files from the root that the programs are made of; none: dir is a module of its own, and all of it is
	programs []program
}

// program is a main package and its slash-separated name below Binaries.Dir. One
// package may be several programs, told apart by the name they are started by.
type program struct {
	name string
	pkg  string
}

// Binaries is a directory of built programs, complete and never changed.
type Binaries struct {
	Dir string
}

// Path returns the path of a program by its name in the directory, such as
// "kubelet" or "cni/ptp". It does not look whether there is one.
func (b Binaries) Path(name string) string {
	return filepath.Join(b.Dir, filepath.FromSlash(name))
}

// Ensure returns the programs of a cluster, and builds those that cacheDir
// lacks: the first time that takes about half an hour on two cores. It
// must run inside the Bulkhead source tree, with the go command in PATH. log
// is told what is being built, one line a call, and may be nil.
//
// Any number of processes may call it on one cacheDir at once: one builds, the
// others wait. A build that was killed is taken up by the next call. Programs
// of other versions stay in the cache; it can be removed at any time that no
// cluster runs.
func Ensure(ctx context.Context, cacheDir string, log func(format string, args ...any)) (Binaries, error) {
	if log == nil {
		log = func(string, ...any) {}
	}
	wd, err := os.Getwd()
	if err != nil {
		return Binaries{}, fmt.Errorf("find the source tree: %w", err)
	}
	root, err := findRoot(wd)
	if err != nil {
		return Binaries{}, err
	}
	cacheDir, err = filepath.Abs(cacheDir)
	if err != nil {
		return Binaries{}, fmt.Errorf("find the cache directory: %w", err)
	}
	c := cache{dir: filepath.Join(cacheDir, "cluster"), root: root, log: log, compile: compile}
	return c.ensure(ctx, groups)
}

// findRoot returns the directory of the root module that dir is in.
func findRoot(dir string) (string, error) {
	for d := dir; ; d = filepath.Dir(d) {
		data, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module "+rootModule+"\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("find the source tree of %s: %s is not in it; run this from inside the tree", rootModule, dir)
		}
	}
}

// cache keeps built programs: groups/<key> has those of one group, bin/<key>
// has hard links to those of all groups. Both appear by a rename, complete.
// What is being made is in tmp, which belongs to the holder of the lock.
type cache struct {
	dir     string
	root    string
	log     func(format string, args ...any)
	compile func(ctx context.Context, root string, g group, dir, tmp string) error
}

func (c cache) ensure(ctx context.Context, groups []group) (Binaries, error) {
	keys, all, err := cacheKeys(c.root, groups)
	if err != nil {
		return Binaries{}, err
	}
	b := Binaries{Dir: filepath.Join(c.dir, "bin", all)}
	if b.complete(groups) {
		return b, nil
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return Binaries{}, err
	}
	defer unlock()
	if b.complete(groups) {
		return b, nil
	}
	tmp := filepath.Join(c.dir, "tmp")
	if err := os.RemoveAll(tmp); err != nil {
		return Binaries{}, fmt.Errorf("remove what an unfinished build left: %w", err)
	}
	defer os.RemoveAll(tmp)
	for i, g := range groups {
		if err := c.build(ctx, g, filepath.Join(c.dir, "groups", keys[i]), tmp); err != nil {
			return Binaries{}, err
		}
	}
	link := filepath.Join(tmp, "bin")
	for i, g := range groups {
		from := Binaries{Dir: filepath.Join(c.dir, "groups", keys[i])}
		for _, p := range g.programs {
			to := Binaries{Dir: link}.Path(p.name)
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				return Binaries{}, fmt.Errorf("make a directory of programs: %w", err)
			}
			if err := os.Link(from.Path(p.name), to); err != nil {
				return Binaries{}, fmt.Errorf("link %s: %w", p.name, err)
			}
		}
	}
	if err := publish(link, b.Dir); err != nil {
		return Binaries{}, fmt.Errorf("keep the programs: %w", err)
	}
	return b, nil
}

// build makes the programs of g in dir unless they are there.
func (c cache) build(ctx context.Context, g group, dir, tmp string) error {
	if (Binaries{Dir: dir}).complete([]group{g}) {
		return nil
	}
	if g.takes != "" {
		c.log("building %s (%s the first time)", g.name, g.takes)
	} else {
		c.log("building %s", g.name)
	}
	begin := time.Now()
	out := Binaries{Dir: filepath.Join(tmp, g.name)}
	scratch := filepath.Join(tmp, "go")
	if err := os.MkdirAll(scratch, 0o755); err != nil {
		return fmt.Errorf("make a directory to build %s in: %w", g.name, err)
	}
	built := filepath.Join(tmp, g.name+"-built")
	if err := os.MkdirAll(built, 0o755); err != nil {
		return fmt.Errorf("make a directory to build %s in: %w", g.name, err)
	}
	if err := c.compile(ctx, c.root, g, built, scratch); err != nil {
		return fmt.Errorf("build %s: %w", g.name, err)
	}
	for _, p := range g.programs {
		if err := os.MkdirAll(filepath.Dir(out.Path(p.name)), 0o755); err != nil {
			return fmt.Errorf("make a directory to build %s in: %w", g.name, err)
		}
		if err := os.Link(filepath.Join(built, executable(p.pkg)), out.Path(p.name)); err != nil {
			return fmt.Errorf("keep %s of %s: %w", p.name, g.name, err)
		}
	}
	if err := publish(out.Dir, dir); err != nil {
		return fmt.Errorf("keep the programs of %s: %w", g.name, err)
	}
	c.log("built %s in %v", g.name, time.Since(begin).Round(time.Second))
	return nil
}

// complete tells whether every program of the groups is there.
func (b Binaries) complete(groups []group) bool {
	for _, g := range groups {
		for _, p := range g.programs {
			info, err := os.Stat(b.Path(p.name))
			if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
				return false
			}
		}
	}
	return true
}

// publish moves a finished directory to its place, where only an incomplete
// one can be.
func publish(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	// A rename must not outlive a crash that the contents do not.
	err = unix.Syncfs(int(f.Fd()))
	f.Close()
	if err != nil {
		return fmt.Errorf("sync %s: %w", from, err)
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.Rename(from, to)
}

// lock takes the cache for this process; unlock gives it back. The kernel does
// if the process dies.
func (c cache) lock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the cache: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the cache: %w", err)
	}
	flock := func(how int) error {
		for {
			if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
	if err = flock(unix.LOCK_EX | unix.LOCK_NB); err == nil {
		return func() { f.Close() }, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("lock the cache %s: %w", c.dir, err)
	}
	c.log("waiting for another process that builds into %s", c.dir)
	locked := make(chan error, 1)
	go func() { locked <- flock(unix.LOCK_EX) }()
	select {
	case err := <-locked:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock the cache %s: %w", c.dir, err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		// flock cannot be called off; give the lock back once it comes.
		go func() {
			<-locked
			f.Close()
		}()
		return nil, fmt.Errorf("wait for the cache %s: %w", c.dir, ctx.Err())
	}
}

// executable is what the go command calls the program of a package: the last
// element of its path that isn't a major version.
func executable(pkg string) string {
	dir, name := path.Split(pkg)
	if v, ok := strings.CutPrefix(name, "v"); ok && strings.Trim(v, "0123456789") == "" {
		return path.Base(dir)
	}
	return name
}

// compile builds a group's programs into dir, statically, all with one go command:
// while it links one it compiles the next. tmp is the directory for what the go
// command needs meanwhile.
func compile(ctx context.Context, root string, g group, dir, tmp string) error {
	ldflags := "-s -w"
	for _, s := range g.stamps {
		ldflags += " -X " + s
	}
	args := []string{"build", "-C", filepath.Join(root, filepath.FromSlash(g.dir)), "-trimpath", "-ldflags=" + ldflags, "-o", dir + string(filepath.Separator)}
	for _, p := range g.programs {
		if !slices.Contains(args, p.pkg) {
			args = append(args, p.pkg)
		}
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(),
		"CGO_ENABLED=0",
		"GOOS=linux",
		"GOARCH="+runtime.GOARCH,
		"GOFLAGS="+goFlags,
		"GOWORK=off",
		"GOTMPDIR="+tmp,
	)
	// No build goes on that nobody waits for, also if this process is killed:
	// it would write into the directory of the next one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	// The death signal is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("run the go command: %w; install Go and put it in PATH", err)
	}
	const tail = 4096
	if len(out) > tail {
		out = append([]byte("...\n"), out[len(out)-tail:]...)
	}
	return fmt.Errorf("%w:\n%s", err, out)
}
