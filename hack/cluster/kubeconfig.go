package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

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

// linkDir is where a kubectl is put if PATH has none.
const linkDir = "/usr/local/bin"

// linkKubectl gives a user without kubectl the cluster's own.
func (c *cluster) linkKubectl(kubectl string) error {
	if _, err := exec.LookPath("kubectl"); err == nil {
		return nil
	}
	if !slices.Contains(filepath.SplitList(os.Getenv("PATH")), linkDir) {
		say("there is no kubectl in PATH; this one fits: %s", kubectl)
		return nil
	}
	// On record first, so that down finds it whatever happens.
	c.Kubectl = filepath.Join(linkDir, "kubectl")
	if err := c.save(); err != nil {
		return err
	}
	// What is there isn't a program, or PATH would have it.
	if info, err := os.Lstat(c.Kubectl); err == nil && info.Mode()&os.ModeSymlink != 0 {
		if err := os.Remove(c.Kubectl); err != nil {
			return err
		}
	}
	if err := os.Symlink(kubectl, c.Kubectl); err != nil {
		return fmt.Errorf("link kubectl: %w", err)
	}
	say("kubectl: %s, until down", c.Kubectl)
	return nil
}

// unlinkKubectl removes the link, unless it leads elsewhere by now or another
// cluster is there to be used by it.
func (c cluster) unlinkKubectl() error {
	if c.Kubectl == "" {
		return nil
	}
	others, err := otherClusters()
	if err != nil || others {
		return err
	}
	target, err := os.Readlink(c.Kubectl)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	cache, cacheErr := cacheDir()
	if err != nil || cacheErr != nil || !strings.HasPrefix(target, cache+string(filepath.Separator)) {
		return nil // somebody put another there
	}
	return os.Remove(c.Kubectl)
}
