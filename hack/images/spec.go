package main

import (
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
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
	// programs are our own binaries, the entrypoint last.
	programs []program
	user     string
	args     []string
}

type program struct {
	// source is the package's directory in the module.
	source string
	// path is where the binary is in the image.
	path string
}

var specs = []spec{
	{
		name:     "operator",
		programs: []program{{"cmd/operator", "/bulkhead/operator"}},
		user:     nonroot,
	},
	{
		name:  "agent",
		envoy: true,
		programs: []program{
			{"cmd/cni", "/opt/bulkhead/bin/bulkhead-cni"},
			{"cmd/agent", "/bulkhead/agent"},
		},
		// The agent makes namespaces, cgroups and BPF programs.
		user: "0:0",
	},
	{
		name:     "echo",
		programs: []program{{"test/echo", "/bulkhead/echo"}},
		user:     nonroot,
		args:     []string{"serve"},
	},
}

func names() []string {
	var all []string
	for _, s := range specs {
		all = append(all, s.name)
	}
	return all
}

// choose returns the specs with the wanted names, or all.
func choose(wanted []string) ([]spec, error) {
	if len(wanted) == 0 {
		return specs, nil
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
