package netfilter

import (
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/oldkernel"
)

// What a kernel lacks is named, and nothing else.
func TestProbe(t *testing.T) {
	if testing.Short() {
		t.Skip("needs root: make test-kernel")
	}
	probe := func() error {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return Probe()
	}
	for _, c := range []struct {
		name        string
		lacks       []oldkernel.Call
		says, isnot string
	}{
		{"this", nil, "", ""},
		{"nftables", []oldkernel.Call{{Number: unix.SYS_SOCKET, Argument: 2, Value: unix.NETLINK_NETFILTER, Answer: unix.EPROTONOSUPPORT}},
			"nftables on the way out of a device (CONFIG_NETFILTER_EGRESS), in Linux since 5.16 (", "pidfd_getfd"},
		{"pidfd", []oldkernel.Call{{Number: unix.SYS_PIDFD_GETFD, Argument: -1, Answer: unix.ENOSYS}}, "lacks pidfd_getfd, in Linux since 5.6 (function not implemented)", ";"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := oldkernel.Says(t, probe, c.lacks...)
			if (got == "") != (c.says == "") || !strings.Contains(got, c.says) || c.isnot != "" && strings.Contains(got, c.isnot) || strings.Contains(got, "\n") {
				t.Errorf("it says %q, want %q", got, c.says)
			}
		})
	}
}
