package steer

import (
	"errors"
	"fmt"
)

// ErrNearlyFull says that a map has used more than nine tenths of its entries.
var ErrNearlyFull = errors.New("nearly full")

// Usage is how full one of the kernel's maps is.
type Usage struct {
	// Map is what it is and its name, for example "BPF map pods".
	Map string
	// Entries are used of Max.
	Entries, Max int
}

// NearlyFull returns an ErrNearlyFull for each map that is, naming it, joined; nil
// if none is. What is in a map goes on to work when it is full, but nothing can
// be added: pods that join stay closed.
func NearlyFull(all []Usage) error {
	var errs []error
	for _, u := range all {
		if u.Entries*10 > u.Max*9 {
			errs = append(errs, fmt.Errorf("%s has %d of %d entries: %w; move pods to other nodes", u.Map, u.Entries, u.Max, ErrNearlyFull))
		}
	}
	return errors.Join(errs...)
}
