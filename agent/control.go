package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent/debug"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// serveControl answers the agent's own command line on a socket that only root
// can open.
func (a *Agent) serveControl(ctx context.Context) error {
	socket := a.o.ControlSocket()
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	// Not by the umask, which is of all that goes on in the process, and of its children.
	// Until then others may only read, as a usual umask has it, and so not connect.
	if err := os.Chmod(socket, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /inspect", func(w http.ResponseWriter, _ *http.Request) {
		i, err := a.inspect()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.Encode(i)
	})
	mux.HandleFunc("GET /log", func(w http.ResponseWriter, r *http.Request) {
		generation, err := debug.ParseGeneration(r.FormValue("generation"))
		t, terr := model.ParseTenant(r.FormValue("tenant"))
		if err := errors.Join(err, terr); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if generation == debug.Serving {
			generation = a.servingGeneration(t)
		}
		f, err := os.Open(a.bulkheads.LogFile(t, generation))
		if err != nil {
			http.Error(w, fmt.Sprintf("tenant %s has no log of generation %d here", t, generation), http.StatusNotFound)
			return
		}
		defer f.Close()
		// The kernel lets it be no longer. What is in it is the proxy's word.
		b, err := io.ReadAll(io.LimitReader(f, isolation.LogLimit))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Write(debug.Printable(b))
	})
	var streams sync.WaitGroup
	defer streams.Wait() // what they read from is closed next
	mux.HandleFunc("GET /events", a.serveEvents(&streams))
	for _, method := range []string{http.MethodGet, http.MethodPut} {
		mux.HandleFunc(method+" /tenants/{tenant}/{what}", a.serveDebug)
	}
	mux.HandleFunc("POST /kill", func(w http.ResponseWriter, r *http.Request) {
		pid, err := strconv.Atoi(r.FormValue("pid"))
		signal := unix.SignalNum("SIG" + r.FormValue("signal"))
		if err != nil || signal == 0 {
			http.Error(w, "usage: kill --signal NAME PID", http.StatusBadRequest)
			return
		}
		if err := a.bulkheads.Kill(pid, signal); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	return serveHTTP(ctx, l, mux)
}

// serveHealth answers the kubelet's probes and Prometheus.
func (a *Agent) serveHealth(ctx context.Context) error {
	l, err := net.Listen("tcp", a.o.HealthAddress)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /metrics", metricsOf(a))
	return serveHTTP(ctx, l, mux)
}

// ready reports what keeps new mesh pods from starting on the node.
func (a *Agent) ready() error {
	a.mu.Lock()
	known := a.last.known
	a.mu.Unlock()
	switch {
	case !known:
		return errors.New("there is no plan for this node yet, in Kubernetes a NodeProxy: is the operator running?")
	case !a.roots.Known():
		return errors.New("there is no trust bundle yet: is the operator running?")
	case a.keeper != nil && !a.keeper.Installed():
		return errors.New("the CNI plugin isn't chained yet: is there a CNI configuration on the node?")
	}
	return nil
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Control asks a running agent over its control socket and copies the answer to
// w. Errors are what the agent said.
func Control(ctx context.Context, socket, method, path string, values url.Values, w io.Writer) error {
	c := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path+"?"+values.Encode(), nil)
	if err != nil {
		return err
	}
	r, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", socket, err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 4096))
		return errors.New(strings.TrimSpace(string(b)))
	}
	_, err = io.Copy(w, r.Body)
	return err
}
