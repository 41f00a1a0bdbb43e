package agent

import (
	"time"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// capacityPeriod is the least time between two looks at how full the kernel's maps
// are: each reads all of their keys.
const capacityPeriod = 10 * time.Second

// usageSource tells how full the maps are that a datapath keeps pods and
// connections in. Not every datapath has such.
type usageSource interface {
	Usage() ([]steer.Usage, error)
}

// checkCapacity returns what will be full soon, "" if nothing will.
func (a *Agent) checkCapacity() string {
	source, ok := a.steering().datapath.(usageSource)
	if !ok {
		return ""
	}
	if time.Since(a.capacityAt) < capacityPeriod {
		return a.capacityProblem
	}
	a.capacityAt = time.Now()
	all, err := source.Usage()
	if err == nil {
		err = steer.NearlyFull(all)
	}
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	if problem != "" && a.capacityProblem == "" {
		a.log.Error("the node is about to be full", "error", err)
	}
	a.capacityProblem = problem
	return problem
}
