package bpf

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// otherProgram is another's, that counts packets of TCP by their mark: 0 for
// none, 1 for any.
func otherProgram(t *testing.T, ifindex int, at ebpf.AttachType) (seen func() (unmarked, marked uint64)) {
	t.Helper()
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 2})
	check(t, err)
	t.Cleanup(func() { counts.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -8),
		asm.StoreImm(asm.R10, -8, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, 8, asm.Word), // mark
		asm.JEq.Imm(asm.R3, 0, "look"),
		asm.StoreImm(asm.R10, -8, 1, asm.Word),
		asm.LoadMapPtr(asm.R1, counts.FD()).WithSymbol("look"),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
		asm.Return(),
	}})
	check(t, err)
	t.Cleanup(func() { p.Close() })
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: at})
	check(t, err)
	t.Cleanup(func() { l.Close() })
	return func() (unmarked, marked uint64) {
		check(t, counts.Lookup(uint32(0), &unmarked))
		check(t, counts.Lookup(uint32(1), &marked))
		return unmarked, marked
	}
}

// Another's programs on the pod's veth, from before ours and after them, see what
// passes the node as the pod's, and neither our mark nor what goes to the tenant.
func TestOtherPrograms(t *testing.T) {
	for name, options := range map[string]Options{
		"all bits of the mark": {},
		"one bit of the mark":  {Mark: 0x100, MarkMask: 0x100},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t)
			check(t, m.d.Close())
			options.PinDir = m.pinDir
			var err error
			m.d, err = Open(options)
			check(t, err)
			t.Cleanup(func() { m.d.Close() })
			serve(t, m.remote, 80)
			d := m.pod("d", 1, addresses("10.77.0.40", "fd77::40"), false)
			before := otherProgram(t, d.Ifindex, ebpf.AttachTCXIngress)
			check(t, m.d.UpdatePod(d.Pod))
			after := otherProgram(t, d.Ifindex, ebpf.AttachTCXIngress)
			m.greets("steered", d.namespace, at(remoteAddresses.v4, 80), "proxy1")
			if n, marked := after(); marked != 0 || n > 10 {
				t.Errorf("after ours: %d packets, %d with a mark, of a connection that the tenant has", n, marked)
			}
			c, greeting, err := dial(t, m.one.namespace, at(d.v4, 0), at(remoteAddresses.v4, 80))
			if err != nil || greeting != "app 10.77.0.40" {
				t.Fatalf("%q, %v", greeting, err)
			}
			check(t, echo(c, 10_000))
			for name, seen := range map[string]func() (uint64, uint64){"attached before ours": before, "attached after ours": after} {
				if n, marked := seen(); n < 4 || marked != 0 {
					t.Errorf("%s: %d packets as the pod, %d with a mark", name, n, marked)
				}
			}
		})
	}
	for _, o := range []Options{{MarkMask: 1}, {Mark: 1}, {Mark: 3, MarkMask: 1}} {
		if _, err := Open(o); err == nil || !strings.Contains(err.Error(), "mark") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// A node whose firewall forwards nothing but what it is told: what a tenant sends
// as the pod is treated as the pod's, what goes to the tenant isn't forwarded.
func TestFirewall(t *testing.T) {
	m := newMesh(t)
	serve(t, m.remote, 80)
	serve(t, m.a.namespace, 8080)
	nft(t, `table inet bht { chain forward { type filter hook forward priority 0; policy drop; }; }`)
	t.Cleanup(func() { exec.Command("nft", "delete table inet bht").Run() })
	eachFamily(t, func(t *testing.T, family int) {
		remote := at(remoteAddresses.of(family), 80)
		m.greets("dropping all", m.a.namespace, remote, "proxy1")
		_, greeting, err := dial(t, m.one.namespace, at(remote.Addr(), 0), at(m.a.of(family), 8080))
		if err != nil {
			t.Errorf("delivery: %q, %v", greeting, err)
		}
		rules := map[int]string{4: "ip saddr 10.77.0.2", 6: "ip6 saddr fd77::2"}
		counted := "iifname " + m.a.veth + " " + rules[family] + " tcp dport 80 accept"
		// The source and the veth that the firewall sees are the pod's.
		nft(t, "add rule inet bht forward ct state established accept")
		if _, greeting, err := dialBriefly(t, m.one.namespace, at(m.a.of(family), 0), remote); err == nil {
			t.Errorf("passed the firewall: %q", greeting)
		}
		nft(t, "add rule inet bht forward "+counted)
		_, greeting, err = dial(t, m.one.namespace, at(m.a.of(family), 0), remote)
		if err != nil || greeting != "app "+m.a.of(family).String() {
			t.Errorf("allowed: %q, %v", greeting, err)
		}
		nft(t, "add rule inet bht forward oifname "+m.a.veth+" tcp dport 8081 accept")
		m.greets("allowed", m.remote, at(m.a.of(family), 8081), "proxy1")
	})
}

func nft(t *testing.T, command string) {
	t.Helper()
	if out, err := exec.Command("nft", command).CombinedOutput(); err != nil {
		t.Fatalf("nft (of the package nftables) %s: %v: %s", command, err, out)
	}
}

// dialBriefly is dial for what must not come about.
func dialBriefly(t *testing.T, n *namespace, from, to netip.AddrPort) (any, string, error) {
	t.Helper()
	former := patience
	patience = former / 40
	defer func() { patience = former }()
	c, greeting, err := dial(t, n, from, to)
	return c, greeting, err
}
