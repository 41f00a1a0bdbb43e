package build

// groups are the programs of a cluster: those of one group come from one Go
// module and are built together. To change a version, change it here and in
// modules/<name>/go.mod, and run `go mod tidy` there; a test compares the two.
var groups = []group{
	{
		name:    "etcd",
		module:  "go.etcd.io/etcd/server/v3",
		version: "v3.6.7",
		programs: []program{
			{"etcd", "go.etcd.io/etcd/server/v3"},
		},
	},
	{
		name:    "containerd",
		module:  "github.com/containerd/containerd/v2",
		version: "v2.2.0",
		stamps:  []string{"github.com/containerd/containerd/v2/version.Version=v2.2.0"},
		programs: []program{
			{"containerd", "github.com/containerd/containerd/v2/cmd/containerd"},
			{"containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"},
			{"ctr", "github.com/containerd/containerd/v2/cmd/ctr"},
		},
	},
	{
		name:    "cni",
		module:  "github.com/containernetworking/plugins",
		version: "v1.8.0",
		stamps:  []string{"github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v1.8.0"},
		programs: []program{
			{"cni/bridge", "github.com/containernetworking/plugins/plugins/main/bridge"},
			{"cni/host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"},
			{"cni/loopback", "github.com/containernetworking/plugins/plugins/main/loopback"},
			{"cni/portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"},
			{"cni/ptp", "github.com/containernetworking/plugins/plugins/main/ptp"},
		},
	},
	{
		name:    "coredns",
		module:  "github.com/coredns/coredns",
		version: "v1.12.4",
		takes:   "about 4 minutes",
		programs: []program{
			{"coredns", "github.com/coredns/coredns"},
		},
	},
	{
		name:    "kubernetes",
		module:  "k8s.io/kubernetes",
		version: "v1.36.3",
		takes:   "10 to 20 minutes",
		// Without them every component calls itself v0.0.0-master.
		stamps: []string{
			"k8s.io/component-base/version.gitVersion=v1.36.3",
			"k8s.io/component-base/version.gitMajor=1",
			"k8s.io/component-base/version.gitMinor=36",
			"k8s.io/component-base/version.gitTreeState=archive",
			"k8s.io/component-base/version.gitCommit=unknown",
			"k8s.io/client-go/pkg/version.gitVersion=v1.36.3",
			"k8s.io/client-go/pkg/version.gitMajor=1",
			"k8s.io/client-go/pkg/version.gitMinor=36",
			"k8s.io/client-go/pkg/version.gitTreeState=archive",
			"k8s.io/client-go/pkg/version.gitCommit=unknown",
		},
		programs: []program{
			{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"},
			{"kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"},
			{"kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"},
			{"kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"},
			{"kubectl", "k8s.io/kubernetes/cmd/kubectl"},
			{"kubelet", "k8s.io/kubernetes/cmd/kubelet"},
		},
	},
	{
		// Of the root module: versioned by its source.
		name:    "pause",
		sources: []string{"hack/cluster/pause/main.go"},
		programs: []program{
			{"pause", rootModule + "/hack/cluster/pause"},
		},
	},
}
