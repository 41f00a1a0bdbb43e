package bpf

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// The test binary runs itself again: as the node, in mount and network
// namespaces of its own (so that nothing is left behind, however it ends), and
// from there as the tenants' proxies.
const (
	roleVariable = "BULKHEAD_BPF_TEST_ROLE"
	pinParent    = "BULKHEAD_BPF_TEST_FS"
)

func TestMain(m *testing.M) {
	flag.Parse()
	switch role := os.Getenv(roleVariable); role {
	case "":
		if testing.Short() {
			os.Exit(m.Run())
		}
		os.Exit(runNode())
	case "node":
		os.Exit(m.Run())
	default:
		os.Exit(runProxy(role))
	}
}

func runNode() int {
	dir, err := os.MkdirTemp("", "bht-bpf-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.Remove(dir)
	// The namespaces need a thread that lives as long as they.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVariable+"=node", pinParent+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bpf tests need root:", err)
		return 1
	}
	return 0
}

// runProxy stands for Envoy: it prints what it accepts, "port remote local
// worker", and sends its name, which is its role. The canary has two sockets a
// port, as if it had two workers. When its input ends, so do its connections and
// itself.
func runProxy(name string) int {
	listenConfig := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
	}}
	// Like Envoy's: a socket map takes none of multipath TCP.
	listenConfig.SetMultipathTCP(false)
	for i := range 2 * steer.Listeners {
		port, worker := (i / 2).Port(), i%2
		if name == "canary" {
			port = (i / 2).PortOf(1)
		} else if worker > 0 {
			continue
		}
		l, err := listenConfig.Listen(context.Background(), "tcp", fmt.Sprintf("[::]:%d", port))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Printf("%d %s %s %d\n", port, c.RemoteAddr(), c.LocalAddr(), worker)
				go answer(c.(*net.TCPConn), name)
			}
		}()
	}
	fmt.Println("ready")
	// Each line, "from to", is a connection that it makes, and "from to number time" are
	// as many, one after the other, as it can make in the time.
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		f := strings.Fields(lines.Text())
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f[0]))}
		if len(f) == 4 {
			fmt.Println(churned, churn(d, f[1], f[2], f[3]))
		} else if c, err := d.Dial("tcp", f[1]); err != nil {
			fmt.Fprintln(os.Stderr, name, err)
		} else {
			defer c.Close()
		}
	}
	return 0
}

// churned begins the line that says how many connections were made.
const churned = "churned"

// churn makes connections and resets them when they are greeted.
func churn(d net.Dialer, to, number, lasts string) (made int64) {
	most, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		panic(err)
	}
	length, err := time.ParseDuration(lasts)
	if err != nil {
		panic(err)
	}
	end := time.Now().Add(length)
	var begun, finished atomic.Int64
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for begun.Add(1) <= most && time.Now().Before(end) {
				c, err := d.Dial("tcp", to)
				if err == nil {
					_, err = c.Read(make([]byte, 1))
					c.(*net.TCPConn).SetLinger(0)
					c.Close()
				}
				if err != nil {
					fmt.Fprintln(os.Stderr, "churn:", err)
					return
				}
				finished.Add(1)
			}
		})
	}
	workers.Wait()
	return finished.Load()
}

// Ports that a proxy serves in another way than the others.
const (
	closedPort = 9001 + iota // at once, before a byte
	resetPort                // likewise
	brokenPort               // after an answer, with the client's next line
	slowPort                 // answered after slowAnswer
	silentPort               // never answered
)

const slowAnswer = 100 * time.Millisecond

func answer(c *net.TCPConn, name string) {
	defer c.Close()
	switch c.LocalAddr().(*net.TCPAddr).Port {
	case closedPort:
		return
	case resetPort:
		c.SetLinger(0)
		return
	case brokenPort:
		io.WriteString(c, name+"\n")
		line(c)
		c.SetLinger(0)
		return
	case slowPort:
		time.Sleep(slowAnswer)
	case silentPort:
		io.Copy(io.Discard, c)
		return
	}
	io.WriteString(c, name+"\n")
	io.Copy(c, c)
}

// proxy is a running runProxy.
type proxy struct {
	pid      int
	accepted chan string
	stdin    io.Writer
	stop     func()
}

func startProxy(t *testing.T, netns *namespace, name string) *proxy {
	t.Helper()
	return startProxyIn(t, netns, name, "")
}

// startProxyIn starts it in a cgroup of version 2.
func startProxyIn(t *testing.T, netns *namespace, name, cgroup string) *proxy {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+name)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	check(t, err)
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	if cgroup != "" {
		dir, err := os.Open(cgroup)
		check(t, err)
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	netns.do(t, func() { check(t, cmd.Start()) })
	p := &proxy{pid: cmd.Process.Pid, accepted: make(chan string, 4096), stdin: stdin}
	stopped := false
	p.stop = func() {
		if !stopped {
			stopped = true
			stdin.Close()
			cmd.Wait()
		}
	}
	t.Cleanup(p.stop)
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatalf("proxy %s didn't start: %q", name, lines.Text())
	}
	go func() {
		for lines.Scan() {
			p.accepted <- lines.Text()
		}
	}()
	return p
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
