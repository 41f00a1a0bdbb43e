// Package wire keeps what agents and operators say to each other such that those of
// neighbouring versions understand each other: they are never all replaced at once.
//
// testdata/wire.txt has a line for each thing that one of them may count on. What
// stands there stays: `go test ./test/wire -update` adds what is new, and takes
// nothing away. What is really to go goes by hand, a version after nothing uses it.
package wire

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

var update = flag.Bool("update", false, "add what is new to the record")

const record = "testdata/wire.txt"

// required ends the line of a field that must be there.
const required = " required"

func TestNeighbouringVersions(t *testing.T) {
	now := protocol(nodev1alpha1.File_api_node_v1alpha1_node_proto)
	now = append(now, nodeProxy(t)...)
	if xds.MetadataTenant != relay.MetadataTenant || xds.MetadataGeneration != relay.MetadataGeneration {
		t.Error("agent and operator don't agree on a stream's metadata")
	}
	now = append(now, "metadata "+relay.MetadataTenant, "metadata "+relay.MetadataGeneration)
	// A process that an operator of the former version has told of its listeners.
	for form := xds.OldestForm; form <= xds.NewestForm; form++ {
		now = append(now, fmt.Sprintf("listeners of form %d", form))
	}
	slices.Sort(now)
	data, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	before := strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
	for _, line := range before {
		if !slices.Contains(now, line) {
			t.Errorf("%q is no more: one of the former version counts on it. Add another field, and leave this one for a version", line)
		}
	}
	var added []string
	for _, line := range now {
		if slices.Contains(before, line) {
			continue
		}
		added = append(added, line)
		if field, is := strings.CutSuffix(line, required); is && known(before, parent(field)) {
			t.Errorf("%q: one of the former version doesn't write it, and would be refused. Make it optional", line)
		}
	}
	switch {
	case t.Failed() || len(added) == 0:
	case *update:
		all := append(before, added...)
		slices.Sort(all)
		if err := os.WriteFile(record, []byte(strings.TrimSpace(strings.Join(all, "\n"))+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("new, and not on record; run go test ./test/wire -update:\n%s", strings.Join(added, "\n"))
	}
}

// parent is the path that a line's field is in.
func parent(line string) string {
	path := strings.Fields(line)[0] + " " + strings.Fields(line)[1]
	return path[:max(0, strings.LastIndexByte(path, '.'))]
}

func known(lines []string, path string) bool {
	return slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, path+" ") })
}

// protocol is what of gRPC goes over the wire: numbers and types, and the methods' names.
func protocol(file protoreflect.FileDescriptor) (lines []string) {
	for i := range file.Messages().Len() {
		m := file.Messages().Get(i)
		for k := range m.Fields().Len() {
			f := m.Fields().Get(k)
			lines = append(lines, fmt.Sprintf("message %s %d %s %s %s", m.FullName(), f.Number(), f.Cardinality(), f.Kind(), f.Name()))
		}
	}
	for i := range file.Services().Len() {
		s := file.Services().Get(i)
		for k := range s.Methods().Len() {
			m := s.Methods().Get(k)
			lines = append(lines, fmt.Sprintf("rpc %s(%s) %s", m.FullName(), m.Input().Name(), m.Output().Name()))
		}
	}
	return lines
}

// nodeProxy is the schema of the object that the operator has agents do things by, and
// in which they say what came of it.
func nodeProxy(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "config", "crd", "mesh.bulkhead.dev_nodeproxies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var crd apiextensionsv1.CustomResourceDefinition
	if err := yaml.Unmarshal(data, &crd); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, v := range crd.Spec.Versions {
		path := "NodeProxy " + v.Name
		for _, part := range []string{"spec", "status"} {
			schema := v.Schema.OpenAPIV3Schema.Properties[part]
			lines = append(lines, fields(path+"."+part, "", &schema)...)
		}
	}
	return lines
}

// fields are the lines of a field, and of all in it.
func fields(path, ends string, s *apiextensionsv1.JSONSchemaProps) (lines []string) {
	kind := s.Type
	if s.XIntOrString {
		kind = "int-or-string"
	}
	if keys := s.XListMapKeys; len(keys) > 0 {
		kind += " by " + strings.Join(keys, ",")
	}
	lines = append(lines, path+" "+kind+ends)
	for _, value := range s.Enum {
		lines = append(lines, fmt.Sprintf("%s is %s", path, value.Raw))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		ends := ""
		if slices.Contains(s.Required, name) {
			ends = required
		}
		field := s.Properties[name]
		lines = append(lines, fields(path+"."+name, ends, &field)...)
	}
	if s.Items != nil && s.Items.Schema != nil {
		lines = append(lines, fields(path+"[]", "", s.Items.Schema)...)
	}
	if s.AdditionalProperties != nil && s.AdditionalProperties.Schema != nil {
		lines = append(lines, fields(path+"{}", "", s.AdditionalProperties.Schema)...)
	}
	return lines
}
