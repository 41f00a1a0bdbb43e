package main

import (
	"errors"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// userKubeconfig is where kubectl finds the cluster by itself; nil if the user
// chose another file, which is left alone.
func userKubeconfig() *clientcmd.PathOptions {
	if os.Getenv(clientcmd.RecommendedConfigPathEnvVar) != "" {
		return nil
	}
	return clientcmd.NewDefaultPathOptions()
}

// mergeKubeconfig makes the cluster kubectl's current context.
func (c *cluster) mergeKubeconfig() error {
	say("kubeconfig: %s", c.kubeconfig())
	user := userKubeconfig()
	if user == nil {
		say("KUBECONFIG is set, so kubectl goes on using that: %s", os.Getenv(clientcmd.RecommendedConfigPathEnvVar))
		return nil
	}
	own, err := clientcmd.LoadFromFile(c.kubeconfig())
	if err != nil {
		return err
	}
	all, err := user.GetStartingConfig()
	if err != nil {
		return err
	}
	name := c.context()
	if all.CurrentContext != name {
		c.Context = all.CurrentContext
		if err := c.save(); err != nil {
			return err
		}
	}
	from := own.Contexts[own.CurrentContext]
	server, admin := own.Clusters[from.Cluster], own.AuthInfos[from.AuthInfo]
	// Or they would be written back to where they came from.
	server.LocationOfOrigin, admin.LocationOfOrigin = "", ""
	all.Clusters[name], all.AuthInfos[name] = server, admin
	all.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	all.CurrentContext = name
	return clientcmd.ModifyConfig(user, *all, false)
}

// unmergeKubeconfig takes the cluster out again.
func (c cluster) unmergeKubeconfig() error {
	user := userKubeconfig()
	if user == nil {
		return nil
	}
	file := user.GetDefaultFilename()
	if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	all, err := clientcmd.LoadFromFile(file)
	if err != nil {
		return err
	}
	name := c.context()
	if _, ok := all.Contexts[name]; !ok {
		return nil
	}
	delete(all.Clusters, name)
	delete(all.AuthInfos, name)
	delete(all.Contexts, name)
	if all.CurrentContext == name {
		all.CurrentContext = c.Context
	}
	if len(all.Contexts)+len(all.Clusters)+len(all.AuthInfos) == 0 {
		return os.Remove(file)
	}
	return clientcmd.WriteToFile(*all, file)
}
