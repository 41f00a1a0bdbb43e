package isolation

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	adminTimeout = time.Second
	// adminLimit bounds what is read: a taken-over proxy can answer anything.
	adminLimit = 16 << 20
	// adminHeader does so before there is a body.
	adminHeader = 16 << 10
)

// adminGet asks Envoy's admin interface, inside of the tenant's network
// namespace, where its abstract socket is.
func adminGet(ctx context.Context, netns string, generation int, path string, limit int64) ([]byte, error) {
	return adminAsk(ctx, netns, generation, http.MethodGet, path, adminTimeout, limit)
}

// adminAsk returns ErrTooLarge if the answer has more than limit bytes.
func adminAsk(ctx context.Context, netns string, generation int, method, path string, timeout time.Duration, limit int64) ([]byte, error) {
	client := &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: adminHeader,
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				return dialAbstract(netns, adminName(generation))
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy/"+strings.TrimPrefix(path, "/"), nil)
	if err != nil {
		return nil, fmt.Errorf("ask Envoy: %w", err)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask Envoy: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("ask Envoy: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask Envoy for %s: %s: %.200q", path, res.Status, body)
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("ask Envoy for %s: %w: more than %d bytes", path, ErrTooLarge, limit)
	}
	return body, nil
}

// dialAbstract connects to an abstract socket of another network namespace. The
// name is looked up in the namespace that the socket was made in, so only that
// has to happen there.
func dialAbstract(netns, name string) (net.Conn, error) {
	var fd int
	err := inNetns(netns, func() (err error) {
		fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	// Unix sockets connect at once or, with a full backlog, not at all.
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: "@" + name}); err != nil {
		return nil, fmt.Errorf("connect to @%s: %w", name, err)
	}
	return net.FileConn(f)
}

// ready reports whether Envoy has its first configuration and serves.
func ready(ctx context.Context, netns string, generation int) bool {
	body, err := adminGet(ctx, netns, generation, "/ready", 64)
	return err == nil && strings.TrimSpace(string(body)) == "LIVE"
}
