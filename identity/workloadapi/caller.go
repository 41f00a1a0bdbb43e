package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/attest"
)

// header must be on every call: a program that was tricked into calling (a proxy,
// a browser) doesn't set it.
const header = "workload.spiffe.io"

// attestation is how a connection's other end is found out.
type attestation struct{ server *Server }

// ServerHandshake implements credentials.TransportCredentials. It doesn't wait for
// the caller. One that is in no pod is let in, to be told so by its calls.
func (a attestation) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	s := a.server
	c, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a Unix socket")
	}
	p, err := attest.Peer(c)
	if err != nil {
		s.conns.WithLabelValues("unknown").Inc()
		return nil, nil, err
	}
	// Of the mesh or not, a pod has a share of its own; the plan may come later.
	pod, err := p.Pod(s.o.Pods)
	if err != nil {
		pod = ""
	}
	if !s.limits.connect(pod, p.UID) {
		s.conns.WithLabelValues("limited").Inc()
		s.logRefusal(&caller{process: p, pod: pod}, "connection refused: its pod has too many, or began too many just now")
		p.Close()
		return nil, nil, fmt.Errorf("process %d of pod %q has too many connections", p.PID, pod)
	}
	s.conns.WithLabelValues("accepted").Inc()
	conn := &callerConn{UnixConn: c, release: sync.OnceFunc(func() {
		s.limits.disconnect(pod, p.UID)
		p.Close()
	})}
	// The connection is the process's: it ends with it, whoever else holds it.
	go func() {
		p.Wait()
		conn.Close()
	}()
	return conn, &caller{process: p, pod: pod}, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (attestation) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

// Info implements credentials.TransportCredentials.
func (attestation) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "attestation"}
}

// Clone implements credentials.TransportCredentials.
func (a attestation) Clone() credentials.TransportCredentials { return a }

// OverrideServerName implements credentials.TransportCredentials.
func (attestation) OverrideServerName(string) error { return nil }

// callerConn lets go of its process when it is closed.
type callerConn struct {
	*net.UnixConn
	release func()
}

func (c *callerConn) Close() error {
	c.release()
	return c.UnixConn.Close()
}

// caller is the other end of a connection.
type caller struct {
	credentials.CommonAuthInfo
	process *attest.Process
	// pod is the UID of the pod in whose share the connection is counted, "" for
	// processes that are in none.
	pod string
}

// AuthType implements credentials.AuthInfo.
func (*caller) AuthType() string { return "attestation" }

func callerOf(ctx context.Context) (*caller, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.AuthInfo.(*caller); ok {
			return c, nil
		}
	}
	return nil, status.Error(codes.Internal, "the connection has no caller")
}

// authorize finds the pod of a call, as things are now. Errors are statuses:
// PermissionDenied, or Unavailable before the node's pods are known.
func (s *Server) authorize(ctx context.Context) (identity.Pod, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return identity.Pod{}, err
	}
	denied := func(err error) (identity.Pod, error) {
		return identity.Pod{}, status.Errorf(codes.PermissionDenied, "the caller isn't a workload of the mesh: %v", err)
	}
	uid, err := c.process.Pod(s.o.Pods)
	if err != nil {
		return denied(err)
	}
	pod, ok, known := s.o.Identities.Pod(uid)
	switch {
	case !known:
		return identity.Pod{}, status.Error(codes.Unavailable, "the node's pods aren't known yet")
	case !ok:
		return denied(fmt.Errorf("pod %s isn't in the mesh on this node", uid))
	}
	// What is in a pod's cgroup and not in its network isn't the pod's as the mesh
	// knows it.
	ns, err := c.process.NetworkNamespace()
	if err != nil {
		return denied(err)
	}
	if ns == s.nodeNS {
		return denied(errors.New("it is in the node's network"))
	}
	if file := s.o.Netns(uid); file != "" {
		// One whose file is gone can't be told: this is a second look only.
		if own, err := attest.NamespaceAt(file); err == nil && own != ns {
			return denied(fmt.Errorf("it isn't in the network of its pod %s/%s", pod.Namespace, pod.Name))
		}
	}
	return pod, nil
}

// enter checks what is the same for all calls. If err is nil, done must be called.
func (s *Server) enter(ctx context.Context) (done func(), err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(header); len(v) != 1 || v[0] != "true" {
		return nil, status.Errorf(codes.InvalidArgument, "the call must have the header %s: true, once", header)
	}
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	done, ok := s.limits.call(c.pod, c.process.UID)
	if !ok {
		return nil, status.Error(codes.ResourceExhausted, "the pod has too many calls, or began too many just now")
	}
	return done, nil
}

func (s *Server) unary(ctx context.Context, r any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (answer any, err error) {
	defer func() { s.ended(ctx, info.FullMethod, err) }()
	done, err := s.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	return handler(ctx, r)
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() { s.ended(stream.Context(), info.FullMethod, err) }()
	done, err := s.enter(stream.Context())
	if err != nil {
		return err
	}
	defer done()
	return handler(srv, stream)
}

// ended counts a call, and tells of one that was refused.
func (s *Server) ended(ctx context.Context, method string, err error) {
	method = path.Base(method)
	code := status.Code(err)
	s.calls.WithLabelValues(method, code.String()).Inc()
	if code != codes.PermissionDenied && code != codes.ResourceExhausted {
		return
	}
	if c, err2 := callerOf(ctx); err2 == nil {
		s.logRefusal(c, "call refused", "call", method, "error", err)
	}
}

// logRefusal logs what the limits allow; the counters have them all.
func (s *Server) logRefusal(c *caller, message string, attributes ...any) {
	if s.limits.mayLog(c.pod) {
		s.o.Log.Warn("Workload API: "+message, append(attributes, "pid", c.process.PID, "uid", c.process.UID, "pod_uid", c.pod)...)
	}
}
