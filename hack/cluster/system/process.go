package system

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// defaultLogLimit is the size at which a log is rotated, in bytes.
const defaultLogLimit = 20 << 20

// stopGrace is how long Start lets a daemon end that it replaces.
const stopGrace = 10 * time.Second

// Spec says how to run a daemon.
type Spec struct {
	// Name is unique in RecordDir.
	Name string
	// RecordDir is where <Name>.json says which process the daemon is.
	RecordDir string
	// Path is the program; without a slash it is looked up in PATH.
	Path string
	// Args follow the program's name.
	Args []string
	// Env is the whole environment; nil means this process's.
	Env []string
	// Dir is the working directory; empty means /.
	Dir string
	// LogFile gets stdout and stderr. It is rotated once, to <LogFile>.1.
	LogFile string
	// LogLimit bounds LogFile, and <LogFile>.1, in bytes; 0 means 20 MiB.
	LogLimit int64
	// Cgroups are directories of control groups (several with cgroup v1) that
	// the daemon is in from its first instruction.
	Cgroups []string
	// Namespaces are files to enter with setns(2), in this order, such as
	// /run/netns/a or /proc/1/ns/mnt.
	Namespaces []string
	// SysProcAttr may be nil. The daemon leads a session of its own in any case.
	SysProcAttr *syscall.SysProcAttr
}

// Process is a daemon that was started, by this process or another. Its
// methods may be called from several goroutines. Nothing need be closed.
type Process struct {
	path string // of the record
	rec  record
}

// record identifies a process for good: a pid alone may come to mean another
// one. It is what the record's file holds.
type record struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	// Start is when it started, in clock ticks since boot.
	Start uint64 `json:"start"`
	// Boot is the kernel's id of the boot that PID and Start belong to.
	Boot string `json:"boot"`
	// Spec is a digest of what it was started with.
	Spec string `json:"spec"`
}

// Start runs a daemon in a session of its own and returns once its program
// was executed; it does not wait until it is ready. ctx is for the start only:
// the daemon stays when this process ends, until Stop.
//
// If the daemon of this name and record directory is running with the same
// Spec (SysProcAttr is not compared), Start returns that one; with another
// Spec, it is stopped first. Only one process at a time may start and stop
// daemons of one record directory.
//
// If this process is killed during Start, the daemon either is on record or
// does not come to be.
func Start(ctx context.Context, spec Spec) (*Process, error) {
	if err := spec.complete(); err != nil {
		return nil, fmt.Errorf("start %q: %w", spec.Name, err)
	}
	old, err := Load(spec.RecordDir, spec.Name)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case old.rec.Spec == spec.digest() && old.Running():
		return old, nil
	default:
		if err := old.Stop(ctx, stopGrace); err != nil {
			return nil, err
		}
	}
	p, err := start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	return p, nil
}

// complete checks the spec and fills in defaults.
func (s *Spec) complete() error {
	if s.Name == "" || strings.ContainsRune(s.Name, filepath.Separator) || strings.HasPrefix(s.Name, ".") {
		return errors.New("the name must be fit for a file")
	}
	if s.RecordDir == "" || s.LogFile == "" {
		return errors.New("a record directory and a log file must be set")
	}
	if s.LogLimit < 0 {
		return fmt.Errorf("the log cannot have %d bytes", s.LogLimit)
	}
	if s.LogLimit == 0 {
		s.LogLimit = defaultLogLimit
	}
	if s.Dir == "" {
		s.Dir = "/"
	}
	if s.Env == nil {
		s.Env = os.Environ()
	}
	path, err := exec.LookPath(s.Path)
	// In another mount namespace there may be a program that is not here.
	if err != nil && (len(s.Namespaces) == 0 || !filepath.IsAbs(s.Path)) {
		return err
	}
	if err == nil {
		s.Path = path
	}
	for _, p := range []*string{&s.RecordDir, &s.LogFile, &s.Path, &s.Dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	return nil
}

func (s Spec) digest() string {
	s.SysProcAttr = nil
	data, err := json.Marshal(s)
	if err != nil {
		panic(err) // strings and numbers only
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// start runs two processes of this program's executable: the keeper of the
// log, and the launcher, which becomes the daemon once told to. It is told
// after its pid is on record; if this process dies before, both end by
// themselves, because their pipes do.
func start(ctx context.Context, spec Spec) (*Process, error) {
	logEnd, err := startLogKeeper(spec.LogFile, spec.LogLimit)
	if err != nil {
		return nil, err
	}
	defer logEnd.Close()
	gateRead, gateWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer gateRead.Close()
	defer gateWrite.Close()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer statusRead.Close()
	defer statusWrite.Close()

	attr := syscall.SysProcAttr{}
	if spec.SysProcAttr != nil {
		attr = *spec.SysProcAttr
	}
	attr.Setsid, attr.Setpgid, attr.Foreground = true, false, false
	cmd := exec.Cmd{
		Path:        "/proc/self/exe",
		Args:        []string{launcherName, spec.Name},
		Env:         spec.Env,
		Dir:         "/",
		Stdout:      logEnd,
		Stderr:      logEnd,
		ExtraFiles:  []*os.File{gateRead, statusWrite},
		SysProcAttr: &attr,
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	// Reaps the daemon if it ends before this process does.
	go func() { _ = cmd.Wait() }()
	statusWrite.Close()
	gateRead.Close()

	p := &Process{path: recordPath(spec.RecordDir, spec.Name)}
	p.rec, err = identify(cmd.Process.Pid)
	if err != nil {
		return nil, err // closing the gate ends the launcher
	}
	p.rec.Name, p.rec.Spec = spec.Name, spec.digest()
	if err := p.save(); err != nil {
		return nil, fmt.Errorf("record the process: %w", err)
	}
	if err := p.launch(ctx, spec, gateWrite, statusRead); err != nil {
		gateWrite.Close()
		// Past its start the daemon would be in nobody's hands.
		return nil, errors.Join(err, p.Stop(context.WithoutCancel(ctx), 0))
	}
	return p, nil
}

// launch tells the launcher to go and waits until it has become the daemon.
func (p *Process) launch(ctx context.Context, spec Spec, gate, status *os.File) error {
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_ = gate.SetWriteDeadline(past)
		_ = status.SetReadDeadline(past)
	})
	defer stop()
	err := json.NewEncoder(gate).Encode(launch{
		Path: spec.Path, Args: spec.Args, Dir: spec.Dir, Cgroups: spec.Cgroups, Namespaces: spec.Namespaces,
	})
	if err == nil {
		var said []byte
		// Executing the program closes the other end.
		said, err = io.ReadAll(status)
		if err == nil && len(said) > 0 {
			return errors.New(string(said))
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// Load returns the daemon of a name that has a record in dir. The error is
// os.ErrNotExist if it has none.
func Load(dir, name string) (*Process, error) {
	path := recordPath(dir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load the record of %s: %w", name, err)
	}
	p := &Process{path: path}
	if err := json.Unmarshal(data, &p.rec); err != nil {
		return nil, fmt.Errorf("load the record of %s from %s: %w", name, path, err)
	}
	if p.rec.PID <= 0 {
		return nil, fmt.Errorf("load the record of %s from %s: it names no process", name, path)
	}
	return p, nil
}

// List returns all daemons that have a record in dir, running or not, by name.
// There are none if there is no dir.
func List(dir string) ([]*Process, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list daemons: %w", err)
	}
	var list []*Process
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		p, err := Load(dir, name)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b *Process) int { return strings.Compare(a.Name(), b.Name()) })
	return list, nil
}

// Name is the daemon's name.
func (p *Process) Name() string { return p.rec.Name }

// PID is its process id, which may mean another process once it has ended.
func (p *Process) PID() int { return p.rec.PID }

// Running tells whether the daemon has not ended.
func (p *Process) Running() bool {
	now, err := identify(p.rec.PID)
	return err == nil && p.rec.same(now)
}

// Wait returns nil once the daemon has ended, or the error of ctx.
func (p *Process) Wait(ctx context.Context) error {
	fd, err := p.open()
	if err != nil || fd == nil {
		return err
	}
	defer fd.Close()
	return waitEnd(ctx, fd)
}

// Stop ends the daemon, and nothing but it: first with SIGTERM, then, after
// grace or when ctx is done, with SIGKILL. Then it removes the record. It is
// no error if the daemon has ended long ago, in an earlier boot even.
func (p *Process) Stop(ctx context.Context, grace time.Duration) error {
	fd, err := p.open()
	if err != nil {
		return err
	}
	if fd != nil {
		err := p.end(ctx, fd, grace)
		fd.Close()
		if err != nil {
			return fmt.Errorf("stop %s (process %d): %w", p.rec.Name, p.rec.PID, err)
		}
	}
	return p.forget()
}

func (p *Process) end(ctx context.Context, fd *os.File, grace time.Duration) error {
	if grace > 0 {
		if err := signal(fd, unix.SIGTERM); err != nil {
			return err
		}
		graceful, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		err := waitEnd(graceful, fd)
		if err == nil || graceful.Err() == nil {
			return err
		}
	}
	if err := signal(fd, unix.SIGKILL); err != nil {
		return err
	}
	// Only a process stuck in the kernel takes longer.
	killed, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
	defer cancel()
	if err := waitEnd(killed, fd); err != nil {
		return fmt.Errorf("it does not end after SIGKILL: %w", err)
	}
	return nil
}
