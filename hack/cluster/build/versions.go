package build

// programsModule is the module of a cluster's programs, in programs/.
const programsModule = rootModule + "/hack/cluster/build/programs"

// groups are the programs of a cluster. To change a version, change it here and in
// programs/go.mod, and run `go mod tidy` there; a test compares the two.
var groups = []group{
	{
		name:  "kubernetes-1.36.3",
		dir:   "hack/cluster/build/programs",
		takes: "5 to 10 minutes",
		versions: map[string]string{
			"k8s.io/kubernetes":                      "v1.36.3",
			"go.etcd.io/etcd/server/v3":              "v3.6.8",
			"github.com/containerd/containerd/v2":    "v2.2.9",
			"github.com/containernetworking/plugins": "v1.9.0",
			"github.com/coredns/coredns":             "v1.12.4",
		},
		stamps: []string{
			"github.com/containerd/containerd/v2/version.Version=v2.2.9",
			"github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v1.9.0",
			// Without them every component calls itself v0.0.0-master.
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
			{"kube-apiserver", programsModule + "/kubernetes"},
			{"kube-controller-manager", programsModule + "/kubernetes"},
			{"kube-proxy", programsModule + "/kubernetes"},
			{"kube-scheduler", programsModule + "/kubernetes"},
			{"kubectl", programsModule + "/kubernetes"},
			{"kubelet", programsModule + "/kubernetes"},
			{"coredns", programsModule + "/coredns"},
			{"etcd", "go.etcd.io/etcd/server/v3"},
			{"containerd", "github.com/containerd/containerd/v2/cmd/containerd"},
			{"containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"},
			{"ctr", "github.com/containerd/containerd/v2/cmd/ctr"},
			{"cni/bridge", "github.com/containernetworking/plugins/plugins/main/bridge"},
			{"cni/host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"},
			{"cni/loopback", "github.com/containernetworking/plugins/plugins/main/loopback"},
			{"cni/portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"},
			{"cni/ptp", "github.com/containernetworking/plugins/plugins/main/ptp"},
		},
	},
	{
		// Of the root module: versioned by its source.
		name:    "pause",
		dir:     ".",
		sources: []string{"hack/cluster/pause/main.go"},
		programs: []program{
			{"pause", rootModule + "/hack/cluster/pause"},
		},
	},
}
