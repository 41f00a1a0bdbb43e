package isolation

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Files that init inherits.
const (
	configFD = 3
	errorFD  = 4
)

// initConfig is what a manager tells init. Paths are the node's.
type initConfig struct {
	// Root is an empty folder; what is mounted on it shows to this process only.
	Root      string
	EnvoyTree string
	XDSDir    string
	Log       string
	Netns     string
	Bootstrap []byte
	UID       uint32
	Args      []string
	Hostname  string
	// LogLimit in bytes bounds each file that the process writes.
	LogLimit  uint64
	OpenFiles uint64
	// ReadTree is set alone: init then tells the digest of that folder on
	// its output, becomes nothing and exits.
	ReadTree string
}

// SandboxInit becomes a tenant's proxy. The command that Options.Launcher names
// calls it first of all. It never returns, and does nothing unless a Manager
// started it.
func SandboxInit() {
	// Namespaces, credentials and filters belong to a thread, and exec keeps those
	// of the thread that calls it.
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	unix.CloseOnExec(configFD)
	unix.CloseOnExec(errorFD)
	config := os.NewFile(configFD, "config")
	failures := os.NewFile(errorFD, "errors")
	if config == nil || failures == nil {
		os.Exit(2)
	}
	data, err := io.ReadAll(config)
	if err == nil && len(data) == 0 {
		// The manager died before it knew us.
		os.Exit(2)
	}
	var c initConfig
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	if err == nil && c.ReadTree != "" {
		var digest string
		if digest, err = treeDigest(c.ReadTree); err == nil {
			fmt.Fprint(os.Stdout, digest)
			os.Exit(0)
		}
	}
	if err == nil {
		err = become(c)
	}
	fmt.Fprint(failures, err)
	os.Exit(1)
}

// become returns only if it failed.
func become(c initConfig) error {
	// Before the mounts: it is written below /proc.
	if err := ordinaryVictim(); err != nil {
		return err
	}
	if err := enterNamespaces(c); err != nil {
		return err
	}
	if err := buildRoot(c); err != nil {
		return err
	}
	// A full log is an error to Envoy's writer and not its end.
	signal.Ignore(unix.SIGXFSZ)
	if err := boundResources(c); err != nil {
		return err
	}
	list, err := filters()
	if err != nil {
		return err
	}
	path, argv, envp, err := execArguments(rootEnvoy, c.Args)
	if err != nil {
		return err
	}
	if err := dropPrivileges(int(c.UID)); err != nil {
		return err
	}
	// Whatever is open, the runtime's own files too, ends at exec.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close files: %w", err)
	}
	for _, f := range list {
		if err := loadFilter(f); err != nil {
			return err
		}
	}
	_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])))
	return fmt.Errorf("execute %s: %w; its folder on the node must not be mounted noexec", rootEnvoy, errno)
}

// ordinaryVictim undoes the agent's protection from the node's OOM killer, which
// a child inherits.
func ordinaryVictim() error {
	const file = "/proc/self/oom_score_adj"
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if score, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && score >= 0 {
		return nil
	}
	return os.WriteFile(file, []byte("0"), 0)
}

// enterNamespaces joins the tenant's network and makes the rest; the pid
// namespace came with clone, and the cgroup namespace's root is the tenant's
// cgroup, which the manager has put this process into.
func enterNamespaces(c initConfig) error {
	netns, err := unix.Open(c.Netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer unix.Close(netns)
	if err := unix.Setns(netns, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return nil
}

// boundResources only ever lowers limits: raising them takes a capability that
// the agent may lack.
func boundResources(c initConfig) error {
	for _, r := range []struct {
		name     string
		resource int
		limit    uint64
	}{
		{"core size", unix.RLIMIT_CORE, 0},
		{"file size", unix.RLIMIT_FSIZE, c.LogLimit},
		{"open files", unix.RLIMIT_NOFILE, c.OpenFiles},
	} {
		var have unix.Rlimit
		if err := unix.Getrlimit(r.resource, &have); err != nil {
			return fmt.Errorf("read limit of %s: %w", r.name, err)
		}
		limit := min(r.limit, have.Max)
		if err := unix.Prlimit(0, r.resource, &unix.Rlimit{Cur: limit, Max: limit}, nil); err != nil {
			return fmt.Errorf("limit %s: %w", r.name, err)
		}
	}
	return nil
}

// dropPrivileges leaves the calling thread without root, capabilities and any
// way to get them back.
func dropPrivileges(uid int) error {
	for capability := uintptr(0); capability < 64; capability++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err == unix.EINVAL {
			break // the kernel knows no more of them
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	// Of this thread alone, the one that calls exec.
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("leave groups: %w", errno)
	}
	id := uintptr(uid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); errno != 0 {
		return fmt.Errorf("set gid %d: %w", uid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); errno != 0 {
		return fmt.Errorf("set uid %d: %w", uid, errno)
	}
	none := [2]unix.CapUserData{}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// execArguments are made beforehand: nothing may be allocated behind the filter.
func execArguments(path string, args []string) (*byte, []*byte, []*byte, error) {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return nil, nil, nil, err
	}
	argv := []*byte{p}
	for _, a := range args {
		b, err := unix.BytePtrFromString(a)
		if err != nil {
			return nil, nil, nil, err
		}
		argv = append(argv, b)
	}
	return p, append(argv, nil), []*byte{nil}, nil
}
