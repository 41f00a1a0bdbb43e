// Package cluster finds the cluster that a command is about, as kubectl does.
package cluster

import (
	"fmt"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Flags say which cluster and namespace. The zero value is the current context.
type Flags struct {
	Kubeconfig, Context, Namespace string
	AllNamespaces                  bool
}

// AddTo adds kubectl's flags of these names.
func (f *Flags) AddTo(flags *pflag.FlagSet) {
	flags.StringVar(&f.Kubeconfig, "kubeconfig", "", "file that says how to reach the cluster (default as kubectl's)")
	flags.StringVar(&f.Context, "context", "", "context in it (default the current one)")
	flags.StringVarP(&f.Namespace, "namespace", "n", "", "namespace (default the context's)")
	flags.BoolVarP(&f.AllNamespaces, "all-namespaces", "A", false, "all namespaces")
}

// Connect returns a client, and the namespace: "" is all.
func (f *Flags) Connect() (client.Client, string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.Kubeconfig
	overrides := &clientcmd.ConfigOverrides{CurrentContext: f.Context}
	overrides.Context.Namespace = f.Namespace
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, "", fmt.Errorf("find the cluster: %w", err)
	}
	namespace := ""
	if !f.AllNamespaces {
		if namespace, _, err = loader.Namespace(); err != nil {
			return nil, "", fmt.Errorf("find the namespace: %w", err)
		}
	}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, "", err
	}
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, "", fmt.Errorf("reach the API server: %w", err)
	}
	return c, namespace, nil
}
