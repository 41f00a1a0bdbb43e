package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
)

// ServerOptions say where a server listens. An empty address is not served.
type ServerOptions struct {
	HTTP, GRPC, Greet, Bulk string
	// Grace is how long requests may take to end after Serve's context did.
	// Default 5 s.
	Grace time.Duration
	Log   *slog.Logger
	// ready gets the addresses by protocol once all are listened on.
	ready func(map[string]string)
}

// Serve runs the server until ctx ends, then lets requests end and closes what
// is left. It returns an error if it cannot listen or a listener fails.
func Serve(ctx context.Context, opts ServerOptions) error {
	if opts.Grace == 0 {
		opts.Grace = 5 * time.Second
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	httpServer := newHTTPServer()
	grpcServer := newGRPCServer()
	greet := &tcpServer{handle: serveGreeting}
	bulk := &tcpServer{handle: serveBulk}
	services := []struct {
		name, addr string
		serve      func(net.Listener) error
	}{
		{"http", opts.HTTP, httpServer.Serve},
		{"grpc", opts.GRPC, grpcServer.Serve},
		{"tcp", opts.Greet, greet.serve},
		{"bulk", opts.Bulk, bulk.serve},
	}
	listeners := make([]net.Listener, len(services))
	addresses := map[string]string{}
	for i, s := range services {
		if s.addr == "" {
			continue
		}
		// "tcp" on an address without an IP takes both families.
		l, err := net.Listen("tcp", s.addr)
		if err != nil {
			for _, l := range listeners[:i] {
				if l != nil {
					l.Close()
				}
			}
			return fmt.Errorf("serve %s: %w", s.name, err)
		}
		listeners[i] = l
		addresses[s.name] = l.Addr().String()
	}
	failed := make(chan error, len(services))
	var running sync.WaitGroup
	for i, s := range services {
		if listeners[i] == nil {
			continue
		}
		running.Go(func() {
			err := s.serve(listeners[i])
			if err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
				failed <- fmt.Errorf("serve %s: %w", s.name, err)
			}
		})
	}
	opts.Log.Info("serving", "addresses", addresses)
	if opts.ready != nil {
		opts.ready(addresses)
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	stopAll(opts.Grace, httpServer, grpcServer, greet, bulk)
	running.Wait()
	return err
}

func stopAll(grace time.Duration, httpServer *http.Server, grpcServer *grpc.Server, tcp ...*tcpServer) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	var stopping sync.WaitGroup
	stopping.Go(func() {
		if httpServer.Shutdown(ctx) != nil {
			httpServer.Close()
		}
	})
	stopping.Go(func() {
		stopped := context.AfterFunc(ctx, grpcServer.Stop)
		grpcServer.GracefulStop()
		stopped()
	})
	for _, s := range tcp {
		s.close()
	}
	stopping.Wait()
}

// tcpServer accepts connections and ends them all when it is closed.
type tcpServer struct {
	handle func(net.Conn) error

	mu       sync.Mutex
	closed   bool
	listener net.Listener
	conns    map[net.Conn]struct{}
	running  sync.WaitGroup
}

func (s *tcpServer) serve(l net.Listener) error {
	s.mu.Lock()
	s.listener, s.conns = l, map[net.Conn]struct{}{}
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return l.Close()
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		if !s.add(conn) {
			conn.Close()
			continue
		}
		s.running.Go(func() {
			defer s.remove(conn)
			// What a client does to its connection is the client's to report.
			_ = s.handle(conn)
		})
	}
}

func (s *tcpServer) add(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.conns[conn] = struct{}{}
	}
	return !s.closed
}

func (s *tcpServer) remove(conn net.Conn) {
	conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
}

func (s *tcpServer) close() {
	s.mu.Lock()
	s.closed = true
	if s.listener != nil {
		s.listener.Close()
	}
	for conn := range s.conns {
		conn.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
}
