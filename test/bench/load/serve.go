package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// bulkBlock is what one system call moves.
const bulkBlock = 256 << 10

// server is all connections to both ports.
type server struct {
	epoll         int
	requests      int // the listening sockets
	bulk          int
	http          int
	conns         []served // by file descriptor
	buffer, large []byte
}

type served struct {
	bulk, http bool
	// got are the bytes of the request that isn't complete, or of the stream.
	got int64
}

// Serve answers requests at RequestPort, HTTPPort and HTTP2Port and counts streams at
// BulkPort, on all addresses of both families, until the process ends. ready is called
// when it listens.
func Serve(ready func()) error {
	s := &server{conns: make([]served, maxFiles), buffer: make([]byte, 4096), large: make([]byte, bulkBlock)}
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("create epoll: %w", err)
	}
	if s.requests, err = s.listen(RequestPort); err != nil {
		return err
	}
	if s.bulk, err = s.listen(BulkPort); err != nil {
		return err
	}
	if s.http, err = s.listen(HTTPPort); err != nil {
		return err
	}
	if err := serve2(); err != nil {
		return err
	}
	ready()
	events := make([]unix.EpollEvent, 128)
	for {
		n, err := unix.EpollWait(s.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if fd := int(e.Fd); fd == s.requests || fd == s.bulk || fd == s.http {
				err = s.accept(fd)
			} else {
				err = s.handle(fd, &s.conns[fd])
			}
			if err != nil {
				return err
			}
		}
	}
}

func (s *server) listen(port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet6{Port: port})
	}
	if err == nil {
		err = unix.Listen(fd, 4096)
	}
	if err != nil {
		return 0, fmt.Errorf("listen on port %d: %w", port, err)
	}
	return fd, s.watch(fd)
}

func (s *server) watch(fd int) error {
	return unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (s *server) accept(listener int) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ECONNABORTED) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return fmt.Errorf("set TCP_NODELAY: %w", err)
		}
		if fd >= maxFiles {
			return fmt.Errorf("file descriptor %d: too many", fd)
		}
		s.conns[fd] = served{bulk: listener == s.bulk, http: listener == s.http}
		if err := s.watch(fd); err != nil {
			return fmt.Errorf("watch a connection: %w", err)
		}
	}
}

// handle reads once. What is wrong with a client ends its connection, and the
// client says so.
func (s *server) handle(fd int, c *served) error {
	buffer := s.buffer
	if c.bulk {
		buffer = s.large
	}
	n, err := unix.Read(fd, buffer)
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	if err != nil {
		return unix.Close(fd)
	}
	if c.bulk {
		c.got += int64(n)
		if n == 0 {
			unix.Write(fd, binary.BigEndian.AppendUint64(nil, uint64(c.got)))
			return unix.Close(fd)
		}
		return nil
	}
	if c.http {
		// Whatever a proxy made of the request, it comes in one piece.
		if n == 0 || !bytes.HasPrefix(buffer[:n], []byte("GET / HTTP/1.1\r\n")) || !bytes.HasSuffix(buffer[:n], []byte("\r\n\r\n")) {
			return unix.Close(fd)
		}
		if n, err := unix.Write(fd, answer); err != nil || n != len(response) {
			return unix.Close(fd)
		}
		return nil
	}
	rest := request[c.got:]
	if n == 0 || n > len(rest) || string(buffer[:n]) != rest[:n] {
		return unix.Close(fd)
	}
	if c.got += int64(n); c.got < int64(len(request)) {
		return nil
	}
	c.got = 0
	if n, err := unix.Write(fd, answer); err != nil || n != len(response) {
		return unix.Close(fd)
	}
	return nil
}
