package relay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	// maxConns bounds the connections to one socket; an Envoy makes one.
	maxConns = 4
	// connectTimeout is how long one may take to say hello.
	connectTimeout = 10 * time.Second
	// How often a proxy may begin: connections, and streams. An Envoy waits for half a
	// second between two.
	opensPerSecond = 5
	opensAtOnce    = 20
	// bytesPerSecond that are read of a proxy, whatever they are: its messages are few,
	// but for one of maxMessage when it comes back.
	bytesPerSecond = 1 << 20
	bytesAtOnce    = 2 * maxMessage
)

// peerListener accepts connections of one uid, and of root.
type peerListener struct {
	*net.UnixListener
	uid    uint32
	conns  atomic.Int32
	opens  *rate.Limiter
	bytes  *rate.Limiter
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
}

// listenUnix binds a socket that only uid may connect to. A socket path has at
// most 107 bytes and tenants' names are longer, so it is bound relative to its
// directory.
func listenUnix(path string, uid uint32) (*peerListener, error) {
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory of %s: %w", path, err)
	}
	defer unix.Close(dir)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))})
	if err != nil {
		return nil, fmt.Errorf("bind %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chown(path, int(uid), int(uid)), os.Chmod(path, 0o600)); err != nil {
		l.Close()
		return nil, fmt.Errorf("hand socket to its proxy: %w", err)
	}
	p := &peerListener{UnixListener: l, uid: uid, opens: rate.NewLimiter(opensPerSecond, opensAtOnce), bytes: rate.NewLimiter(bytesPerSecond, bytesAtOnce)}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p, nil
}

// Close implements net.Listener. It ends the connections, too: a server that stops waits
// for those that haven't said hello.
func (l *peerListener) Close() error {
	l.cancel()
	return l.UnixListener.Close()
}

// Accept returns the next connection whose peer may have one, and closes others. Who
// makes them too fast finds the backlog full.
func (l *peerListener) Accept() (net.Conn, error) {
	for {
		if l.opens.Wait(l.ctx) != nil {
			return nil, net.ErrClosed
		}
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err != nil || (uid != l.uid && uid != 0) || l.conns.Load() >= maxConns {
			c.Close()
			continue
		}
		l.conns.Add(1)
		return &countedConn{UnixConn: c, listener: l, forget: context.AfterFunc(l.ctx, func() { c.Close() })}, nil
	}
}

func peerUID(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

type countedConn struct {
	*net.UnixConn
	listener *peerListener
	// forget has the end of the listener not close it.
	forget func() bool
	closed atomic.Bool
}

// Read implements net.Conn. What was read too fast is paid for before it is seen.
func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.UnixConn.Read(b[:min(len(b), bytesAtOnce)])
	if n > 0 && c.listener.bytes.WaitN(c.listener.ctx, n) != nil {
		return 0, net.ErrClosed
	}
	return n, err
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.listener.conns.Add(-1)
		c.forget()
	}
	return c.UnixConn.Close()
}
