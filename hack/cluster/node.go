package main

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/build"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
	"github.com/bulkhead-mesh/bulkhead/hack/cluster/pki"
)

const (
	// binDir is where the built binaries are on a node.
	binDir  = "/opt/cluster/bin"
	kubeDir = "/etc/kubernetes"
	// containerdSocket is where kubelets look for the runtime.
	containerdSocket = "/run/containerd/containerd.sock"
	pauseImage       = "registry.invalid/cluster/pause:1"
)

//go:embed files/containerd.toml
var containerdConfig string

//go:embed files/kubelet.yaml
var kubeletConfig string

//go:embed files/kube-proxy.yaml
var kubeProxyConfig string

// nodeDirs are the directories of a node that are on disk, not in memory.
var nodeDirs = []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/lib/bulkhead",
	"/var/log/pods", "/var/log/containers", "/etc/cni/net.d", "/opt/cni/bin"}

// cniPlugins are installed into the node's own plugin directory, which is
// writable: chained plugins are installed there.
var cniPlugins = []string{"ptp", "portmap", "host-local", "loopback", "bridge"}

// node describes a worker: containerd, kubelet and kube-proxy.
func (c cluster) node(n int, ca *pki.CA, bin build.Binaries) (machine.Spec, error) {
	name, dir := nodeName(n), c.machineDir(n)
	own4, own6 := c.addr4(nodeLast(n)), c.addr6(nodeLast(n))
	kube := filepath.Join(dir, "kubernetes")
	for _, k := range []struct {
		file, user string
		groups     []string
	}{
		{"kubelet.conf", "system:node:" + name, []string{"system:nodes"}},
		{"kube-proxy.conf", "system:kube-proxy", nil},
	} {
		if err := c.writeKubeconfig(ca, filepath.Join(kube, k.file), k.user, k.groups...); err != nil {
			return machine.Spec{}, err
		}
	}
	cert, key, err := ca.Issue(name, pki.Request{CommonName: name, Server: true, DNSNames: []string{name}, IPs: netIPs(own4, own6)})
	if err != nil {
		return machine.Spec{}, err
	}
	for from, to := range map[string]string{cert: "kubelet.crt", key: "kubelet.key", c.caFile(): "ca.crt"} {
		if err := copyFile(from, filepath.Join(kube, to), 0o600); err != nil {
			return machine.Spec{}, err
		}
	}
	conflist, err := cniConfig(n)
	if err != nil {
		return machine.Spec{}, err
	}
	spec := machine.Spec{
		Name:       name,
		Dir:        dir,
		Root:       true,
		Cgroup:     c.context() + "-" + name,
		SubCgroups: []string{"kubelet"},
		Link:       "eth0",
		Addresses:  []netip.Prefix{netip.PrefixFrom(own4, 24), netip.PrefixFrom(own6, 64)},
		Sysctls: map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
			// The kubelet leaves bridged pods to the CNI, which asks for this.
			"net/ipv6/conf/all/disable_ipv6": "0"},
		Mounts: []machine.Mount{
			{Source: bin.Dir, Target: binDir, ReadOnly: true},
			{Source: kube, Target: kubeDir, ReadOnly: true},
		},
		Files: map[string]string{
			"/etc/hostname":               name + "\n",
			"/etc/hosts":                  fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", own4, name),
			"/etc/resolv.conf":            "# The cluster has no way to other networks.\n",
			"/etc/machine-id":             machineID(c.Name, n),
			"/etc/containerd/config.toml": strings.NewReplacer("PAUSE_IMAGE", pauseImage, "CONTAINERD_SOCKET", containerdSocket).Replace(containerdConfig),
			"/etc/kubelet.yaml":           strings.NewReplacer("DNS4", dnsService4.String(), "CONTAINERD_SOCKET", containerdSocket, "KUBE_DIR", kubeDir, "CLUSTER_DOMAIN", clusterDomain).Replace(kubeletConfig),
			"/etc/kube-proxy.yaml":        strings.NewReplacer("POD_CIDRS", podCIDR4.String()+","+podCIDR6.String(), "NODE_NAME", name, "KUBE_DIR", kubeDir).Replace(kubeProxyConfig),
		},
		Daemons: []machine.Daemon{
			{Name: "containerd", Path: binDir + "/containerd", Env: []string{"PATH=" + binDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}},
			{Name: "kubelet", Path: binDir + "/kubelet", After: containerdSocket, Args: []string{
				"--config=/etc/kubelet.yaml", "--kubeconfig=" + kubeDir + "/kubelet.conf", "--hostname-override=" + name,
				"--node-ip=" + own4.String() + "," + own6.String(),
			}},
			{Name: "kube-proxy", Path: binDir + "/kube-proxy", Args: []string{"--config=/etc/kube-proxy.yaml"}},
		},
	}
	// Services are routed before they are translated. What isn't the cluster's ends
	// at the control plane, which says so at once.
	spec.Routes = append(spec.Routes,
		machine.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: c.addr4(controlPlaneLast)},
		machine.Route{To: netip.MustParsePrefix("::/0"), Via: c.addr6(controlPlaneLast)})
	for other := 1; other <= c.Nodes; other++ {
		if other != n {
			spec.Routes = append(spec.Routes, c.podRoutes(other)...)
		}
	}
	for _, path := range nodeDirs {
		source := filepath.Join(dir, "disk", strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "-"))
		if err := os.MkdirAll(source, 0o755); err != nil {
			return machine.Spec{}, err
		}
		spec.Mounts = append(spec.Mounts, machine.Mount{Source: source, Target: path})
		switch path {
		case "/etc/cni/net.d":
			err = os.WriteFile(filepath.Join(source, "10-cluster.conflist"), conflist, 0o644)
		case "/opt/cni/bin":
			for _, plugin := range cniPlugins {
				if err = copyFile(bin.Path("cni/"+plugin), filepath.Join(source, plugin), 0o755); err != nil {
					break
				}
			}
		}
		if err != nil {
			return machine.Spec{}, err
		}
	}
	return spec, nil
}

// machineID has to differ between nodes and is told to nobody else.
func machineID(cluster string, n int) string {
	return fmt.Sprintf("%x\n", fmt.Appendf(nil, "%-14.14s%02d", cluster, n))
}

// cniConfig connects each pod by a veth of its own, without a bridge.
func cniConfig(n int) ([]byte, error) {
	type object = map[string]any
	var ranges [][]object
	for _, p := range podCIDRs(n) {
		ranges = append(ranges, []object{{"subnet": p.String()}})
	}
	return json.MarshalIndent(object{
		"cniVersion": "1.0.0",
		"name":       "cluster",
		"plugins": []object{
			{"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": object{
				"type": "host-local", "ranges": ranges, "routes": []object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}}}},
			{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true, "backend": "nftables"},
		},
	}, "", "  ")
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
