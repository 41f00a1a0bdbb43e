package controllers

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/util/managedfields"
	clientgoapply "k8s.io/client-go/applyconfigurations"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/yaml"
)

// typeConverters make the fake API server merge our kinds by the lists' keys that
// the CRDs declare, as the real one does.
func typeConverters(t *testing.T) []managedfields.TypeConverter {
	t.Helper()
	files, err := filepath.Glob("../config/crd/mesh.bulkhead.dev_*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no CRDs: %v", err)
	}
	schemas := map[string]*spec.Schema{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd apiextensionsv1.CustomResourceDefinition
		if err := yaml.Unmarshal(data, &crd); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, v := range crd.Spec.Versions {
			raw, err := json.Marshal(v.Schema.OpenAPIV3Schema)
			if err != nil {
				t.Fatal(err)
			}
			schema := &spec.Schema{}
			if err := json.Unmarshal(raw, schema); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			schema.AddExtension("x-kubernetes-group-version-kind", []any{map[string]any{"group": crd.Spec.Group, "version": v.Name, "kind": crd.Spec.Names.Kind}})
			var metadata spec.Schema
			if err := json.Unmarshal([]byte(objectMeta), &metadata); err != nil {
				t.Fatal(err)
			}
			schema.Properties["metadata"] = metadata
			schemas["dev.bulkhead.mesh."+v.Name+"."+crd.Spec.Names.Kind] = schema
		}
	}
	ours, err := managedfields.NewTypeConverter(schemas, false)
	if err != nil {
		t.Fatal(err)
	}
	return []managedfields.TypeConverter{ours, clientgoapply.NewTypeConverter(clientgoscheme.Scheme)}
}

// objectMeta is of metadata what the tests apply.
const objectMeta = `{"type": "object", "properties": {
  "name": {"type": "string"}, "namespace": {"type": "string"}, "resourceVersion": {"type": "string"}, "uid": {"type": "string"},
  "generation": {"type": "integer"}, "managedFields": {"type": "array", "x-kubernetes-list-type": "atomic", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}, "creationTimestamp": {"type": "string"},
  "ownerReferences": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"], "items": {"type": "object", "properties": {
    "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "name": {"type": "string"}, "uid": {"type": "string"}}}}}}`
