// Command standin is what tests run in Envoy's place: it shows what a program can
// and can't do in a bulkhead. As a proxy it takes its orders from /orders.json
// beside it, one for each generation. As "standin try ORDER TARGETS" it does the
// same wherever it is started.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// orders are what each generation does, and to what.
type orders struct {
	Generations map[string]string
	Targets     targets
}

type targets struct {
	// PID of a process of the node.
	PID int
	// Folder to mount on.
	Folder string
	// Socket is another tenant's xDS socket, Abstract its admin socket.
	Socket, Abstract string
	// Node and Loopback are addresses of the node that somebody listens on.
	Node, Node6, Loopback, Loopback6 string
}

// leaked is what never ends.
var leaked [][]byte

func main() {
	if len(os.Args) == 4 && os.Args[1] == "try" {
		var t targets
		if err := json.Unmarshal([]byte(os.Args[3]), &t); err != nil {
			panic(err)
		}
		report(os.Args[2], t)
		return
	}
	name, generation := whoAmI()
	var o orders
	if err := read("/orders.json", &o); err != nil {
		panic(err)
	}
	switch order := o.Generations[generation]; order {
	case "", "serve":
		serve(generation)
	case "flood":
		go serve(generation)
		line := strings.Repeat("x", 1000)
		for i := 0; ; i++ {
			fmt.Println(i, line)
		}
	case "leak":
		fmt.Println("last words of", name)
		for {
			block := make([]byte, 1<<20)
			for i := 0; i < len(block); i += 4096 {
				block[i] = 1
			}
			leaked = append(leaked, block)
		}
	case "crash":
		fmt.Print("not\x1bprintable\nlast words of ", name, "\n")
		// As a program without Go's handler: the first process of a pid namespace
		// dies of nothing less than a fault.
		var byDefault [4]uintptr
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGSEGV), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
		var nowhere *int
		*nowhere = 1
	case "fail":
		fmt.Println("last words of", name)
		os.Exit(3)
	default:
		report(order, o.Targets)
		serve(generation)
	}
}

func whoAmI() (tenant, generation string) {
	var bootstrap struct{ Node struct{ ID string } }
	if err := read("/etc/envoy.json", &bootstrap); err != nil {
		panic(err)
	}
	tenant, generation, _ = strings.Cut(bootstrap.Node.ID, "/")
	return tenant, generation
}

func read(path string, into any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// serve answers as Envoy's admin interface does, as far as a manager asks.
func serve(generation string) {
	l, err := net.Listen("unix", "@bulkhead-admin-"+generation)
	if err != nil {
		panic(err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		r := bufio.NewReader(c)
		for {
			line, err := r.ReadString('\n')
			if err != nil || line == "\r\n" {
				break
			}
		}
		c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nLIVE\n"))
		c.Close()
	}
}

// report says before what it will do, in case it doesn't live to say what came of it.
func report(order string, t targets) {
	fmt.Println("trying", order)
	if err := try(order, t); err != nil {
		fmt.Println("refused", order+":", err)
		return
	}
	fmt.Println("done", order)
}

func try(order string, t targets) error {
	call := func(number uintptr, args ...uintptr) error {
		args = append(args, 0, 0, 0, 0, 0, 0)
		if _, _, errno := unix.RawSyscall6(number, args[0], args[1], args[2], args[3], args[4], args[5]); errno != 0 {
			return errno
		}
		return nil
	}
	switch order {
	case "ptrace":
		return call(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(t.PID))
	case "mount":
		return unix.Mount("tmpfs", t.Folder, "tmpfs", 0, "")
	case "raw":
		return call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	case "raw6":
		return call(unix.SYS_SOCKET, unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6)
	case "packet":
		return call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW, 0)
	case "netlink":
		return call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	case "bpf":
		attr := struct{ kind, key, value, entries uint32 }{2, 4, 4, 1} // an array
		return call(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	case "userns":
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		if pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		_, err := unix.Wait4(int(pid), nil, 0, nil)
		return err
	case "transparent":
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
			return err
		}
		if on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT); err != nil || on != 1 {
			return fmt.Errorf("it is %d, %v", on, err)
		}
		return nil
	case "xds":
		return dial("unix", t.Socket)
	case "admin":
		return dial("unix", t.Abstract)
	case "processes":
		pids, err := filepath.Glob("/proc/[0-9]*")
		if err == nil && len(pids) < 2 {
			err = fmt.Errorf("there are %d", len(pids))
		}
		return err
	case "signal":
		return unix.Tgkill(t.PID, t.PID, 0)
	case "file":
		_, err := os.Stat("/etc/passwd")
		return err
	case "node":
		return dial("tcp", t.Node)
	case "node6":
		return dial("tcp", t.Node6)
	case "loopback":
		return dial("tcp", t.Loopback)
	case "loopback6":
		return dial("tcp", t.Loopback6)
	}
	return fmt.Errorf("unknown order %s", strconv.Quote(order))
}

func dial(network, address string) error {
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}
