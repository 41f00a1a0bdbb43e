package machine

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Spec describes one machine. It is written to Dir, from where the init reads it.
type Spec struct {
	// Name is the host name, and the name of the machine's cgroups.
	Name string `json:"name"`
	// Cgroup is the name of the machine's top-level cgroup in every hierarchy; it
	// must be nobody else's. Empty: none, the machine stays where its creator is.
	Cgroup string `json:"cgroup,omitempty"`
	// SubCgroups are made inside of Cgroup.
	SubCgroups []string `json:"subCgroups,omitempty"`
	// Dir holds the machine's state: spec, record, logs. It must exist.
	Dir string `json:"dir"`
	// Root says that the machine gets a root of its own; otherwise it sees this
	// machine's files.
	Root bool `json:"root"`
	// Mounts of this machine's directories into the root.
	Mounts []Mount `json:"mounts,omitempty"`
	// Files that are written into the root, by absolute path.
	Files map[string]string `json:"files,omitempty"`
	// Link is the name of the network interface that the machine waits for.
	Link string `json:"link,omitempty"`
	// Addresses of Link.
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	// Routes through Link; a default route is 0.0.0.0/0 or ::/0.
	Routes []Route `json:"routes,omitempty"`
	// Sysctls below /proc/sys, as "net/ipv4/ip_forward".
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// Daemons, in the order of their start.
	Daemons []Daemon `json:"daemons"`
}

// Mount is a bind mount.
type Mount struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Route is reached through a neighbour on the machine's link.
type Route struct {
	To  netip.Prefix `json:"to"`
	Via netip.Addr   `json:"via"`
}

// Daemon is a program that is started again whenever it ends.
type Daemon struct {
	Name string   `json:"name"`
	Path string   `json:"path"`
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
	// After is a path that must exist before the daemon is started.
	After string `json:"after,omitempty"`
}

const (
	// logBytes is how large a daemon's log gets before it becomes the old one.
	logBytes = 8 << 20
	// stopGrace is what daemons get to end by themselves.
	stopGrace = 5 * time.Second
)

// InitArg is the first argument of a program that is to call Init.
const InitArg = "machine-init"

func (s Spec) file() string   { return filepath.Join(s.Dir, "machine.json") }
func (s Spec) record() string { return filepath.Join(s.Dir, "init.json") }

// LogDir is where the daemons' logs are: NAME.log and NAME.log.old, 8 MiB each at
// most.
func (s Spec) LogDir() string { return filepath.Join(s.Dir, "log") }

func (s Spec) write() error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(s.file(), b, 0o600)
}

func readSpec(file string) (Spec, error) {
	var s Spec
	b, err := os.ReadFile(file)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

// replaceFile writes a file whole or not at all.
func replaceFile(name string, content []byte, mode os.FileMode) error {
	tmp := name + ".tmp"
	if err := os.WriteFile(tmp, content, mode); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// hierarchy is one mounted cgroup hierarchy of this machine.
type hierarchy struct {
	Dir     string // mount point here
	Options string // v1: what to mount it with; empty for v2
	V2      bool
}

// hierarchies reads the mounted cgroup hierarchies, each once.
func hierarchies() ([]hierarchy, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []hierarchy
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		h := hierarchy{Dir: left[4], V2: right[0] == "cgroup2"}
		if right[0] != "cgroup" && !h.V2 {
			continue
		}
		if !h.V2 {
			h.Options = hierarchyOptions(right[2])
		}
		if key := h.Options; seen[key] {
			continue
		} else {
			seen[key] = true
		}
		all = append(all, h)
	}
	return all, nil
}

// hierarchyOptions leaves what names a v1 hierarchy of its mount options.
func hierarchyOptions(super string) string {
	var keep []string
	for o := range strings.SplitSeq(super, ",") {
		switch {
		case o == "rw", o == "ro", o == "xattr", o == "relatime", o == "clone_children", strings.HasPrefix(o, "release_agent="):
		default:
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}
