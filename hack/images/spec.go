package main

import (
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// nonroot is the uid and gid that images run as where nothing needs root.
const nonroot = "65532:65532"

// spec says what one image holds. Layers go from what changes least to what
// changes most, so that a change of our code moves only the last one.
type spec struct {
	name string
	// envoy puts every pinned Envoy at /opt/bulkhead/envoy/<version>, each as a
	// tree that can be the root of a tenant's proxy.
	envoy bool
	// proxy is the version of Envoy that a ProxyRollout is to bring, and all that is in
	// the image. Such an image is made only when it is asked for.
	proxy string
	// programs are binaries, the entrypoint last.
	programs []program
	// files of other modules, as they are.
	files []moduleFile
	// reference is the image's whole name where others' manifests ask for it. Such
	// an image is made only when it is asked for: it takes minutes.
	reference string
	user      string
	args      []string
}

type program struct {
	// source is the package's directory in the module, or a package of another one
	// that is a tool of the module in the directory module.
	source, module string
	// path is where the binary is in the image.
	path string
}

// moduleFile is a file of a Go module that the one in the directory module needs.
type moduleFile struct {
	module, of, source string
	path               string
}

const (
	gatewayEcho = "test/conformance/echo"
	istio       = "istio.io/istio"
)

var specs = []spec{
	{
		name:     "operator",
		programs: []program{{source: "cmd/operator", path: "/bulkhead/operator"}},
		user:     nonroot,
	},
	{
		name:  "agent",
		envoy: true,
		programs: []program{
			{source: "cmd/cni", path: "/opt/bulkhead/bin/bulkhead-cni"},
			{source: "cmd/agent", path: "/bulkhead/agent"},
		},
		// The agent makes namespaces, cgroups and BPF programs.
		user: "0:0",
	},
	{
		name:     "echo",
		programs: []program{{source: "test/echo", path: "/bulkhead/echo"}},
		user:     nonroot,
		args:     []string{"serve"},
	},
	{
		// What the Gateway API's conformance suite runs as client and server.
		name:      "echo-advanced",
		reference: "registry.k8s.io/gateway-api/echo-advanced:v1.5.1",
		programs: []program{
			{source: istio + "/pkg/test/echo/cmd/client", module: gatewayEcho, path: "/bulkhead/client"},
			{source: istio + "/pkg/test/echo/cmd/server", module: gatewayEcho, path: "/bulkhead/server"},
		},
		files: []moduleFile{
			{gatewayEcho, istio, "tests/testdata/certs/dns/cert-chain.pem", "/cert.crt"},
			{gatewayEcho, istio, "tests/testdata/certs/dns/key.pem", "/cert.key"},
		},
		user: nonroot,
	},
}

func init() {
	for _, version := range dist.Versions() {
		specs = append(specs, spec{name: "envoy-" + version, proxy: version})
	}
}

func names() []string {
	var all []string
	for _, s := range specs {
		all = append(all, s.name)
	}
	return all
}

// choose returns the specs with the wanted names, or all of the product.
func choose(wanted []string) ([]spec, error) {
	if len(wanted) == 0 {
		return slices.DeleteFunc(slices.Clone(specs), func(s spec) bool { return s.reference != "" || s.proxy != "" }), nil
	}
	var chosen []spec
	for _, name := range wanted {
		i := slices.IndexFunc(specs, func(s spec) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("unknown image %q; there are %s", name, strings.Join(names(), ", "))
		}
		chosen = append(chosen, specs[i])
	}
	return chosen, nil
}

func (s spec) config() v1.Config {
	return v1.Config{
		User:       s.user,
		Entrypoint: []string{s.programs[len(s.programs)-1].path},
		Cmd:        s.args,
		WorkingDir: "/",
		Env:        []string{"PATH=/bulkhead"},
	}
}
