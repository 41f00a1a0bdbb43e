package harness

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// Forward carries TCP connections from an address of this machine to a port of a
// pod, until end is called, which returns what went wrong with any of them.
//
// Each has a stream to the API server of its own. kubectl's share one, and one that
// the pod resets, or doesn't take, ends it for those that come next.
func (c *Cluster) Forward(namespace, pod string, port int) (address string, end func() error, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	f := &forwarder{cluster: c, namespace: namespace, pod: pod, port: strconv.Itoa(port), conns: map[io.Closer]struct{}{}}
	f.group.Go(func() {
		for {
			local, err := l.Accept()
			if err != nil {
				return // end was called
			}
			f.group.Go(func() { f.note(f.forward(local)) })
		}
	})
	return l.Addr().String(), sync.OnceValue(func() error {
		l.Close()
		return f.end()
	}), nil
}

type forwarder struct {
	cluster              *Cluster
	namespace, pod, port string
	group                sync.WaitGroup

	mu     sync.Mutex
	ended  bool
	conns  map[io.Closer]struct{}
	failed []error
}

// forward carries one connection.
func (f *forwarder) forward(local net.Conn) error {
	defer local.Close()
	remote, err := f.dial()
	if err != nil {
		return err
	}
	defer remote.Close()
	if !f.add(remote) {
		return nil
	}
	defer f.remove(remote)
	header := http.Header{}
	header.Set(corev1.PortHeader, f.port)
	header.Set(corev1.PortForwardRequestIDHeader, "0")
	header.Set(corev1.StreamType, corev1.StreamTypeError)
	failure, err := remote.CreateStream(header)
	if err != nil {
		return err
	}
	failure.Close() // it is for reading only
	header.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := remote.CreateStream(header)
	if err != nil {
		return err
	}
	go func() {
		io.Copy(data, local)
		data.Close()
	}()
	// Which end broke off, and how, is for the ends to see.
	if _, err := io.Copy(local, data); err != nil {
		return nil
	}
	local.Close()
	if message, _ := io.ReadAll(failure); len(message) > 0 {
		return errors.New(string(message))
	}
	return nil
}

func (f *forwarder) dial() (httpstream.Connection, error) {
	transport, upgrader, err := spdy.RoundTripperFor(f.cluster.Config)
	if err != nil {
		return nil, err
	}
	url := f.cluster.Kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(f.namespace).Name(f.pod).SubResource("portforward").URL()
	conn, _, err := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, "POST", url).Dial(portforward.PortForwardProtocolV1Name)
	return conn, err
}

// add reports false when all is over.
func (f *forwarder) add(c io.Closer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended {
		f.conns[c] = struct{}{}
	}
	return !f.ended
}

func (f *forwarder) remove(c io.Closer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c)
}

func (f *forwarder) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil && !f.ended {
		f.failed = append(f.failed, fmt.Errorf("port-forward to %s/%s:%s: %w", f.namespace, f.pod, f.port, err))
	}
}

func (f *forwarder) end() error {
	f.mu.Lock()
	f.ended = true
	for c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.group.Wait()
	return errors.Join(f.failed...)
}
