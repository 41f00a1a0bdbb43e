package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxTimeout is the longest that a request may be worked on.
	maxTimeout = 2 * time.Minute
	// maxRequests bounds the requests at work: the runtime starts as many plugins
	// as pods start.
	maxRequests = 256
)

// Handler is what the agent does about a sandbox. Its methods are called from
// many goroutines, with a context that ends at the request's deadline or when
// the plugin gives up.
type Handler interface {
	// Add returns once the sandbox's pod is steered; false, nil if it isn't of the
	// mesh.
	Add(ctx context.Context, s Sandbox) (steered bool, err error)
	// Del forgets a sandbox.
	Del(ctx context.Context, s Sandbox) error
	// Check reports what Add would have to do again.
	Check(ctx context.Context, s Sandbox) error
	// GC forgets all sandboxes but these container IDs.
	GC(ctx context.Context, valid []string) error
}

// Server answers the plugin.
type Server struct {
	listener *net.UnixListener
	handler  Handler
	log      *slog.Logger
	slots    chan struct{}
}

// Listen binds the socket, replacing what a former agent left. Its directory is
// made if it isn't there. The caller runs Serve.
func Listen(socket string, h Handler, log *slog.Logger) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	return &Server{listener: l, handler: h, log: log, slots: make(chan struct{}, maxRequests)}, nil
}

// Serve answers requests until ctx ends, then removes the socket, so that the
// plugin sees at once that the agent is away, and waits for requests at work.
func (s *Server) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	var work sync.WaitGroup
	defer work.Wait()
	for {
		c, err := s.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept the CNI plugin: %w", err)
		}
		s.slots <- struct{}{}
		work.Go(func() {
			defer func() { <-s.slots }()
			defer c.Close()
			s.serve(ctx, c)
		})
	}
}

func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	if err := rootOnly(c); err != nil {
		s.log.Warn("connection to the CNI socket refused", "error", err)
		return
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	var r Request
	if err := readMessage(c, &r); err != nil {
		s.log.Warn("request of the CNI plugin unreadable", "error", err)
		return
	}
	timeout := min(max(r.Timeout, 0), maxTimeout)
	c.SetDeadline(time.Now().Add(timeout + 5*time.Second))
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	go func() { // the plugin sends nothing more: the end of its stream is its end
		var b [1]byte
		c.Read(b[:])
		cancel()
	}()
	start := time.Now()
	a := Response{}
	err := r.validate()
	if err == nil {
		switch r.Op {
		case OpAdd:
			a.Steered, err = s.handler.Add(ctx, r.Sandbox)
		case OpDel:
			err = s.handler.Del(ctx, r.Sandbox)
		case OpCheck:
			err = s.handler.Check(ctx, r.Sandbox)
		case OpGC:
			err = s.handler.GC(ctx, r.Valid)
		}
	}
	log := s.log.With("op", r.Op, "pod", r.Sandbox.PodNamespace+"/"+r.Sandbox.PodName, "container", r.Sandbox.ContainerID, "took", time.Since(start).Round(time.Millisecond))
	if err != nil {
		a.Error = err.Error()
		log.Warn("CNI request failed", "error", err)
	} else {
		log.Debug("CNI request served", "steered", a.Steered)
	}
	c.SetWriteDeadline(time.Now().Add(time.Second))
	if err := json.NewEncoder(c).Encode(a); err != nil {
		log.Warn("CNI plugin didn't wait for the answer", "error", err)
	}
}

func rootOnly(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return credErr
	}
	if cred.Uid != 0 && cred.Uid != uint32(os.Getuid()) {
		return fmt.Errorf("peer has uid %d", cred.Uid)
	}
	return nil
}
