// Package load makes load and bears it. Each end is one thread with few system
// calls a request, so that what is measured is mostly what lies between; both
// check every byte, and the first error ends the run.
package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Ports of Serve.
const (
	RequestPort = 9100
	BulkPort    = 9101
	// HTTPPort answers requests that proxies have read and written anew, HTTP2Port
	// those of HTTP/2, gRPC among them.
	HTTPPort  = 9102
	HTTP2Port = 9103
)

// Protocol is what Run speaks.
type Protocol string

// The protocols.
const (
	Opaque Protocol = "" // bytes that arrive as they were sent
	HTTP1  Protocol = "HTTP/1.1"
	HTTP2  Protocol = "HTTP/2"
	GRPC   Protocol = "gRPC"
)

// What goes each way: no proxy here reads it, but it has the size of small HTTP.
const (
	request  = "GET / HTTP/1.1\r\nHost: server\r\nUser-Agent: bench\r\n\r\n"
	response = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
)

// The same, to send.
var question, answer = []byte(request), []byte(response)

// maxFiles bounds the file descriptors at either end.
const maxFiles = 4096

// patience with an answer; longer is an error.
const patience = 5 * time.Second

// Options of Run.
type Options struct {
	// To is where a Serve is.
	To netip.AddrPort
	// From is the pod's own address. Of Scan only.
	From netip.Addr
	// Connections at the same time, each with one request under way. Not of Bulk.
	Connections int
	Protocol    Protocol
	// New makes a connection for each request. Of Opaque only.
	New bool
	// Bulk sends one stream as fast as it goes.
	Bulk bool
	// Duration of the measurement.
	Duration time.Duration
	// Processes whose CPU time is told apart, by PID.
	Processes []int
}

// Result is what Run measured.
type Result struct {
	Requests int `json:"requests"`
	// Bytes of Bulk that the server has counted.
	Bytes    int64         `json:"bytes"`
	Duration time.Duration `json:"duration"`
	// P50 and P99 of the time from a request, or from the connect with New, to its
	// answer.
	P50 time.Duration `json:"p50"`
	P99 time.Duration `json:"p99"`
	CPU CPU           `json:"cpu"`
}

// Run makes the load.
func Run(o Options) (Result, error) {
	if o.Bulk {
		return bulk(o)
	}
	if o.Protocol == HTTP2 || o.Protocol == GRPC {
		return requests2(o)
	}
	return requests(o)
}

// client is all of a run's connections.
type client struct {
	o       Options
	epoll   int
	began   []time.Time // by file descriptor
	got     []int       // bytes of the answer, by file descriptor
	buffer  []byte
	samples []uint32 // nanoseconds
	stop    bool
	open    int
}

func requests(o Options) (r Result, err error) {
	c := &client{o: o, began: make([]time.Time, maxFiles), got: make([]int, maxFiles), buffer: make([]byte, 4096),
		samples: make([]uint32, 0, int(o.Duration.Seconds()*200_000)+1000)}
	if c.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return r, fmt.Errorf("create epoll: %w", err)
	}
	defer unix.Close(c.epoll)
	before, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	began := time.Now()
	for range o.Connections {
		if err := c.connect(); err != nil {
			return r, err
		}
	}
	events := make([]unix.EpollEvent, o.Connections)
	for c.open > 0 {
		n, err := unix.EpollWait(c.epoll, events, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return r, fmt.Errorf("wait for answers on %d connections: %d came, %w", c.open, n, errors.Join(err, unix.ETIMEDOUT))
		}
		now := time.Now()
		// The requests under way are let end.
		c.stop = now.Sub(began) >= o.Duration
		for _, e := range events[:n] {
			if err := c.handle(int(e.Fd), e.Events); err != nil {
				return r, fmt.Errorf("request %d: %w", len(c.samples)+1, err)
			}
		}
	}
	r.Duration = time.Since(began)
	after, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	r.CPU = after.minus(before)
	r.count(c.samples)
	return r, nil
}

// count takes in how long each request took, in nanoseconds.
func (r *Result) count(samples []uint32) {
	slices.Sort(samples)
	r.Requests = len(samples)
	if r.Requests > 0 {
		r.P50 = time.Duration(samples[r.Requests/2])
		r.P99 = time.Duration(samples[r.Requests*99/100])
	}
}

// connect begins a connection.
func (c *client) connect() error {
	now := time.Now()
	fd, err := connect(c.o.To, unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	if fd >= len(c.began) {
		return fmt.Errorf("file descriptor %d: too many", fd)
	}
	c.began[fd], c.got[fd] = now, -1
	c.open++
	return unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(fd)})
}

// connect may return while the connection is being made.
func connect(to netip.AddrPort, flags int) (fd int, err error) {
	family, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is4() {
		address.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	} else {
		family, address = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, 0); err != nil {
		return 0, fmt.Errorf("make a socket: %w", err)
	}
	if err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err == nil {
		err = unix.Connect(fd, address)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return 0, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

func (c *client) handle(fd int, events uint32) error {
	if c.got[fd] < 0 {
		e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || e != 0 {
			return fmt.Errorf("connect to %s: %w", c.o.To, errors.Join(err, unix.Errno(e)))
		}
		if err := unix.EpollCtl(c.epoll, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			return fmt.Errorf("change epoll: %w", err)
		}
		if !c.o.New {
			c.began[fd] = time.Now()
		}
		return c.send(fd)
	}
	n, err := unix.Read(fd, c.buffer)
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	if err != nil || n == 0 {
		return fmt.Errorf("read an answer: %d bytes, %w", n, errors.Join(err, unix.Errno(unix.ECONNRESET)))
	}
	if c.o.Protocol == HTTP1 {
		// Proxies may add headers, but such an answer comes in one piece.
		if !bytes.HasPrefix(c.buffer[:n], []byte("HTTP/1.1 200 OK\r\n")) || !bytes.HasSuffix(c.buffer[:n], []byte("\r\n\r\nok\n")) {
			return fmt.Errorf("the answer is %q", c.buffer[:n])
		}
	} else {
		if rest := response[c.got[fd]:]; n > len(rest) || string(c.buffer[:n]) != rest[:n] {
			return fmt.Errorf("the answer goes on with %q", c.buffer[:n])
		}
		if c.got[fd] += n; c.got[fd] < len(response) {
			return nil
		}
	}
	now := time.Now()
	c.samples = append(c.samples, uint32(min(now.Sub(c.began[fd]), patience)))
	if c.o.New || c.stop {
		unix.Close(fd)
		if c.open--; c.stop {
			return nil
		}
		return c.connect()
	}
	c.began[fd] = now
	return c.send(fd)
}

func (c *client) send(fd int) error {
	c.got[fd] = 0
	if n, err := unix.Write(fd, question); err != nil || n != len(request) {
		return fmt.Errorf("send a request: %d bytes, %w", n, err)
	}
	return nil
}

// bulk sends, and has the server say how much it got.
func bulk(o Options) (r Result, err error) {
	fd, err := connect(o.To, 0)
	if err != nil {
		return r, err
	}
	defer unix.Close(fd)
	block := bytes.Repeat([]byte("bulk"), bulkBlock/4)
	before, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	began := time.Now()
	var sent int64
	for time.Since(began) < o.Duration {
		n, err := unix.Write(fd, block)
		if err != nil {
			return r, fmt.Errorf("send after %d bytes: %w", sent, err)
		}
		sent += int64(n)
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return r, fmt.Errorf("end the stream: %w", err)
	}
	var count [8]byte
	for have := 0; have < len(count); {
		n, err := unix.Read(fd, count[have:])
		if err != nil || n == 0 {
			return r, fmt.Errorf("read the server's count: %w", errors.Join(err, unix.Errno(unix.ECONNRESET)))
		}
		have += n
	}
	r.Duration = time.Since(began)
	after, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	r.CPU = after.minus(before)
	if r.Bytes = int64(binary.BigEndian.Uint64(count[:])); r.Bytes != sent {
		return r, fmt.Errorf("the server got %d of %d bytes", r.Bytes, sent)
	}
	return r, nil
}
