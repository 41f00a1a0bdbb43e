package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/status"
)

// errMismatch is a peer that answered with something else than it should.
var errMismatch = errors.New("unexpected answer")

// errLost is what a session reports when its one connection had ended before.
var errLost = errors.New("connection was lost before")

// statusError is an HTTP status outside 200–299.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("HTTP status %d", int(e)) }

// Failure is one thing that went wrong.
type Failure struct {
	At time.Time `json:"at"`
	// Kind is "connect " or "exchange " and one of refused, reset, eof, timeout,
	// unreachable, dns, lost, mismatch, status CODE, grpc CODE, other.
	Kind    string `json:"kind"`
	Message string `json:"message"`
}

// Failures counts what went wrong and keeps the first and the last whole.
type Failures struct {
	Total  int                     `json:"total"`
	ByKind map[string]*FailureKind `json:"by_kind,omitempty"`
	First  *Failure                `json:"first,omitempty"`
	Last   *Failure                `json:"last,omitempty"`
}

// FailureKind is what happened of one kind.
type FailureKind struct {
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

func (f *Failures) add(failure *Failure) {
	f.Total++
	if f.ByKind == nil {
		f.ByKind = map[string]*FailureKind{}
	}
	kind := f.ByKind[failure.Kind]
	if kind == nil {
		kind = &FailureKind{First: failure.At}
		f.ByKind[failure.Kind] = kind
	}
	kind.Count++
	kind.Last = failure.At
	if f.First == nil {
		f.First = failure
	}
	f.Last = failure
}

func newFailure(stage string, err error) *Failure {
	return &Failure{At: time.Now(), Kind: stage + " " + kindOf(err), Message: err.Error()}
}

// kindOf names an error by what the network did, so that a counted error can be
// compared between protocols.
func kindOf(err error) string {
	var http statusError
	var dns *net.DNSError
	var network net.Error
	switch {
	case errors.As(err, &http):
		return fmt.Sprintf("status %d", int(http))
	case errors.Is(err, errMismatch):
		return "mismatch"
	case errors.As(err, &dns):
		return "dns"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &network) && network.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "eof"
	case errors.Is(err, errLost):
		return "lost"
	}
	if s, ok := status.FromError(err); ok {
		return "grpc " + s.Code().String()
	}
	return "other"
}

// watchedConn remembers the first error of a connection, which HTTP and gRPC
// clients hide behind errors of their own.
type watchedConn struct {
	net.Conn
	mu     sync.Mutex
	err    error
	closed bool
}

func (c *watchedConn) note(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.err == nil && !c.closed {
		c.err = err
	}
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.note(err)
	return n, err
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.note(err)
	return n, err
}

func (c *watchedConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	return c.Conn.Close()
}

// cause puts the connection's own error in front of what a client made of it.
func (c *watchedConn) cause(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil || c.err == nil || errors.Is(err, c.err) {
		return err
	}
	return fmt.Errorf("%w (%w)", c.err, err)
}
