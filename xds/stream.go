package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	wildcardName = "*"
	// maxUnanswered is how many responses may be under way to one proxy; with more,
	// only this proxy waits.
	maxUnanswered = 256
	// maxName is the length beyond which a name can't be ours.
	maxName = 160
)

// sendOrder is the order in which types are sent: what others refer to first.
var sendOrder = []string{TypeCluster, TypeEndpoints, TypeListener, TypeRoutes}

// stream is one delta ADS stream of one generation of a proxy. Two goroutines
// use it: one receives, the other sends. Its state is names and versions; what is
// to be sent is looked up when it is sent. Lock order: Store.mu, then stream.mu.
type stream struct {
	server     *Server
	key        model.ProxyKey
	generation int
	identity   StreamIdentity
	grpc       discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	log        *slog.Logger
	limiter    *rate.Limiter // of names
	refusals   *rate.Limiter // of names
	rejections *rate.Limiter // of those that are told
	end        context.CancelCauseFunc

	// wakeup tells the sender that there is something to send, or that it may.
	wakeup chan struct{}
	// absent carries names that never exist to the sender, which says so. It is
	// short: who asks for more than it hears the answers to waits.
	absent chan removal

	mu         sync.Mutex
	types      map[string]*subscription
	unanswered map[string]answer // by nonce
	most       int               // of those since there were none
	nonce      uint64
	// dirty names may have changed since they were sent; whether the proxy waits for
	// one of them; and later are those that changed often, which wait longer.
	dirty  gathering
	later  parts
	urgent bool
	// sweep fires when clusters of unknown addresses are to be let go; nil while
	// there are none.
	sweep *time.Timer
	swept bool
	// blocked are the resources that wait for another to be acknowledged, and uses
	// is what those need that were sent.
	blocked, uses map[resourceKey]map[resourceKey]struct{}

	straight straight
}

type removal struct {
	typeURL string
	names   []string
}

// answer is a response with one resource that the proxy hasn't answered.
type answer struct {
	typeURL, name, version string
	seq                    uint64
	source                 Source
}

// subscription is what a proxy wants of one type and what it has of it.
type subscription struct {
	wildcard bool
	// confirm asks for a response even if the proxy has everything.
	confirm bool
	names   map[string]struct{}
	held    map[string]*held
	// unknown are names that nobody has: since when. Those that the proxy was told to
	// forget have no time; they are remembered, for it never asks again.
	unknown map[string]time.Time
}

// held is one resource at a proxy.
type held struct {
	sent, acked string // versions
	ackedSeq    uint64
	changed     changed
}

func (st *stream) wake() {
	select {
	case st.wakeup <- struct{}{}:
	default:
	}
}

// receive handles requests until the stream is over.
func (st *stream) receive(ctx context.Context) error {
	for {
		r, err := st.grpc.Recv()
		if err != nil {
			return err
		}
		if err := st.request(ctx, r); err != nil {
			return err
		}
	}
}

func (st *stream) request(ctx context.Context, r *discoveryv3.DeltaDiscoveryRequest) error {
	if !slices.Contains(sendOrder, r.TypeUrl) {
		return status.Errorf(codes.InvalidArgument, "type %.128q isn't served", r.TypeUrl)
	}
	if r.ResponseNonce != "" {
		st.answered(r)
	}
	// More at once than can ever be held stay without an answer, or one request would
	// cost memory until it is through.
	if n := st.limiter.Burst(); len(r.ResourceNamesSubscribe) > n {
		st.server.metrics.refused.WithLabelValues(shortType(r.TypeUrl)).Add(float64(len(r.ResourceNamesSubscribe) - n))
		r.ResourceNamesSubscribe = slices.Clone(r.ResourceNamesSubscribe[:n])
	}
	if r.TypeUrl == TypeListener && !st.opened(TypeListener) {
		st.server.store.resumeChains(st, r.InitialResourceVersions)
	}
	if st.open(r) {
		if r.TypeUrl == TypeRoutes {
			st.server.store.read(st, netip.AddrPort{})
		}
		st.unblock(resourceKey{typeURL: r.TypeUrl})
		st.server.store.recheck(st) // nobody acknowledges what it has already
	}
	st.unsubscribe(r)
	return st.subscribe(ctx, r)
}

func (st *stream) opened(typeURL string) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.types[typeURL] != nil
}

// open takes in the first request of a type, which tells what the proxy has. It
// reports false for later ones.
func (st *stream) open(r *discoveryv3.DeltaDiscoveryRequest) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.types[r.TypeUrl] != nil {
		return false
	}
	sub := &subscription{names: map[string]struct{}{}, held: map[string]*held{}}
	st.types[r.TypeUrl] = sub
	for name, version := range r.InitialResourceVersions {
		if len(sub.held) < st.server.opts.MaxNames+len(listenerNames) && len(name) <= maxName && len(version) <= model.MaxVersion {
			sub.held[name] = &held{sent: version, acked: version}
		}
	}
	if hasWildcard(r.TypeUrl) && (len(r.ResourceNamesSubscribe) == 0 || slices.Contains(r.ResourceNamesSubscribe, wildcardName)) {
		st.markWildcard(r.TypeUrl)
	}
	return true
}

// markWildcard notes that a proxy asked for all of a type. It may have all of it, and
// gets an answer in any case. st.mu is held throughout: a flush in between would take
// the answer for an empty one, and the proxy that for all there is.
func (st *stream) markWildcard(typeURL string) {
	sub := st.types[typeURL]
	sub.wildcard, sub.confirm = hasWildcard(typeURL), true
	st.markLocked(typeURL, wildcardName, true)
}

func hasWildcard(typeURL string) bool { return typeURL == TypeCluster || typeURL == TypeListener }

func (st *stream) unsubscribe(r *discoveryv3.DeltaDiscoveryRequest) {
	for _, name := range r.ResourceNamesUnsubscribe {
		st.mu.Lock()
		sub := st.types[r.TypeUrl]
		if name == wildcardName {
			sub.wildcard = false
			st.mu.Unlock()
			continue
		}
		held := has(sub.names, name)
		delete(sub.names, name)
		delete(sub.unknown, name)
		delete(st.uses, resourceKey{r.TypeUrl, name})
		if held && !sub.covers(st, r.TypeUrl, name) {
			delete(sub.held, name)
		}
		st.mu.Unlock()
		if held {
			st.server.store.release(st, r.TypeUrl, name)
			st.server.metrics.names.WithLabelValues(shortType(r.TypeUrl)).Dec()
		}
	}
}

// covers reports whether the wildcard stands for name.
func (sub *subscription) covers(st *stream, typeURL, name string) bool {
	return sub.wildcard && slices.Contains(st.server.store.wildcard(typeURL), name)
}

func (st *stream) subscribe(ctx context.Context, r *discoveryv3.DeltaDiscoveryRequest) error {
	var never []string
	for _, name := range r.ResourceNamesSubscribe {
		if name == wildcardName {
			st.mu.Lock()
			st.markWildcard(r.TypeUrl)
			st.mu.Unlock()
			continue
		}
		if !st.want(ctx, r.TypeUrl, name) {
			if ctx.Err() != nil {
				return status.FromContextError(ctx.Err()).Err() // not absent: the stream is over
			}
			never = append(never, name)
			continue
		}
		st.mark(r.TypeUrl, name, true)
	}
	if len(never) == 0 {
		return nil
	}
	st.server.metrics.refused.WithLabelValues(shortType(r.TypeUrl)).Add(float64(len(never)))
	st.pace(ctx, st.refusals, len(never))
	select {
	case st.absent <- removal{r.TypeUrl, never}:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// pace holds the stream, and no other, back when it asks faster than it may: names
// that are held cost others something, and refusals time.
func (st *stream) pace(ctx context.Context, l *rate.Limiter, n int) {
	began := time.Now()
	if l.WaitN(ctx, n) == nil && time.Since(began) > time.Millisecond {
		st.server.metrics.throttled.Inc()
	}
}

// want remembers a name. It reports false for one that can't exist, or is one too
// many: the proxy hears that it doesn't exist, which costs it less memory than a
// cluster that refuses.
func (st *stream) want(ctx context.Context, typeURL, name string) bool {
	st.mu.Lock()
	sub := st.types[typeURL]
	if has(sub.names, name) {
		if h := sub.held[name]; h != nil {
			h.sent = "" // asked for again: to be sent again
		}
		st.mu.Unlock()
		st.pace(ctx, st.limiter, 1)
		return true
	}
	full := len(name) > maxName || len(sub.names) >= st.server.opts.MaxNames
	st.mu.Unlock()
	unknown := !full && st.server.store.isUnknown(name)
	if full || unknown && !st.roomForUnknown(typeURL) || !validShared(typeURL, name) && !st.server.store.unshared(typeURL, name) {
		return false
	}
	st.pace(ctx, st.limiter, 1)
	if !st.server.store.hold(st, typeURL, name) {
		return false
	}
	if unknown {
		st.mu.Lock()
		st.addUnknown(sub, typeURL, name)
		st.mu.Unlock()
	}
	st.server.metrics.names.WithLabelValues(shortType(typeURL)).Inc()
	return true
}

// answered takes in an ACK or a NACK.
func (st *stream) answered(r *discoveryv3.DeltaDiscoveryRequest) {
	st.mu.Lock()
	a, ok := st.unanswered[r.ResponseNonce]
	if !ok || a.typeURL != r.TypeUrl {
		st.mu.Unlock()
		return
	}
	delete(st.unanswered, r.ResponseNonce)
	st.most = max(st.most, len(st.unanswered))
	switch len(st.unanswered) {
	case maxUnanswered - 1:
		st.wake()
	case 0:
		if st.most > 8 {
			st.unanswered = map[string]answer{} // or it stays as large as it ever was
		}
		st.most = 0
	}
	// Also the answer to a version that isn't the newest counts, or while one
	// follows another faster than the proxy answers, nothing would ever be in force.
	if h := st.types[r.TypeUrl].held[a.name]; h != nil && r.ErrorDetail == nil && a.seq >= h.ackedSeq {
		h.acked, h.ackedSeq = a.version, a.seq
	}
	st.mu.Unlock()

	rejection := ""
	if e := r.ErrorDetail; e != nil {
		rejection = fmt.Sprintf("%.2048s", e.Message)
		st.server.metrics.rejections.WithLabelValues(shortType(r.TypeUrl)).Inc()
		if st.rejections.Allow() { // a proxy can have as many sent as it likes, to refuse them
			st.server.store.reject(Rejection{Proxy: st.key, Type: r.TypeUrl, Resource: a.name, Source: a.source, Message: rejection})
		}
	}
	if r.ErrorDetail == nil {
		if vip, ok := parseHTTPName(a.name); ok {
			st.server.store.read(st, vip)
		}
		st.unblock(resourceKey{a.typeURL, a.name})
		if a.typeURL == TypeRoutes {
			st.mark(a.typeURL, a.name, false) // to settle it
		}
	}
	if r.TypeUrl == TypeListener {
		st.server.store.acknowledged(st, rejection)
	}
}

// hasListener reports whether the proxy acknowledged r, or what it was at seq or
// later.
func (st *stream) hasListener(r *resource, seq uint64) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	sub := st.types[TypeListener]
	if sub == nil || sub.held[r.name()] == nil {
		return false
	}
	h := sub.held[r.name()]
	return h.acked == r.version() || h.ackedSeq >= seq
}

// send sends what is dirty until ctx ends.
func (st *stream) send(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var due <-chan time.Time
		if wait, any := st.patience(); any {
			timer.Reset(wait)
			due = timer.C
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case r := <-st.absent:
			if err := st.remove(r); err != nil {
				return err
			}
		case <-st.wakeup:
			if err := st.letGo(); err != nil {
				return err
			}
		case <-due:
			if err := st.flush(); err != nil {
				return err
			}
		}
	}
}

// flush sends what changed of what is dirty.
func (st *stream) flush() error {
	st.mu.Lock()
	dirty := st.take()
	st.mu.Unlock()
	for _, typeURL := range sendOrder {
		names := dirty[typeURL]
		if has(names, wildcardName) {
			delete(names, wildcardName)
			if err := st.expand(typeURL, names); err != nil {
				return err
			}
		}
		for _, name := range slices.Sorted(maps.Keys(names)) {
			if st.busy() {
				st.postpone(dirty)
				return nil
			}
			delete(names, name)
			r := st.server.store.lookup(st, typeURL, name)
			if r == nil {
				continue
			}
			if !st.ready(r) {
				continue
			}
			if err := st.push(r); err != nil {
				return err
			}
			if err := st.settle(r); err != nil {
				return err
			}
		}
		delete(dirty, typeURL)
		if err := st.confirm(typeURL); err != nil {
			return err
		}
	}
	return nil
}

// expand adds what a wildcard stands for, and tells the proxy what it doesn't
// stand for any more. On-demand names are never among that.
func (st *stream) expand(typeURL string, names map[string]struct{}) error {
	all := st.server.store.wildcard(typeURL)
	st.mu.Lock()
	sub := st.types[typeURL]
	var gone []string
	if sub.wildcard {
		for name := range sub.held {
			if !slices.Contains(all, name) && !has(sub.names, name) && !validShared(typeURL, name) {
				gone = append(gone, name)
			}
		}
		for _, name := range all {
			names[name] = struct{}{}
		}
	}
	for _, name := range gone {
		delete(sub.held, name)
	}
	st.mu.Unlock()
	if len(gone) == 0 {
		return nil
	}
	return st.remove(removal{typeURL, gone})
}

// confirm answers a wildcard to which there was nothing to send: without any
// answer the proxy would wait. One that came during this flush is for the next.
func (st *stream) confirm(typeURL string) error {
	st.mu.Lock()
	sub := st.types[typeURL]
	empty := sub != nil && sub.confirm && !has(st.dirty.names[typeURL], wildcardName)
	if empty {
		sub.confirm = false
	}
	st.mu.Unlock()
	if !empty {
		return nil
	}
	return st.respond(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL}, nil)
}

func (st *stream) busy() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return len(st.unanswered) >= maxUnanswered
}

// push sends r unless the proxy has it, or has just refused it.
func (st *stream) push(r *resource) error {
	st.mu.Lock()
	sub := st.types[r.typeURL]
	if !has(sub.names, r.name()) && !sub.covers(st, r.typeURL, r.name()) {
		st.mu.Unlock()
		return nil // unsubscribed meanwhile
	}
	if !st.note(sub, r) {
		st.mu.Unlock()
		return nil // let go
	}
	h := sub.held[r.name()]
	if h == nil {
		h = &held{}
		sub.held[r.name()] = h
	}
	if h.sent == r.version() {
		again := h.acked == h.sent // the same content as it had, come again
		if again {
			h.ackedSeq = r.seq
		}
		st.mu.Unlock()
		if again {
			st.server.store.recheck(st)
		}
		return nil
	}
	h.sent = r.version()
	h.changed.note(time.Now())
	st.mu.Unlock()
	return st.respond(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.typeURL, Resources: []*discoveryv3.Resource{r.wire}},
		&answer{r.typeURL, r.name(), r.version(), r.seq, r.source})
}

func (st *stream) remove(r removal) error {
	return st.respond(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.typeURL, RemovedResources: r.names}, nil)
}

// respond sends one response. It blocks while the proxy doesn't read. Nobody
// waits for the answer to one without a resource (a is nil), so that a proxy that
// doesn't answer can't pile them up.
func (st *stream) respond(r *discoveryv3.DeltaDiscoveryResponse, a *answer) error {
	st.mu.Lock()
	st.nonce++
	r.Nonce = strconv.FormatUint(st.nonce, 10)
	if a != nil {
		st.unanswered[r.Nonce] = *a
	}
	st.types[r.TypeUrl].confirm = false
	st.mu.Unlock()
	st.server.metrics.pushed(r)
	if err := st.grpc.Send(r); err != nil {
		return fmt.Errorf("send to proxy: %w", err)
	}
	return nil
}

var errReplaced = errors.New("another stream of the same generation took its place")
