package bpf

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Probe returns what the kernel lacks for the steering, each by name, joined; nil
// if nothing. It needs root and changes nothing.
func Probe() error {
	probes := []struct {
		name string
		run  func() error
	}{
		{"BPF programs on network devices (CONFIG_NET_CLS_ACT)", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
		{"tcx links (Linux 6.6)", probeTCX},
		{"bpf_redirect_peer", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectPeer) }},
		{"sk_lookup programs", func() error { return features.HaveProgramType(ebpf.SkLookup) }},
		{"bpf_sk_assign in sk_lookup", func() error { return features.HaveProgramHelper(ebpf.SkLookup, asm.FnSkAssign) }},
		{"socket maps (CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG)", func() error { return features.HaveMapType(ebpf.SockMap) }},
		{"hash maps per CPU", func() error { return features.HaveMapType(ebpf.PerCPUHash) }},
		{"ring buffers", func() error { return features.HaveMapType(ebpf.RingBuf) }},
		{"longest-prefix maps", func() error { return features.HaveMapType(ebpf.LPMTrie) }},
		{"sockops programs on cgroups (CONFIG_CGROUP_BPF)", func() error { return features.HaveProgramType(ebpf.SockOps) }},
		{"list of sockets (CONFIG_INET_DIAG)", probeSocketList},
		{"pidfd_getfd", steer.ProbeListeningSockets},
	}
	var lacking []error
	for _, p := range probes {
		if err := p.run(); err != nil {
			lacking = append(lacking, fmt.Errorf("kernel lacks %s: %w", p.name, err))
		}
	}
	return errors.Join(lacking...)
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
