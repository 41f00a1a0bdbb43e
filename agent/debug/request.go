package debug

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What can be asked for.
const (
	Config   = "config"
	Stats    = "stats"
	Heap     = "heap"
	LogLevel = "loglevel"
)

// What lists all that can be asked for.
var What = []string{Config, Stats, Heap, LogLevel}

const maxGeneration, maxFilter = 1, 512

// Serving is the generation that serves the tenant: which one that is changes with
// upgrades.
const Serving = -1

// Request is what somebody wants to know of a proxy, or to set.
type Request struct {
	Tenant model.Tenant
	// Generation is 0, 1 or Serving.
	Generation int
	// What is one of the constants.
	What string
	// Filter is a regular expression for names of Stats, or the part of Config; ""
	// is all.
	Filter string
	// Set changes a LogLevel to Level, of one Logger or, with "", of all.
	Set           bool
	Logger, Level string
}

// Parse reads a request for /tenants/{tenant}/{what}, with the parameters
// generation, filter and, for a PUT to loglevel, logger and level.
func Parse(r *http.Request) (Request, error) {
	q := Request{What: r.PathValue("what"), Filter: r.FormValue("filter"), Set: r.Method == http.MethodPut, Logger: r.FormValue("logger"), Level: r.FormValue("level")}
	var err error
	if q.Tenant, err = model.ParseTenant(r.PathValue("tenant")); err != nil {
		return q, err
	}
	if q.Generation, err = ParseGeneration(r.FormValue("generation")); err != nil {
		return q, err
	}
	switch {
	case !slices.Contains(What, q.What):
		return q, fmt.Errorf("%.40q can't be asked for; there are %s", q.What, strings.Join(What, ", "))
	case len(q.Filter) > maxFilter:
		return q, fmt.Errorf("the filter has more than %d bytes", maxFilter)
	case q.Set && q.What != LogLevel:
		return q, fmt.Errorf("%s can't be set", q.What)
	case q.Set:
		return q, isolation.CheckLogLevel(q.Logger, q.Level)
	case q.Logger != "" || q.Level != "":
		return q, errors.New("to set a log level, use PUT")
	}
	return q, nil
}

// ParseGeneration reads 0 or 1; "" is Serving.
func ParseGeneration(s string) (int, error) {
	if s == "" {
		return Serving, nil
	}
	g, err := strconv.Atoi(s)
	if err != nil || g < 0 || g > maxGeneration {
		return 0, fmt.Errorf("generation %.20q: must be 0 or 1", s)
	}
	return g, nil
}

// generation is for logs.
func (q Request) generation() string {
	if q.Generation == Serving {
		return "serving"
	}
	return strconv.Itoa(q.Generation)
}

// Ask has a tenant's proxy answer, of a generation that isn't Serving. Text is made safe for terminals: the proxy may
// be in the wrong hands.
func Ask(ctx context.Context, m *isolation.Manager, q Request) ([]byte, error) {
	switch q.What {
	case Heap:
		return m.HeapProfile(ctx, q.Tenant, q.Generation)
	case Config:
		return text(m.ConfigDump(ctx, q.Tenant, q.Generation, q.Filter))
	case Stats:
		return text(m.Stats(ctx, q.Tenant, q.Generation, q.Filter))
	case LogLevel:
		if q.Set {
			return text(m.SetLogLevel(ctx, q.Tenant, q.Generation, q.Logger, q.Level))
		}
		return text(m.LogLevel(ctx, q.Tenant, q.Generation))
	}
	return nil, fmt.Errorf("%q can't be asked for", q.What)
}

func text(b []byte, err error) ([]byte, error) { return Printable(b), err }

// Printable replaces, in b itself, what a terminal would act on.
func Printable(b []byte) []byte {
	safe := func(r rune) bool { return r != utf8.RuneError && (!unicode.IsControl(r) || r == '\n' || r == '\t') }
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if !safe(r) {
			for k := range n {
				b[i+k] = '?'
			}
		}
		i += n
	}
	return b
}

// Answer writes what came of a request.
func Answer(w http.ResponseWriter, q Request, body []byte, err error) {
	if err != nil {
		code := http.StatusBadGateway
		switch {
		case errors.Is(err, isolation.ErrNoProcess):
			code = http.StatusNotFound
		case errors.Is(err, isolation.ErrTooLarge):
			code = http.StatusRequestEntityTooLarge
		}
		http.Error(w, err.Error(), code)
		return
	}
	kind := "text/plain; charset=utf-8"
	switch q.What {
	case Config:
		kind = "application/json"
	case Heap:
		kind = "application/octet-stream"
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}
