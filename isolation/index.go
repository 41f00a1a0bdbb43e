package isolation

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// indexes numbers tenants. The numbers are on disk, so that a tenant keeps its
// uid over reboots, and are given out in turn, so that a number rests for long
// before it means somebody else. Safe for concurrent use.
type indexes struct {
	path string

	mu   sync.Mutex
	last uint16
	// of holds the index of each tenant, by its name.
	of map[string]uint16
}

type indexFile struct {
	Last    uint16            `json:"last"`
	Tenants map[string]uint16 `json:"tenants"`
}

// openIndexes reads what is there. A file that can't be read starts anew: the
// states of running tenants are reserved afterwards.
func openIndexes(libDir string) (*indexes, error) {
	x := &indexes{path: filepath.Join(libDir, "indexes.json"), of: map[string]uint16{}}
	data, err := os.ReadFile(x.path)
	if errors.Is(err, fs.ErrNotExist) {
		return x, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read indexes: %w", err)
	}
	var file indexFile
	if err := json.Unmarshal(data, &file); err != nil {
		return x, nil
	}
	x.last = file.Last
	taken := map[uint16]bool{}
	for name, index := range file.Tenants {
		if index >= 1 && index <= maxIndex && !taken[index] {
			x.of[name] = index
			taken[index] = true
		}
	}
	return x, nil
}

// acquire returns the index of a tenant, a new one if it has none.
func (x *indexes) acquire(name string) (uint16, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if index, ok := x.of[name]; ok {
		return index, nil
	}
	taken := make(map[uint16]bool, len(x.of))
	for _, index := range x.of {
		taken[index] = true
	}
	for i := range uint16(maxIndex) {
		index := (x.last+i)%maxIndex + 1
		if taken[index] {
			continue
		}
		before := x.last
		x.of[name], x.last = index, index
		if err := x.save(); err != nil {
			delete(x.of, name)
			x.last = before
			return 0, err
		}
		return index, nil
	}
	return 0, fmt.Errorf("number tenant %s: all %d indexes are taken", name, maxIndex)
}

// reserve notes what a running tenant has already.
func (x *indexes) reserve(name string, index uint16) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.of[name] == index {
		return nil
	}
	for other, taken := range x.of {
		if taken == index && other != name {
			// Nothing of the other one runs, or it would have come with a state too.
			delete(x.of, other)
		}
	}
	x.of[name] = index
	return x.save()
}

// release gives an index back once nothing of the tenant is left.
func (x *indexes) release(name string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	index, ok := x.of[name]
	if !ok {
		return nil
	}
	delete(x.of, name)
	if err := x.save(); err != nil {
		x.of[name] = index
		return err
	}
	return nil
}

func (x *indexes) save() error {
	data, err := json.Marshal(indexFile{Last: x.last, Tenants: x.of})
	if err != nil {
		return err
	}
	return writeAtomic(x.path, data)
}

// get returns 0 for a tenant without index.
func (x *indexes) get(name string) uint16 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.of[name]
}
