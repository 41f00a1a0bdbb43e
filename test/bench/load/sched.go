package load

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Sched is what the scheduler did with processes.
type Sched struct {
	// Ran and Waited are for how long all of their threads ran, and had to wait for a
	// CPU though they could; Turns is how often they got one.
	Ran, Waited time.Duration
	Turns       int64
}

// Minus is what was done since.
func (s Sched) Minus(o Sched) Sched {
	return Sched{s.Ran - o.Ran, s.Waited - o.Waited, s.Turns - o.Turns}
}

// ReadSched adds up processes' threads. Those that have ended aren't in it.
func ReadSched(pids ...int) (s Sched, err error) {
	for _, pid := range pids {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(files) == 0 {
			return s, fmt.Errorf("process %d isn't there", pid)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				return s, err
			}
			var ran, waited, turns int64
			if _, err := fmt.Fscan(bytes.NewReader(b), &ran, &waited, &turns); err != nil {
				return s, fmt.Errorf("read %s: %w", file, err)
			}
			s.Ran, s.Waited, s.Turns = s.Ran+time.Duration(ran), s.Waited+time.Duration(waited), s.Turns+turns
		}
	}
	return s, nil
}
