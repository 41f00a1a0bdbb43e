package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/bulkhead-mesh/bulkhead/hack/cluster/machine"
)

// running reports whether all machines of the cluster run.
func (c cluster) running() bool {
	for n := 0; n <= c.Nodes; n++ {
		if _, ok, err := machine.Find(c.machineDir(n)); err != nil || !ok {
			return false
		}
	}
	return true
}

// down ends and removes all of the cluster, also what a half-finished up left.
// The machines are found by what is on disk: more may run than up came to record.
func (c cluster) down() error {
	var errs []error
	// Workers first: their kubelets say goodbye to the API server.
	for n := maxNodes; n >= 0; n-- {
		dir := c.machineDir(n)
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := machine.Stop(dir); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", filepath.Base(dir), err))
		}
	}
	errs = append(errs, c.unplug(), c.unmergeKubeconfig(), c.unlinkKubectl())
	for name, value := range c.Restore {
		errs = append(errs, restoreSysctl(name, value))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the state stays, so that down can be tried again
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	// Fails if other clusters are there.
	os.Remove(stateDir())
	return nil
}

// otherClusters tells whether there is more than one.
func otherClusters() (bool, error) {
	all, err := filepath.Glob(filepath.Join(stateDir(), "*", "cluster.json"))
	return len(all) > 1, err
}

// restoreSysctl sets a value of the whole machine back, unless another cluster
// still needs it.
func restoreSysctl(name, value string) error {
	if others, err := otherClusters(); err != nil || others {
		return err
	}
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("restore sysctl %s: %w", name, err)
	}
	return nil
}

// keepLogs moves the machines' logs to where down doesn't remove them.
func (c cluster) keepLogs() string {
	kept := filepath.Join(os.TempDir(), c.context()+"-logs")
	os.RemoveAll(kept)
	for n := 0; n <= c.Nodes; n++ {
		to := filepath.Join(kept, filepath.Base(c.machineDir(n)))
		logs, _ := filepath.Glob(filepath.Join(c.machineDir(n), "log", "*.log"))
		for _, l := range logs {
			copyFile(l, filepath.Join(to, filepath.Base(l)), 0o600)
		}
	}
	return kept
}
