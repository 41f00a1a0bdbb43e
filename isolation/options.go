package isolation

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Options of a Manager. The zero value works on a node.
type Options struct {
	// RunDir holds what ends with a reboot. Default /run/bulkhead. It has to be on
	// a tmpfs; in a container it is mounted with Bidirectional propagation, or the
	// network namespaces' mounts end with the container.
	RunDir string
	// LibDir holds copies of Envoy, tenants' indexes and logs. Default
	// /var/lib/bulkhead. It must not be mounted noexec.
	LibDir string
	// EnvoyDir is where versions of Envoy come from: <EnvoyDir>/<version> is a tree
	// that holds /envoy and its libraries. Default /bulkhead/envoy.
	EnvoyDir string
	// CgroupRoot is where cgroups are mounted: version 2 itself, or a folder of
	// version 1 hierarchies with version 2 beside them. Default /sys/fs/cgroup.
	CgroupRoot string
	// CgroupParent is the cgroup that folder is in, with version 2 alone: one that is
	// there and that the node's systemd leaves to others, such as
	// /bulkhead.slice/bulkhead.service of config/systemd. Default "", the root.
	CgroupParent string
	// CgroupName is the folder of all tenants in each hierarchy. Default "bulkhead".
	CgroupName string
	// Launcher is the command that ends in SandboxInit. Default
	// {"/proc/self/exe", "sandbox-init"}.
	Launcher []string
	// UIDBase plus a tenant's index is its uid and gid. Default 1900000000, which is
	// beyond what distributions, user namespaces and systemd hand out. The 4095
	// that follow must be free on the node.
	UIDBase uint32
	// LinkPrefix begins the names of the node's ends of the veths; the index
	// follows. At most 8 letters. Default "bh".
	LinkPrefix string
	// Changed is called when a tenant's State changed. It must not block and may
	// call State. Nil for nobody.
	Changed func(model.Tenant)
	// Exited is called for each proxy that ended, whatever the cause, before it is
	// started again; by Open too, for those that ended while no manager was there.
	// It must not block. Nil for nobody.
	Exited func(t model.Tenant, generation int, e Exit)
	// Log is where faults go that no call can return. Default slog.Default().
	Log *slog.Logger
}

const maxIndex = 4095

func (o Options) withDefaults() (Options, error) {
	setDefault(&o.RunDir, "/run/bulkhead")
	setDefault(&o.LibDir, "/var/lib/bulkhead")
	setDefault(&o.EnvoyDir, "/bulkhead/envoy")
	setDefault(&o.CgroupRoot, "/sys/fs/cgroup")
	setDefault(&o.CgroupName, "bulkhead")
	setDefault(&o.LinkPrefix, "bh")
	if len(o.Launcher) == 0 {
		o.Launcher = []string{"/proc/self/exe", "sandbox-init"}
	}
	if o.UIDBase == 0 {
		o.UIDBase = 1_900_000_000
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	for _, dir := range []string{o.RunDir, o.LibDir, o.EnvoyDir, o.CgroupRoot} {
		if !filepath.IsAbs(dir) {
			return o, fmt.Errorf("directory %q is not absolute", dir)
		}
	}
	if strings.ContainsAny(o.CgroupName, "/.") {
		return o, fmt.Errorf("cgroup name %q: no slashes and dots", o.CgroupName)
	}
	if o.CgroupParent != "" && (!filepath.IsAbs(o.CgroupParent) || filepath.Clean(o.CgroupParent) != o.CgroupParent) {
		return o, fmt.Errorf("cgroup parent %q: want a path as in /proc/PID/cgroup, such as /bulkhead.slice/bulkhead.service", o.CgroupParent)
	}
	if len(o.LinkPrefix) > 8 || strings.ContainsAny(o.LinkPrefix, "/: ") {
		return o, fmt.Errorf("link prefix %q: at most 8 letters", o.LinkPrefix)
	}
	if o.UIDBase < 1000 || o.UIDBase > 1<<32-2-maxIndex {
		return o, fmt.Errorf("uid base %d: %d uids after it must be valid and not the system's", o.UIDBase, maxIndex)
	}
	return o, nil
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// linkName is the node's end of the veth of index.
func (o Options) linkName(index uint16) string {
	return o.LinkPrefix + strconv.Itoa(int(index))
}
