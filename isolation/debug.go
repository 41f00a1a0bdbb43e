package isolation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var (
	// ErrAdminPath is returned for a path of Envoy's admin interface that isn't for
	// owners and operators.
	ErrAdminPath = errors.New("not a path for debugging")
	// ErrTooLarge is returned instead of a part of an answer.
	ErrTooLarge = errors.New("the answer is too large")
	// ErrNoProcess is returned for a tenant or generation that doesn't run.
	ErrNoProcess = errors.New("no such process runs")
)

// debugTimeout is for answers that Envoy's main thread has to gather.
const debugTimeout = 10 * time.Second

// adminPaths only read. What quits, drains, resets or fails a health check isn't
// here, nor /cpuprofiler and /heapprofiler, which write files, nor /tap, which
// shows traffic.
var adminPaths = []string{
	"/certs", "/clusters", "/config_dump", "/contention", "/heap_dump", "/init_dump", "/listeners", "/memory",
	"/ready", "/runtime", "/server_info", "/stats", "/stats/prometheus",
}

// Admin gets a path of Envoy's admin interface, for example
// "/stats?filter=downstream". It returns ErrAdminPath for what doesn't only read
// and ErrTooLarge beyond 16 MiB: ask for less, with "filter" or "resource". What
// comes back is the proxy's word, which may be taken over. Who may ask is the
// caller's business: a configuration names a tenant's neighbours.
func (m *Manager) Admin(ctx context.Context, name model.Tenant, generation int, path string) ([]byte, error) {
	u, err := url.Parse(path)
	if err != nil || u.IsAbs() || u.Host != "" || !slices.Contains(adminPaths, u.Path) {
		return nil, fmt.Errorf("ask Envoy %d of %s for %.100q: %w; there are %s", generation, name, path, ErrAdminPath, strings.Join(adminPaths, " "))
	}
	// Made anew, so that both read the same into it.
	u = &url.URL{Path: u.Path, RawQuery: u.Query().Encode()}
	body, err := m.ask(ctx, name, generation, http.MethodGet, u.String())
	if err != nil {
		return nil, err
	}
	// Envoy replaces keys by itself. An answer that still has one is a fault of
	// Envoy's or ours, and nothing to pass on.
	if u.Path == "/config_dump" && holdsKey(body) {
		return nil, fmt.Errorf("ask Envoy %d of %s for %s: there is a private key in the answer, which is withheld", generation, name, u.Path)
	}
	return body, nil
}

// ConfigDump is the configuration that a proxy has, as JSON, with keys redacted.
// resource chooses a part, for example "dynamic_listeners"; "" is all of it
// but for endpoints.
func (m *Manager) ConfigDump(ctx context.Context, name model.Tenant, generation int, resource string) ([]byte, error) {
	path := "/config_dump"
	if resource != "" {
		path += "?resource=" + url.QueryEscape(resource)
	}
	return m.Admin(ctx, name, generation, path)
}

// Stats are the proxy's figures whose name matches filter, a regular expression;
// "" is all.
func (m *Manager) Stats(ctx context.Context, name model.Tenant, generation int, filter string) ([]byte, error) {
	path := "/stats"
	if filter != "" {
		path += "?filter=" + url.QueryEscape(filter)
	}
	return m.Admin(ctx, name, generation, path)
}

// HeapProfile is what pprof reads. It holds addresses and sizes, no contents.
func (m *Manager) HeapProfile(ctx context.Context, name model.Tenant, generation int) ([]byte, error) {
	return m.Admin(ctx, name, generation, "/heap_dump")
}

// LogLevels are those that Envoy knows, from loud to silent.
var LogLevels = []string{"trace", "debug", "info", "warning", "error", "critical", "off"}

var loggerName = regexp.MustCompile(`^[a-z0-9_]{1,64}$`)

// CheckLogLevel says whether SetLogLevel takes them; Envoy may yet not have the
// logger.
func CheckLogLevel(logger, level string) error {
	if !slices.Contains(LogLevels, level) {
		return fmt.Errorf("level %.40q is none of %s", level, strings.Join(LogLevels, ", "))
	}
	if logger != "" && (!loggerName.MatchString(logger) || logger == "level" || logger == "paths") {
		return fmt.Errorf("%.100q is no logger", logger)
	}
	return nil
}

// SetLogLevel sets the level of one of Envoy's loggers, "" for all of them, until
// the process ends, and returns the levels of all. A loud level fills the log
// file, which then holds minutes instead of days, and costs the tenant CPU.
func (m *Manager) SetLogLevel(ctx context.Context, name model.Tenant, generation int, logger, level string) ([]byte, error) {
	if err := CheckLogLevel(logger, level); err != nil {
		return nil, fmt.Errorf("set log level of %s: %w", name, err)
	}
	if logger == "" {
		logger = "level"
	}
	return m.ask(ctx, name, generation, http.MethodPost, "/logging?"+logger+"="+level)
}

// LogLevel returns the levels of all of a proxy's loggers, one a line.
func (m *Manager) LogLevel(ctx context.Context, name model.Tenant, generation int) ([]byte, error) {
	return m.ask(ctx, name, generation, http.MethodPost, "/logging")
}

func (m *Manager) ask(ctx context.Context, name model.Tenant, generation int, method, path string) ([]byte, error) {
	body, err := []byte(nil), ErrNoProcess
	if t := m.tenant(name); t != nil && t.process(generation) != nil {
		body, err = adminAsk(ctx, m.o.netnsPath(name), generation, method, path, debugTimeout, adminLimit)
	}
	if err != nil {
		return nil, fmt.Errorf("ask Envoy %d of %s: %w", generation, name, err)
	}
	return body, nil
}

// keyMarks are how a PEM key begins, as text and as the base64 of a field of bytes.
var keyMarks = [][]byte{
	[]byte("PRIVATE KEY-----"),
	[]byte("LS0tLS1CRUdJTiBQUklW"), // -----BEGIN PRIV
	[]byte("LS0tLS1CRUdJTiBFQyBQ"), // -----BEGIN EC P
	[]byte("LS0tLS1CRUdJTiBSU0Eg"), // -----BEGIN RSA
}

func holdsKey(body []byte) bool {
	return slices.ContainsFunc(keyMarks, func(mark []byte) bool { return bytes.Contains(body, mark) })
}
