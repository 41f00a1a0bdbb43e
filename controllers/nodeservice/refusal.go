package nodeservice

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Why a call is refused: the reason in the ErrorInfo of its status, and the label
// cause of the metric. Others are named by their code.
const (
	CauseOtherNode     = "OtherNode"
	CauseMirrorPod     = "MirrorPod"
	CauseHostNetwork   = "HostNetwork"
	CauseFinished      = "Finished"
	CauseNoMember      = "NoMember"
	CauseOtherIdentity = "OtherIdentity"
	CauseInvalidCSR    = "InvalidCSR"
	CauseForeignRange  = "ForeignRange"
	CauseAddressHeld   = "AddressHeld"
)

const (
	errorDomain      = "mesh.bulkhead.dev"
	metadataIdentity = "identity"
	// refusalSeries bounds what nodes can make a replica remember; more are counted
	// together.
	refusalSeries = 4096
	otherSeries   = "other"
	// Lines in the log of those who are refused, of each node whose agent is, and of all
	// others together.
	refusalsPerSecond = 1
	refusalsAtOnce    = 32
)

// refusal is a status with its cause, and the identity that it is about, if there
// is one.
func refusal(code codes.Code, cause string, id model.Identity, format string, args ...any) error {
	s := status.New(code, fmt.Sprintf(format, args...))
	info := &errdetails.ErrorInfo{Reason: cause, Domain: errorDomain}
	if !id.IsZero() {
		info.Metadata = map[string]string{metadataIdentity: id.String()}
	}
	if detailed, err := s.WithDetails(info); err == nil {
		s = detailed
	}
	return s.Err()
}

// causeOf is the cause that refusal gave, or the status's code.
func causeOf(err error) (cause, identity string) {
	s := status.Convert(err)
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			return info.GetReason(), info.GetMetadata()[metadataIdentity]
		}
	}
	return s.Code().String(), ""
}

// refusals count who was refused what.
type refusals struct {
	counter *prometheus.CounterVec
	mu      sync.Mutex
	series  map[[4]string]struct{}
	// strangers bounds what callers without a valid token write to the log, lines what
	// each node's agent does.
	strangers *rate.Limiter
	lines     map[string]*lines
}

// lines are a node's in the log.
type lines struct {
	*rate.Limiter
	// unsaid are refusals since the last one that the log has.
	unsaid int
}

func newRefusals() *refusals {
	return &refusals{
		counter: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "bulkhead", Subsystem: "nodeservice", Name: "refusals_total",
			Help: "Calls of agents that were refused, by the calling node, the identity that it was about and the cause; node and identity are empty where they aren't known.",
		}, []string{"call", "node", "identity", "cause"}),
		series: map[[4]string]struct{}{}, strangers: rate.NewLimiter(refusalsPerSecond, refusalsAtOnce), lines: map[string]*lines{},
	}
}

func (r *refusals) count(call, node, identity, cause string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := [4]string{call, node, identity, cause}
	if _, known := r.series[key]; !known {
		if len(r.series) >= refusalSeries {
			key[1], key[2] = otherSeries, otherSeries
		} else {
			r.series[key] = struct{}{}
		}
	}
	r.counter.WithLabelValues(key[:]...).Inc()
}

// mayLog reports whether the log has room for a refusal of a node's agent, and how many
// it hadn't since the last: an agent that was taken over must not fill the log, or keep
// others' refusals out of it.
func (r *refusals) mayLog(node string, now time.Time) (unsaid int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.lines[node]
	if l == nil {
		if len(r.lines) >= refusalSeries {
			// Those who could begin anew anyway.
			maps.DeleteFunc(r.lines, func(_ string, l *lines) bool { return l.TokensAt(now) >= refusalsAtOnce })
		}
		l = &lines{Limiter: rate.NewLimiter(refusalsPerSecond, refusalsAtOnce)}
		r.lines[node] = l
	}
	if !l.AllowN(now, 1) {
		l.unsaid++
		return 0, false
	}
	unsaid, l.unsaid = l.unsaid, 0
	return unsaid, true
}

// refused logs and counts what an honest agent doesn't cause, and passes err on:
// the other side's log isn't this one's to rely on.
func (s *Service) refused(c Caller, call string, ref podRef, err error) error {
	if code := status.Code(err); code == codes.PermissionDenied || code == codes.InvalidArgument {
		cause, identity := causeOf(err)
		s.refusals.count(call, c.Node, identity, cause)
		if unsaid, ok := s.refusals.mayLog(c.Node, s.now()); ok {
			s.o.Log.Warn("agent refused", "node", c.Node, "call", call, "pod", ref.String(), "identity", identity, "cause", cause, "error", err, "unsaid", unsaid)
		}
	}
	return err
}

// stranger logs and counts a call whose token isn't an agent's.
func (s *Service) stranger(ctx context.Context, call string, err error) error {
	if status.Code(err) != codes.Unauthenticated {
		return err
	}
	s.refusals.count(call, "", "", codes.Unauthenticated.String())
	if s.refusals.strangers.Allow() {
		from := ""
		if p, ok := peer.FromContext(ctx); ok {
			from = p.Addr.String()
		}
		s.o.Log.Warn("caller refused", "call", call, "from", from, "error", err)
	}
	return err
}
