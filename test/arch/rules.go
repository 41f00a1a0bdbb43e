// Package arch keeps the shape of the tree: which package may import which, and
// how large a file may get. Each rule has its reason, since a rule without one
// is only in the way. The rules are the "Tree" of docs/architecture.md.
package arch

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// layer is a top-level folder, or a folder in it that has rules of its own.
type layer struct {
	folder string
	// may lists the folders of ours that it can import; it can always import itself.
	may []string
	// inTests are allowed for its test files besides.
	inTests []string
	// kubernetes allows k8s.io and sigs.k8s.io modules.
	kubernetes bool
	// standardOnly forbids everything outside Go's standard library and may.
	standardOnly bool
	reason       string
}

const protocol = "api/node"

// A package belongs to the first layer that its path begins with.
var layers = []layer{
	{
		folder: "model", standardOnly: true,
		reason: "model is the language that all others speak, so it must be buildable, testable and readable without any of them",
	},
	{
		folder: protocol,
		reason: "the protocol between agent and operator is generated and drawn in by both, so it must bring nothing along",
	},
	{
		folder: "api", kubernetes: true,
		reason: "others import our API types into their programs and must not get our program with them",
	},
	{
		folder: "xds", may: []string{"model", protocol},
		inTests: []string{"hack/envoy", "test"},
		reason:  "xds turns the model into Envoy's language, whatever the model came from; the leaves meet only in agent and controllers",
	},
	{
		folder: "isolation", may: []string{"model", protocol},
		inTests: []string{"hack/envoy", "test"},
		reason:  "isolation runs any process in a bulkhead and is tried without traffic, certificates or a cluster; the leaves meet only in agent",
	},
	{
		folder: "identity", may: []string{"model", protocol},
		inTests: []string{"hack/envoy", "test"},
		reason:  "keys must be readable for the fewest eyes: what identity imports, it trusts; the leaves meet only in agent and controllers",
	},
	{
		folder: "steer",
		reason: "the two ways of redirecting are told the same and tell the same, so what they share knows neither of them, nor any pod's traffic",
	},
	{
		folder: "bpf", may: []string{"model", "steer", protocol},
		inTests: []string{"hack/envoy", "test"},
		reason:  "the steering is tried on a bare kernel, without Envoy, certificates or a cluster; the leaves meet only in agent",
	},
	{
		folder: "netfilter", may: []string{"model", "steer", protocol},
		inTests: []string{"hack/envoy", "test"},
		reason:  "the other redirection is tried on a bare kernel as well, and must not need eBPF; the leaves meet only in agent",
	},
	{
		folder: "controllers", may: []string{"api", protocol, "model", "xds", "identity"}, kubernetes: true,
		inTests: []string{"hack/envoy", "test"},
		reason:  "the operator has no business on a node: what it imports must not be able to touch one",
	},
	{
		folder: "agent", may: []string{"api", protocol, "model", "isolation", "identity", "steer", "bpf", "netfilter"}, kubernetes: true,
		inTests: []string{"xds", "hack/envoy", "test"},
		reason:  "the agent relays configuration and never makes any, so that all of it comes from one place, the operator",
	},
	{
		folder: "cmd", may: []string{"api", protocol, "model", "xds", "isolation", "identity", "steer", "bpf", "netfilter", "controllers", "agent", "config"}, kubernetes: true,
		inTests: []string{"hack/envoy", "test"},
		reason:  "commands put the product together; what builds or tests it must not be shipped in it",
	},
	{
		folder: "config", kubernetes: true,
		reason: "manifests are read by everybody and depend on nobody",
	},
	{
		folder: "hack", may: everything, kubernetes: true,
		reason: "tools of this repository may use all of it",
	},
	{
		folder: "test", may: everything, kubernetes: true,
		reason: "tests may use all of the repository",
	},
}

var everything = []string{""}

// forbiddenFolders say nothing about what is in them, so everything ends up there.
var forbiddenFolders = []string{"util", "utils", "common", "helper", "helpers", "pkg", "misc"}

const (
	fileLimit = 600
	mainLimit = 250
)

// pkg is what the rules need to know of a package; paths are import paths.
type pkg struct {
	path        string
	imports     []string
	testImports []string
}

// violation is one broken rule, with what is wrong, where, and why it matters.
type violation struct {
	where, what, reason string
}

func (v violation) String() string {
	return fmt.Sprintf("%s: %s\n\treason: %s", v.where, v.what, v.reason)
}

// checkImports applies the layers to packages of the module.
func checkImports(module string, pkgs []pkg) (violations []violation) {
	for _, p := range pkgs {
		folder := strings.TrimPrefix(strings.TrimPrefix(p.path, module), "/")
		l := layerOf(folder)
		if l == nil {
			violations = append(violations, violation{folder, "belongs to no layer",
				"a new top-level folder is a decision about the architecture: add it to test/arch with its reason"})
			continue
		}
		for _, imported := range p.imports {
			if what := l.refuses(module, imported, l.may); what != "" {
				violations = append(violations, violation{folder, what, l.reason})
			}
		}
		for _, imported := range p.testImports {
			// A test may read Kubernetes objects where the package itself must not.
			relaxed := *l
			relaxed.kubernetes = true
			if what := relaxed.refuses(module, imported, append(slices.Clone(l.may), l.inTests...)); what != "" {
				violations = append(violations, violation{folder + " (tests)", what, l.reason})
			}
		}
	}
	return violations
}

func layerOf(folder string) *layer {
	for i := range layers {
		if within(folder, layers[i].folder) {
			return &layers[i]
		}
	}
	return nil
}

// refuses says what is wrong with an import, "" if nothing is.
func (l *layer) refuses(module, imported string, may []string) string {
	if imported == module || strings.HasPrefix(imported, module+"/") {
		folder := strings.TrimPrefix(strings.TrimPrefix(imported, module), "/")
		target := layerOf(folder)
		if target != nil && target.folder == l.folder {
			return ""
		}
		for _, allowed := range may {
			if allowed == "" || within(folder, allowed) {
				return ""
			}
		}
		return fmt.Sprintf("imports %s; of this repository %s may import %s", folder, l.folder, listed(may))
	}
	if !strings.Contains(strings.Split(imported, "/")[0], ".") {
		return ""
	}
	if l.standardOnly {
		return fmt.Sprintf("imports %s; %s uses the standard library only", imported, l.folder)
	}
	if !l.kubernetes && (strings.HasPrefix(imported, "k8s.io/") || strings.HasPrefix(imported, "sigs.k8s.io/")) {
		return fmt.Sprintf("imports %s; %s knows nothing of Kubernetes", imported, l.folder)
	}
	return ""
}

func listed(folders []string) string {
	if len(folders) == 0 {
		return "nothing"
	}
	return strings.Join(folders, ", ")
}

func within(folder, parent string) bool {
	return folder == parent || strings.HasPrefix(folder, parent+"/")
}

// source is a hand-written file; path is relative to the root.
type source struct {
	path  string
	lines int
	first string
}

// checkSources applies the rules about files and folders.
func checkSources(sources []source) (violations []violation) {
	mains := map[string]int{}
	folders := map[string]bool{}
	for _, s := range sources {
		if s.lines > fileLimit {
			violations = append(violations, violation{s.path, fmt.Sprintf("has %d lines, more than %d", s.lines, fileLimit),
				"a reader holds one file in mind at a time: split it by what it is about"})
		}
		if path.Ext(s.path) == ".c" && s.first != "//go:build ignore" {
			violations = append(violations, violation{s.path, "does not begin with //go:build ignore",
				"the go command would hand it to a C compiler for this machine"})
		}
		for dir := path.Dir(s.path); dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
		if within(s.path, "cmd") && path.Ext(s.path) == ".go" && !strings.HasSuffix(s.path, "_test.go") {
			mains[path.Dir(s.path)] += s.lines
		}
	}
	for folder := range folders {
		if slices.Contains(forbiddenFolders, path.Base(folder)) {
			violations = append(violations, violation{folder, "is a folder that says nothing about what is in it",
				"such folders collect what has no place; name it after what it does"})
		}
	}
	for folder, lines := range mains {
		if lines > mainLimit {
			violations = append(violations, violation{folder, fmt.Sprintf("has %d lines, more than %d", lines, mainLimit),
				"commands turn flags into Options and nothing else; what they do is tested where it lives"})
		}
	}
	slices.SortFunc(violations, func(a, b violation) int { return strings.Compare(a.String(), b.String()) })
	return violations
}
