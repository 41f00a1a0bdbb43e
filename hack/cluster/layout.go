package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
)

// Addresses that are the same in every cluster: each has network namespaces of
// its own, so they can't meet.
var (
	podCIDR4     = netip.MustParsePrefix("10.244.0.0/16")
	podCIDR6     = netip.MustParsePrefix("fd00:10:244::/48")
	serviceCIDR4 = netip.MustParsePrefix("10.96.0.0/16")
	serviceCIDR6 = netip.MustParsePrefix("fd00:10:96::/112")
	apiService4  = netip.MustParseAddr("10.96.0.1")
	apiService6  = netip.MustParseAddr("fd00:10:96::1")
	dnsService4  = netip.MustParseAddr("10.96.0.10")
	dnsService6  = netip.MustParseAddr("fd00:10:96::a")
)

const (
	clusterDomain = "cluster.local"
	apiPort       = 6443
	// maxNodes keeps node numbers in one octet beside the control plane's address.
	maxNodes = 99
)

// cluster is one local cluster: its name, what it was made with, where it is.
type cluster struct {
	Name  string `json:"name"`
	Nodes int    `json:"nodes"`
	// Subnet is the third octet of the nodes' network, 10.250.<Subnet>.0/24: the
	// one network that this machine shares with the cluster.
	Subnet int `json:"subnet"`
	// Complete is set when up has done all of its work.
	Complete bool `json:"complete,omitempty"`
	// Restore are sysctls of the whole machine as they were before a kubelet
	// changed them.
	Restore map[string]string `json:"restore,omitempty"`
	// Context that kubectl used before.
	Context string `json:"context,omitempty"`
	// Kubectl is the link in PATH to the cluster's kubectl, where there was none.
	Kubectl string `json:"kubectl,omitempty"`

	dir string
}

var clusterName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,7}$`)

// stateDir is where clusters keep their state: BULKHEAD_STATE, or
// /var/lib/bulkhead-cluster.
func stateDir() string {
	if dir := os.Getenv("BULKHEAD_STATE"); dir != "" {
		return dir
	}
	return "/var/lib/bulkhead-cluster"
}

// cacheDir is where built binaries are kept: BULKHEAD_CACHE, or the user's cache.
func cacheDir() (string, error) {
	if dir := os.Getenv("BULKHEAD_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "bulkhead"), err
}

// loadCluster returns the cluster as it was recorded; ok is false if there is
// none of that name.
func loadCluster(name string) (c cluster, ok bool, err error) {
	if !clusterName.MatchString(name) {
		return c, false, fmt.Errorf("cluster name %q: use at most 8 lower-case letters, digits and dashes", name)
	}
	dir, err := filepath.Abs(filepath.Join(stateDir(), name))
	if err != nil {
		return c, false, err
	}
	c = cluster{Name: name, dir: dir}
	b, err := os.ReadFile(filepath.Join(dir, "cluster.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return c, false, nil
	}
	if err != nil {
		return c, false, err
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, false, fmt.Errorf("%s/cluster.json: %w", dir, err)
	}
	return c, true, nil
}

func (c cluster) save() error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	tmp := filepath.Join(c.dir, "cluster.json.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(c.dir, "cluster.json"))
}

func (c cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.dir}, parts...)...)
}

func (c cluster) kubeconfig() string { return c.path("admin.conf") }

// machineDir holds a machine's state; 0 is the control plane.
func (c cluster) machineDir(n int) string {
	if n == 0 {
		return c.path("control-plane")
	}
	return c.path(nodeName(n))
}

func nodeName(n int) string { return fmt.Sprintf("node%d", n) }

// context is the name in the user's kubeconfig.
func (c cluster) context() string { return "bulkhead-" + c.Name }

// hostLink is this machine's end of the link to the cluster.
func (c cluster) hostLink() string { return "bh-" + c.Name }

// addr4 and addr6 are a machine's addresses: .1 is the control plane, .10 + n
// node n, .254 this machine.
func (c cluster) addr4(last int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 250, byte(c.Subnet), byte(last)})
}

func (c cluster) addr6(last int) netip.Addr {
	a := netip.MustParseAddr("fd00:10:250::").As16()
	a[7], a[15] = byte(c.Subnet), byte(last)
	return netip.AddrFrom16(a)
}

func nodeLast(n int) int { return 10 + n }

const (
	controlPlaneLast = 1
	hostLast         = 254
)

// podCIDRs are the addresses of a node's pods, IPv4 first.
func podCIDRs(n int) []netip.Prefix {
	a4, a6 := podCIDR4.Addr().As4(), podCIDR6.Addr().As16()
	a4[2], a6[7] = byte(n), byte(n)
	return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4(a4), 24), netip.PrefixFrom(netip.AddrFrom16(a6), 64)}
}

func (c cluster) server() string {
	return fmt.Sprintf("https://%s:%d", c.addr4(controlPlaneLast), apiPort)
}
