package steer

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Feature is something of the kernel that steering needs.
type Feature struct {
	// Name is for people, with the configuration that it needs.
	Name string
	// Since is the first version of Linux that has it, such as "6.6".
	Since string
	// Probe tries it, and returns the kernel's answer if it isn't there. It changes
	// nothing.
	Probe func() error
}

// Lacking is one error, of one line, that names what of these the kernel doesn't have,
// since which version there is each, and the kernel's own version; nil if it has all.
func Lacking(features []Feature) error {
	var lacking []string
	for _, f := range features {
		if err := f.Probe(); err != nil {
			first, _, _ := strings.Cut(err.Error(), "\n")
			lacking = append(lacking, fmt.Sprintf("%s, in Linux since %s (%s)", f.Name, f.Since, first))
		}
	}
	if len(lacking) == 0 {
		return nil
	}
	version := "of unknown version"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		version = unix.ByteSliceToString(u.Release[:])
	}
	return fmt.Errorf("kernel %s lacks %s", version, strings.Join(lacking, "; "))
}
