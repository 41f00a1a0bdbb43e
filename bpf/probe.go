package bpf

import (
	"errors"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	have "github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Probe returns one error that names what the kernel lacks for the steering, and since
// which version there is each; nil if it lacks nothing. It needs root and changes
// nothing.
func Probe() error { return steer.Lacking(features()) }

func features() []steer.Feature {
	program := func(t ebpf.ProgramType) func() error { return func() error { return have.HaveProgramType(t) } }
	helper := func(t ebpf.ProgramType, f asm.BuiltinFunc) func() error {
		return func() error { return have.HaveProgramHelper(t, f) }
	}
	kind := func(t ebpf.MapType) func() error { return func() error { return have.HaveMapType(t) } }
	return []steer.Feature{
		{Name: "BPF programs on network devices (CONFIG_NET_CLS_ACT)", Since: "4.1", Probe: program(ebpf.SchedCLS)},
		{Name: "tcx links", Since: "6.6", Probe: probeTCX},
		{Name: "bpf_redirect_peer", Since: "5.10", Probe: helper(ebpf.SchedCLS, asm.FnRedirectPeer)},
		{Name: "sk_lookup programs", Since: "5.9", Probe: program(ebpf.SkLookup)},
		{Name: "bpf_sk_assign in sk_lookup", Since: "5.9", Probe: helper(ebpf.SkLookup, asm.FnSkAssign)},
		{Name: "socket maps (CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG)", Since: "4.14", Probe: kind(ebpf.SockMap)},
		{Name: "hash maps per CPU", Since: "4.6", Probe: kind(ebpf.PerCPUHash)},
		{Name: "ring buffers", Since: "5.8", Probe: kind(ebpf.RingBuf)},
		{Name: "longest-prefix maps", Since: "4.11", Probe: kind(ebpf.LPMTrie)},
		{Name: "sockops programs on cgroups (CONFIG_CGROUP_BPF)", Since: "4.13", Probe: program(ebpf.SockOps)},
		{Name: "list of sockets (CONFIG_INET_DIAG)", Since: "3.3", Probe: probeSocketList},
		{Name: "pidfd_getfd", Since: "5.6", Probe: steer.ProbeListeningSockets},
	}
}

// probeTCX attaches to a device that doesn't exist: a kernel that knows tcx says so.
func probeTCX() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		License:      "GPL",
	})
	if err != nil {
		return err
	}
	defer p.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: p, Attach: ebpf.AttachTCXIngress})
	if err == nil {
		return errors.Join(errors.New("attached to a device that doesn't exist"), l.Close())
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func probeSocketList() error {
	_, err := netlink.SocketDiagTCP(unix.AF_INET)
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil
	}
	return err
}
