package bpf

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/oldkernel"
)

// linkCreate is BPF_LINK_CREATE, with which programs of tcx are attached.
const linkCreate = 28

// What a kernel lacks is named, and nothing else.
func TestProbe(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	for _, c := range []struct {
		name        string
		lacks       []oldkernel.Call
		says, isnot string
	}{
		{"this", nil, "", ""},
		{"tcx", []oldkernel.Call{{Number: unix.SYS_BPF, Argument: 0, Value: linkCreate, Answer: unix.EINVAL}}, "lacks tcx links, in Linux since 6.6 (", ";"},
		{"pidfd", []oldkernel.Call{{Number: unix.SYS_PIDFD_GETFD, Argument: -1, Answer: unix.ENOSYS}}, "lacks pidfd_getfd, in Linux since 5.6 (function not implemented)", ";"},
		{"bpf", []oldkernel.Call{{Number: unix.SYS_BPF, Argument: -1, Answer: unix.EPERM}}, "longest-prefix maps, in Linux since 4.11 (", "pidfd_getfd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := oldkernel.Says(t, Probe, c.lacks...)
			if (got == "") != (c.says == "") || !strings.Contains(got, c.says) || c.isnot != "" && strings.Contains(got, c.isnot) || strings.Contains(got, "\n") {
				t.Errorf("it says %q, want %q", got, c.says)
			}
		})
	}
}
