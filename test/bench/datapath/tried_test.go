package datapath

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// setting is something of the nodes that a way is measured with, and the others without.
type setting struct{ on, off func() }

// tried are settings that the product leaves alone, decision 48: what the nodes would
// have by them.
func tried(b *testing.B, l *lab.Lab, w way) comparison {
	named := func(name string, s *setting) *way {
		with := w
		with.name, with.setting = name, s
		return &with
	}
	nodes := []*lab.Node{l.Node1, l.Node2}
	rules := func(text string) *setting {
		return &setting{
			on: func() {
				for _, n := range nodes {
					run(b, n.Namespace, text, "nft", "-f", "-")
				}
			},
			off: func() {
				for _, n := range nodes {
					if table := run(b, n.Namespace, "", "nft", "list", "table", "inet", "tried"); strings.Contains(table, "counter packets 0 ") {
						b.Fatalf("nothing met a rule of %s: %s", n.Name, table)
					}
					run(b, n.Namespace, "", "nft", "delete", "table", "inet", "tried")
				}
			},
		}
	}
	const tracked = `table inet tried {
		chain forward { type filter hook forward priority 0; ct state established counter accept; }
	}`
	const untracked = `table inet tried {
		chain prerouting { type filter hook prerouting priority raw; tcp dport 15008 counter notrack; tcp sport 15008 counter notrack; }
		chain forward { type filter hook forward priority 0; ct state untracked counter accept; ct state established accept; }
	}`
	napi := &setting{on: func() { offload(b, nodes, "gro on tso off") }, off: func() { offload(b, nodes, "gro off tso on") }}
	return comparison{"Tried between nodes", "", []*way{
		named("as it is", nil),
		named("nodes track connections", rules(tracked)),
		named("nodes track all but tunnels", rules(untracked)),
		named("NAPI on veths", napi),
		named("NAPI and busy polling", busyPolling(b, nodes, napi, w.processes)),
	}}
}

// offload sets features of the veths of nodes and proxies. A packet passes a veth's NAPI
// where the end that it comes to has GRO and the one that sends it no TSO.
func offload(b *testing.B, nodes []*lab.Node, features string) {
	b.Helper()
	for _, n := range nodes {
		for _, in := range []*lab.Namespace{n.Namespace, n.Proxy("team-a"), n.Proxy("team-b")} {
			var all []net.Interface
			in.Do(b, func() {
				var err error
				all, err = net.Interfaces()
				lab.Check(b, err)
			})
			for _, i := range all {
				if i.Flags&net.FlagLoopback == 0 {
					run(b, in, "", append([]string{"ethtool", "-K", i.Name}, strings.Fields(features)...)...)
				}
			}
		}
	}
}

// busyPolling has all sockets of the machine poll for 50 µs, with another setting.
func busyPolling(b *testing.B, nodes []*lab.Node, with *setting, pids func() []int) *setting {
	// Only the machine's own namespace has them: the one that this process left.
	machine := lab.Enter(b, fmt.Sprintf("/proc/%d/ns/net", os.Getppid()))
	write := func(value string) {
		machine.Do(b, func() { lab.Sysctl(b, "core/busy_poll="+value, "core/busy_read="+value) })
	}
	b.Cleanup(func() { write("0") })
	return &setting{
		on: func() {
			with.on()
			write("50")
		},
		off: func() {
			// Without a NAPI nobody polls; what is polled may be nothing all the same.
			if withNAPI(b, pids()) == 0 {
				b.Fatal("no socket of a proxy knows of a NAPI")
			}
			polled := nodes[0].Proxy("team-a").Counter(b, "TcpExt BusyPollRxPackets")
			fmt.Fprintf(os.Stderr, "polled so far: %d packets of %s's\n", polled, nodes[0].Name)
			write("0")
			with.off()
		},
	}
}

// withNAPI counts the sockets of processes that could poll for what they wait for.
func withNAPI(b *testing.B, pids []int) (n int) {
	b.Helper()
	for _, pid := range pids {
		pidfd, err := unix.PidfdOpen(pid, 0)
		lab.Check(b, err)
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		lab.Check(b, err)
		for _, f := range files {
			number, err := strconv.Atoi(f.Name())
			lab.Check(b, err)
			fd, err := unix.PidfdGetfd(pidfd, number, 0)
			if err != nil {
				continue // closed in the meantime
			}
			if id, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_INCOMING_NAPI_ID); err == nil && id > 0 {
				n++
			}
			unix.Close(fd)
		}
		unix.Close(pidfd)
	}
	return n
}

// run runs a command in a network namespace.
func run(b *testing.B, in *lab.Namespace, input string, command ...string) (said string) {
	b.Helper()
	in.Do(b, func() {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v: %s", command, err, out)
		}
		said = string(out)
	})
	return said
}
