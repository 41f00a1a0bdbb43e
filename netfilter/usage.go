package netfilter

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Usage returns how full each of the node's sets is that can be filled, by name, those of
// single tenants, too.
func (d *Datapath) Usage() ([]steer.Usage, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	c, err := openLong()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	var all []steer.Usage
	sets := maps.Clone(d.sets)
	maps.Copy(sets, s.flows)
	for name, set := range sets {
		n := len(s.sets[name])
		if dynamic(set) {
			elements, err := c.GetSetElements(set)
			if err != nil {
				return nil, fmt.Errorf("count elements of set %s: %w", name, err)
			}
			n = len(elements)
		}
		all = append(all, steer.Usage{Map: "nftables set " + name, Entries: n, Max: int(set.Size)})
	}
	slices.SortFunc(all, func(a, b steer.Usage) int { return strings.Compare(a.Map, b.Map) })
	return all, nil
}
