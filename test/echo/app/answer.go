// Package app is the test application: see the command that wraps it. Its types
// are what its clients print as JSON, for tests to read.
package app

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
)

// Ports that the server listens on unless flags say otherwise.
const (
	HTTPPort  = 8080
	GRPCPort  = 8081
	GreetPort = 8082
	BulkPort  = 8083
)

// textLimit bounds what is kept of a body or a line, in bytes.
const textLimit = 64 << 10

// Answer is what the server tells of one request or connection.
type Answer struct {
	// Pod, Namespace and Node are from the environment (POD_NAME, POD_NAMESPACE,
	// NODE_NAME); Pod falls back to the host name.
	Pod       string `json:"pod"`
	Namespace string `json:"namespace,omitempty"`
	Node      string `json:"node,omitempty"`
	// Protocol is HTTP/1.1, HTTP/2.0, gRPC or TCP.
	Protocol string `json:"protocol"`
	// Client is the peer's IP:port as the application sees it, Local where it
	// was reached.
	Client  string              `json:"client"`
	Local   string              `json:"local"`
	Method  string              `json:"method,omitempty"`
	Host    string              `json:"host,omitempty"`
	Path    string              `json:"path,omitempty"`
	Headers map[string][]string `json:"headers,omitempty"`
	// Received is the body's or line's beginning, Bytes its whole length and
	// SHA256 the digest of the whole.
	Received string `json:"received,omitempty"`
	Bytes    int64  `json:"bytes,omitempty"`
	SHA256   string `json:"sha256,omitempty"`
}

// ClientIP is the address part of Client, "" if there is none.
func (a Answer) ClientIP() string {
	ap, err := netip.ParseAddrPort(a.Client)
	if err != nil {
		return ""
	}
	return ap.Addr().String()
}

// self is the part of an answer that is the same for all of a server's answers.
func self() Answer {
	a := Answer{Pod: os.Getenv("POD_NAME"), Namespace: os.Getenv("POD_NAMESPACE"), Node: os.Getenv("NODE_NAME")}
	if a.Pod == "" {
		// An answer without a name shows that there is none.
		a.Pod, _ = os.Hostname()
	}
	return a
}

// address prints an address so that IPv4 looks the same on dual-stack sockets.
func address(addr net.Addr) string {
	if addr == nil {
		return ""
	}
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return addr.String()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func writeLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// digest reads r to its end, keeping the beginning.
func digest(r io.Reader) (a Answer, err error) {
	sum := sha256.New()
	head := make([]byte, 0, 512)
	n, err := io.Copy(io.MultiWriter(sum, writerFunc(func(p []byte) {
		head = append(head, p[:min(len(p), textLimit-len(head))]...)
	})), r)
	if err != nil {
		return Answer{}, fmt.Errorf("read body: %w", err)
	}
	return Answer{Received: string(head), Bytes: n, SHA256: hex.EncodeToString(sum.Sum(nil))}, nil
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

// pattern is the endless stream of bytes that bulk transfers carry; both ends
// make it themselves, so that either can tell whether it arrived unchanged.
func pattern() io.Reader {
	return rand.NewChaCha8([32]byte([]byte("bulkhead bulk transfer pattern 1")))
}

func patternDigest(n int64) (string, error) {
	sum := sha256.New()
	if _, err := io.CopyN(sum, pattern(), n); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
