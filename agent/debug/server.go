package debug

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Bounds. A client that is slow loses its answer.
const (
	headerTime   = 5 * time.Second
	headerLimit  = 16 << 10
	reviewTime   = 10 * time.Second
	answerTime   = 60 * time.Second
	answersLimit = 4
	retryListen  = 30 * time.Second
	// Lines in the log of those who are refused: anybody can be.
	refusalsPerSecond = 1
	refusalsAtOnce    = 16
)

// Options of a Server. All but Log are required.
type Options struct {
	// Node whose agent this is.
	Node string
	// Address to listen on.
	Address string
	// Reviews asks the API server who somebody is and what they may.
	Reviews Reviews
	// Sign has the authority sign a CSR for identity.AgentServerName(Node).
	Sign func(ctx context.Context, csr []byte) (chain [][]byte, err error)
	// Roots that the trust bundle has now, nil for none yet.
	Roots func() *x509.CertPool
	// Ask has a proxy answer.
	Ask func(ctx context.Context, q Request) ([]byte, error)
	// Metrics answers who scrapes them.
	Metrics http.Handler
	// Log; default slog.Default(). Each access that is authenticated is told there.
	Log *slog.Logger
}

// Server answers owners. Run it once.
type Server struct {
	o    Options
	log  *slog.Logger
	name string
	cert certificate
	pace *pace

	refusals *rate.Limiter
	// unsaid are refusals since the last one that the log has.
	unsaid atomic.Int64

	mu sync.Mutex
	// answers are in flight: one a tenant, answersLimit of all.
	answers map[model.Tenant]bool
}

// New returns a server that doesn't listen yet. It panics if something required is
// missing.
func New(o Options) *Server {
	if o.Node == "" || o.Address == "" || o.Reviews == nil || o.Sign == nil || o.Roots == nil || o.Ask == nil || o.Metrics == nil {
		panic("debug: all Options but Log are required")
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	name := identity.AgentServerName(o.Node)
	return &Server{o: o, log: o.Log, name: name, pace: newPace(), refusals: rate.NewLimiter(refusalsPerSecond, refusalsAtOnce), answers: map[model.Tenant]bool{},
		cert: certificate{sign: o.Sign, roots: o.Roots, name: name, renewed: make(chan struct{}, 1)}}
}

// RootsChanged has the server's certificate signed anew. It doesn't block.
func (s *Server) RootsChanged() {
	select {
	case s.cert.renewed <- struct{}{}:
	default:
	}
}

// Run serves until ctx ends. A port that somebody else has is told and tried again:
// nothing else of an agent depends on it.
func (s *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.cert.keep(ctx, s.log) })
	for {
		l, err := net.Listen("tcp", s.o.Address)
		if err == nil {
			return s.serve(ctx, l)
		}
		s.log.Error("owners can't look into their proxies: the port isn't free", "address", s.o.Address, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryListen):
		}
	}
}

func (s *Server) serve(ctx context.Context, l net.Listener) error {
	h := &http.Server{
		Handler: s.handler(), MaxHeaderBytes: headerLimit,
		ReadHeaderTimeout: headerTime, ReadTimeout: headerTime, WriteTimeout: answerTime,
		// Strangers' faults, at their pace.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cert.get() },
		},
		// A request without HTTP/2 has one connection, which the bounds count.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	h.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	if err := h.ServeTLS(newBounded(l), "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve owners: %w", err)
	}
	return nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /tenants/{tenant}/{what}", s.answer)
	mux.HandleFunc("PUT /tenants/{tenant}/{what}", s.answer)
	mux.HandleFunc("GET "+metricsPath, s.metrics)
	return mux
}

// metrics answers who may get them from every component of the cluster: they name
// all tenants. The token's audience is all agents', so that one configuration
// scrapes them; it is of no use elsewhere.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), reviewTime)
	defer cancel()
	r.Body = http.NoBody
	user, err := s.authenticate(ctx, r, identity.MetricsServerName)
	if err == nil {
		err = s.authorizePath(ctx, user, metricsPath)
	}
	if err != nil {
		s.refused(s.log.With("user", user.Username, "source", r.RemoteAddr), "metrics refused", err)
		refuse(w, err)
		return
	}
	s.pace.letIn(r.RemoteAddr, time.Now())
	s.o.Metrics.ServeHTTP(w, r)
}

// answer looks at who asks before it says anything of what there is.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), reviewTime)
	defer cancel()
	r.Body = http.NoBody
	user, err := s.authenticate(ctx, r, s.name)
	if err != nil {
		refuse(w, err)
		return
	}
	q, err := Parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	log := s.log.With("user", user.Username, "source", r.RemoteAddr, "tenant", q.Tenant.String(), "generation", q.generation(), "what", q.What)
	if q.Set {
		log = log.With("logger", q.Logger, "level", q.Level)
	}
	if err := s.authorize(ctx, user, q); err != nil {
		s.refused(log, "look into a proxy refused", err)
		refuse(w, err)
		return
	}
	s.pace.letIn(r.RemoteAddr, time.Now())
	if !s.enter(q.Tenant) {
		http.Error(w, "somebody is being answered already: try again", http.StatusTooManyRequests)
		return
	}
	defer s.leave(q.Tenant)
	log.Info("look into a proxy")
	body, err := s.o.Ask(r.Context(), q)
	Answer(w, q, body, err)
}

// refused tells of who was, as often as the log has room for that.
func (s *Server) refused(log *slog.Logger, what string, err error) {
	if !s.refusals.Allow() {
		s.unsaid.Add(1)
		return
	}
	log.Warn(what, "error", err, "unsaid", s.unsaid.Swap(0))
}

func refuse(w http.ResponseWriter, err error) {
	var r refusal
	if !errors.As(err, &r) {
		r.code = http.StatusInternalServerError
	}
	if r.code == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	http.Error(w, err.Error(), r.code)
}

// enter bounds the memory that answers take here.
func (s *Server) enter(t model.Tenant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answers[t] || len(s.answers) >= answersLimit {
		return false
	}
	s.answers[t] = true
	return true
}

func (s *Server) leave(t model.Tenant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.answers, t)
}
