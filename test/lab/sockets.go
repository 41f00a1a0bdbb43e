package lab

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// tcpStates by the kernel's numbers.
var tcpStates = []string{netlink.TCP_ESTABLISHED: "ESTABLISHED", netlink.TCP_SYN_SENT: "SYN-SENT", netlink.TCP_SYN_RECV: "SYN-RECV",
	netlink.TCP_FIN_WAIT1: "FIN-WAIT-1", netlink.TCP_FIN_WAIT2: "FIN-WAIT-2", netlink.TCP_TIME_WAIT: "TIME-WAIT", netlink.TCP_CLOSE: "CLOSE",
	netlink.TCP_CLOSE_WAIT: "CLOSE-WAIT", netlink.TCP_LAST_ACK: "LAST-ACK", netlink.TCP_LISTEN: "LISTEN", netlink.TCP_CLOSING: "CLOSING"}

// describeSockets counts the connections of a network namespace by their states and what
// they have in common, a line for each kind.
func describeSockets(path string) (string, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return "", err
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_INET_DIAG)
	if err != nil {
		return "", err
	}
	defer handle.Close()
	kinds := map[string]int{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		sockets, err := handle.SocketDiagTCP(family)
		if err != nil {
			return "", err
		}
		for _, s := range sockets {
			if s.State == netlink.TCP_LISTEN || int(s.State) >= len(tcpStates) {
				continue
			}
			owner := "of a process"
			if s.INode == 0 {
				owner = "of no process"
			}
			// Clients' ports are each another one; servers' in these tests are below.
			end := func(ip net.IP, port uint16) string {
				if port > 16383 {
					return ip.String()
				}
				return fmt.Sprintf("%s:%d", ip, port)
			}
			kinds[fmt.Sprintf("%s %s, %s to %s", tcpStates[s.State], owner, end(s.ID.Source, s.ID.SourcePort), end(s.ID.Destination, s.ID.DestinationPort))]++
		}
	}
	var b strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Fprintf(&b, "%d %s\n", kinds[kind], kind)
	}
	return b.String(), nil
}
