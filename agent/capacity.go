package agent

import (
	"time"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// capacityPeriod is the least time between two looks at how full the kernel's maps
// are: each reads all of their keys.
const capacityPeriod = 10 * time.Second

// checkCapacity returns what will be full soon, "" if nothing will.
func (a *Agent) checkCapacity() string {
	if time.Since(a.capacityAt) < capacityPeriod {
		return a.capacityProblem
	}
	a.capacityAt = time.Now()
	all, err := a.datapath.Usage()
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
