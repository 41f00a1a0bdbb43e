package machine

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Machine is a running machine.
type Machine struct {
	// PID of its init.
	PID int
}

// record tells which process is a machine's init, for a later Stop.
type record struct {
	PID int `json:"pid"`
	// StartTicks and BootID tell it from another process that got its pid.
	StartTicks uint64 `json:"startTicks"`
	BootID     string `json:"bootID"`
}

// Start starts the machine that spec describes and returns when its network is
// up and its daemons are being started. attach is called with the init's pid, to
// put the machine's link into its network namespace. self is the program that
// calls Init when its first argument is InitArg. On an error nothing is left
// running.
func Start(spec Spec, self string, attach func(pid int) error) (Machine, error) {
	m, err := start(spec, self, attach)
	if err != nil {
		return Machine{}, errors.Join(fmt.Errorf("machine %s: %w", spec.Name, err), Stop(spec.Dir))
	}
	return m, nil
}

func start(spec Spec, self string, attach func(pid int) error) (Machine, error) {
	if err := os.MkdirAll(spec.LogDir(), 0o755); err != nil {
		return Machine{}, err
	}
	if err := spec.write(); err != nil {
		return Machine{}, err
	}
	if err := makeCgroups(spec.Cgroup, spec.SubCgroups); err != nil {
		return Machine{}, err
	}
	logFile, err := os.Create(filepath.Join(spec.LogDir(), "init.log"))
	if err != nil {
		return Machine{}, err
	}
	defer logFile.Close()
	goRead, goWrite, err := os.Pipe()
	if err != nil {
		return Machine{}, err
	}
	defer goWrite.Close()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		goRead.Close()
		return Machine{}, err
	}
	defer statusRead.Close()

	cmd := exec.Command(self, InitArg, spec.file())
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = []*os.File{goRead, statusWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
			unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	err = cmd.Start()
	goRead.Close()
	statusWrite.Close()
	if err != nil {
		return Machine{}, fmt.Errorf("start init: %w", err)
	}
	pid := cmd.Process.Pid
	if err := writeRecord(spec.record(), pid); err != nil {
		// Not on record, so Stop would not find it.
		cmd.Process.Kill()
		cmd.Wait()
		return Machine{}, err
	}
	// The init outlives this process; if it ends before, it must not be a zombie
	// that looks alive.
	go cmd.Wait()
	if err := attach(pid); err != nil {
		return Machine{}, err
	}
	if _, err := goWrite.Write([]byte{1}); err != nil {
		return Machine{}, fmt.Errorf("init ended early: %w%s", err, tail(logFile.Name()))
	}
	if err := statusRead.SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return Machine{}, err
	}
	line, err := bufio.NewReader(statusRead).ReadString('\n')
	if err != nil {
		return Machine{}, fmt.Errorf("init didn't come up: %w%s", err, tail(logFile.Name()))
	}
	if line = strings.TrimSpace(line); line != "ready" {
		return Machine{}, errors.New(line)
	}
	return Machine{PID: pid}, nil
}

// tail returns the end of a log for an error message.
func tail(name string) string {
	b, _ := os.ReadFile(name)
	if len(b) > 2000 {
		b = b[len(b)-2000:]
	}
	if len(b) == 0 {
		return ""
	}
	return "\n" + strings.TrimSpace(string(b))
}

func writeRecord(file string, pid int) error {
	ticks, err := startTicks(pid)
	if err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	b, err := json.Marshal(record{PID: pid, StartTicks: ticks, BootID: boot})
	if err != nil {
		return err
	}
	return replaceFile(file, b, 0o600)
}

// Find returns the machine whose state is in dir, if it runs.
func Find(dir string) (Machine, bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "init.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return Machine{}, false, nil
	}
	if err != nil {
		return Machine{}, false, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return Machine{}, false, fmt.Errorf("%s/init.json: %w", dir, err)
	}
	boot, err := bootID()
	if err != nil {
		return Machine{}, false, err
	}
	if ticks, err := startTicks(r.PID); err != nil || ticks != r.StartTicks || boot != r.BootID {
		return Machine{}, false, nil
	}
	return Machine{PID: r.PID}, true, nil
}

// Stop ends the machine whose state is in dir, if it runs, and removes its
// cgroups. The state stays.
func Stop(dir string) error {
	m, running, err := Find(dir)
	if err != nil {
		return err
	}
	if running {
		if err := end(m.PID, filepath.Join(dir, "init.json")); err != nil {
			return err
		}
	}
	spec, err := readSpec(filepath.Join(dir, "machine.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return removeCgroups(spec.Cgroup)
}

// end ends the process: first kindly, so that the daemons can close their files.
func end(pid int, recordFile string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	// Between the look at the record and pidfd_open the pid may have changed hands.
	if _, still, err := Find(filepath.Dir(recordFile)); err != nil || !still {
		return err
	}
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, stopGrace + 2*time.Second}, {unix.SIGKILL, time.Minute}} {
		if err := unix.PidfdSendSignal(fd, step.signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal %d: %w", pid, err)
		}
		deadline := time.Now().Add(step.wait)
		for {
			left := time.Until(deadline)
			if left <= 0 {
				break
			}
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
			if n > 0 {
				return nil
			}
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
	return fmt.Errorf("process %d doesn't end", pid)
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// startTicks is field 22 of /proc/<pid>/stat; see proc_pid_stat(5).
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, s)
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fmt.Errorf("process %d has ended", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// makeCgroups makes the machine's cgroup in every hierarchy.
func makeCgroups(name string, subs []string) error {
	if name == "" {
		return nil
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		for _, sub := range append([]string{""}, subs...) {
			dir := filepath.Join(h.Dir, name, sub)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
			if h.V2 {
				continue
			}
			// A new cpuset is empty, and nothing can join it then.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), f))
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
					return fmt.Errorf("cgroup %s: %w", dir, err)
				}
			}
		}
	}
	return nil
}

// removeCgroups removes the cgroup and all below it. Its processes have ended,
// but the kernel may still be busy with them.
func removeCgroups(name string) error {
	if name == "" {
		return nil
	}
	all, err := hierarchies()
	if err != nil {
		return err
	}
	deadline := time.Now().Add(time.Minute)
	var errs []error
	for _, h := range all {
		dir := filepath.Join(h.Dir, name)
		for {
			err := removeTree(dir)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				errs = append(errs, err)
				break
			}
			time.Sleep(50 * time.Millisecond) // nothing tells when a cgroup is free
		}
	}
	return errors.Join(errs...)
}

func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", d, err)
		}
	}
	return nil
}
