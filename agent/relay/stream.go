package relay

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

type downstream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

// sent is a response that the proxy hasn't acknowledged.
type sent struct {
	epoch     int    // of the operator's stream it came from; 0: the relay's own
	nonce     string // the operator's
	typeURL   string
	resources []*discovery.Resource
	removed   []string
}

// stream is one ADS stream of one Envoy. Everything in it belongs to run's loop.
type stream struct {
	key   Key
	relay *Relay
	down  downstream
	log   *slog.Logger
	good  *goodSet
	node  *core.Node
	pace  *rate.Limiter

	subs    map[string]*subscription
	unacked map[string]sent
	nonces  int

	up      upstreamClient // nil while there is no stream to the operator
	endUp   context.CancelFunc
	epoch   int
	started map[string]bool // types that the operator's stream has heard of

	// fallback fires when the operator has had its time to answer.
	fallback *time.Timer
	armed    bool
	// goodListeners is the nonce of listeners of last good that the proxy hasn't
	// answered; "" for none.
	goodListeners string
	// refusedGood are the versions of last good that the proxy refused. None is offered
	// again: each costs a stream to the operator.
	refusedGood map[rejectionKey]string
	secrets     *secretWatch
	// warm tells of clusters to get ahead.
	warm <-chan struct{}
}

func newStream(r *Relay, e *endpoint, down downstream) *stream {
	key := e.key
	fallback := time.NewTimer(time.Hour)
	fallback.Stop()
	return &stream{
		key: key, relay: r, down: down, log: slog.New(e.log).With("tenant", key.Tenant.String(), "generation", key.Generation),
		subs: map[string]*subscription{}, unacked: map[string]sent{}, fallback: fallback, refusedGood: map[rejectionKey]string{},
		secrets: newSecretWatch(r.opts.Secrets, key.Tenant), good: r.good.set(key.Tenant, e.socket.Version), warm: e.warm,
		pace: e.requests,
	}
}

// run serves the stream until the proxy goes away or sends what no Envoy would.
func (s *stream) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer s.fallback.Stop()

	requests, ended := make(chan *discovery.DeltaDiscoveryRequest), make(chan error, 1)
	go func() {
		for {
			// What an Envoy has no use for, such as refusing for ever, costs the agent CPU.
			if err := s.pace.Wait(ctx); err != nil {
				return
			}
			r, err := s.down.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	events := make(chan upstreamEvent)
	go upstreamLoop(ctx, s.relay.ads, s.key, s.relay.opts.Backoff, events)

	for {
		incoming, secrets := events, s.secrets.changed()
		if len(s.unacked) >= maxUnacked {
			incoming, secrets = nil, nil // all wait for this proxy, and nobody else does
		}
		select {
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			if grpcstatus.Code(err) == codes.Internal { // it can't be read
				s.log.Warn("proxy's request refused", "error", err)
			}
			return err
		case <-ctx.Done():
			return grpcstatus.Error(codes.Unavailable, "the proxy has another stream, or the agent stops")
		case r := <-requests:
			if err := s.request(ctx, r); err != nil {
				if errors.Is(err, errRefused) {
					s.log.Warn("proxy's request refused", "error", err)
					return grpcstatus.Error(codes.InvalidArgument, err.Error())
				}
				return err
			}
		case e := <-incoming:
			if err := s.event(e); err != nil {
				return err
			}
		case <-secrets:
			if err := s.pushSecrets(); err != nil {
				return err
			}
		case <-s.warm:
			if err := s.getAhead(); err != nil {
				return err
			}
		case <-s.fallback.C:
			s.armed = false
			if err := s.serveLastGood(); err != nil {
				return err
			}
		}
	}
}

// request handles what the proxy sent.
func (s *stream) request(ctx context.Context, r *discovery.DeltaDiscoveryRequest) error {
	sub, seen := s.subs[r.TypeUrl]
	if !seen {
		sub = newSubscription()
	}
	if s.node == nil {
		s.identify(r.Node)
	}
	if !seen && r.TypeUrl == TypeCluster {
		s.gotAhead(r)
	}
	c, err := sub.apply(r, !seen)
	if err != nil {
		return err
	}
	s.subs[r.TypeUrl] = sub
	if r.TypeUrl == TypeCluster {
		s.relay.forget(s.key, s.down, c.unsubscribe)
	}
	if !seen && r.TypeUrl == TypeCluster {
		s.relay.found(s.key, s.down, sub.named(slices.Collect(maps.Keys(sub.held))), true)
	}
	if !seen && r.TypeUrl == TypeListener && len(sub.held) > 0 {
		s.relay.accepted(s.key, s.down, r.TypeUrl, len(sub.held), nil) // it has kept them over a reconnection
	}
	if n := len(c.dropped); n > 0 {
		sub.refused += n
		s.relay.refusedNames(s.key, r.TypeUrl, sub.refused)
		if len(s.unacked) < maxUnacked { // one that doesn't answer gets none either
			if err := s.send(sent{typeURL: r.TypeUrl, removed: c.dropped}, ""); err != nil {
				return err
			}
		}
	}
	if n := len(c.subscribe); n > 0 {
		// Only this proxy waits when it asks for names faster than it may.
		if err := s.relay.wait(ctx, s.key, n); err != nil {
			return err
		}
	}
	ack := s.acknowledge(r, sub)
	if r.TypeUrl == TypeSecret {
		s.secrets.want(c.subscribe, c.unsubscribe)
		if slices.Contains(c.subscribe, identity.RootCA) {
			s.relay.rootsWanted(s.key, s.down, true)
		} else if slices.Contains(c.unsubscribe, identity.RootCA) {
			s.relay.rootsWanted(s.key, s.down, false)
		}
		return s.pushSecrets()
	}
	s.ask(r.TypeUrl, c, ack, !seen)
	return nil
}

// ask tells the operator what the proxy wants or doesn't any more, with ack if that
// isn't nil. What it doesn't answer in time is answered from last good; first is
// for a request that may want all by a wildcard.
func (s *stream) ask(typeURL string, c change, ack *discovery.DeltaDiscoveryRequest, first bool) {
	sub := s.subs[typeURL]
	if len(sub.waiting) > 0 && (len(c.subscribe) > 0 || first) {
		s.armFallback()
	}
	if s.up == nil {
		return
	}
	if !s.started[typeURL] {
		s.resume(typeURL)
		return
	}
	if ack == nil && c.empty() {
		return
	}
	if ack == nil {
		ack = &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL}
	}
	ack.ResourceNamesSubscribe, ack.ResourceNamesUnsubscribe = c.subscribe, c.unsubscribe
	s.sendUp(ack)
}

// identify keeps of the node what configuration depends on. Who it is, the agent
// says, never Envoy.
func (s *stream) identify(n *core.Node) {
	s.node = &core.Node{Id: s.key.Tenant.String() + "/" + strconv.Itoa(s.key.Generation), UserAgentName: "envoy"}
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		s.node.UserAgentVersionType = &core.Node_UserAgentBuildVersion{UserAgentBuildVersion: &core.BuildVersion{Version: v}}
	}
	s.log.Info("proxy connected", "version", s.node.GetUserAgentBuildVersion().GetVersion().String())
}

// acknowledge settles the response that r answers and returns the request that
// tells the operator, or nil if it isn't to know.
func (s *stream) acknowledge(r *discovery.DeltaDiscoveryRequest, sub *subscription) *discovery.DeltaDiscoveryRequest {
	if r.ResponseNonce == "" {
		return nil
	}
	p, ok := s.unacked[r.ResponseNonce]
	if !ok || p.typeURL != r.TypeUrl {
		return nil
	}
	delete(s.unacked, r.ResponseNonce)
	if r.ResponseNonce == s.goodListeners {
		s.goodListeners = ""
		defer s.tellAnew()
	}
	up := &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: p.nonce}
	if e := r.ErrorDetail; e != nil {
		message := printable(e.Message, 2048)
		up.ErrorDetail = &status.Status{Code: e.Code, Message: message}
		names := resourceNames(p.resources)
		if p.epoch == 0 && r.TypeUrl != TypeSecret {
			for _, g := range p.resources {
				s.refusedGood[rejectionKey{r.TypeUrl, g.Name}] = g.Version
			}
		}
		s.relay.rejected(s.key, r.TypeUrl, names, message)
		s.log.Warn("proxy rejected configuration", "type", kinds[r.TypeUrl].short, "resources", names, "lastGood", p.epoch == 0, "reason", message)
		if err := s.replace(r.TypeUrl, sub, p); err != nil {
			s.log.Debug("last good isn't sent", "error", err) // the stream is over
		}
	} else {
		sub.acknowledged(p.resources, p.removed)
		if r.TypeUrl == TypeSecret && len(p.resources) == 1 && p.resources[0].Name == identity.RootCA {
			s.relay.acknowledgedRoots(s.key, s.down, p.resources[0].Version)
		}
		if r.TypeUrl == TypeCluster {
			s.relay.found(s.key, s.down, sub.named(allNames(p.resources)), true)
			s.relay.found(s.key, s.down, sub.named(p.removed), false)
		}
		if r.TypeUrl != TypeSecret {
			s.good.update(r.TypeUrl, sub, p.resources, p.removed)
			names := resourceNames(p.resources)
			if p.epoch == 0 {
				names = nil // last good: what was refused is still refused
			}
			s.relay.accepted(s.key, s.down, r.TypeUrl, len(sub.held), names)
		}
	}
	if p.epoch == 0 || p.epoch != s.epoch || s.up == nil {
		return nil
	}
	return up
}

// replace gives the proxy last good versions of what it refused and has no other
// version of: one that has just started would otherwise be without.
func (s *stream) replace(typeURL string, sub *subscription, refused sent) error {
	if refused.epoch == 0 || typeURL == TypeSecret {
		return nil
	}
	for _, r := range refused.resources {
		if _, has := sub.held[r.Name]; has {
			continue
		}
		g := s.good.get(typeURL, r.Name)
		if g == nil || g.Version == r.Version || s.hasRefused(typeURL, g) {
			continue
		}
		s.log.Info("serving last good configuration instead of what was refused", "type", kinds[typeURL].short, "resource", r.Name)
		if err := s.sendLastGood(typeURL, []*discovery.Resource{g}); err != nil {
			return err
		}
	}
	return nil
}

// event handles what happened on the operator's side.
func (s *stream) event(e upstreamEvent) error {
	switch {
	case e.stream != nil:
		s.up, s.endUp, s.epoch, s.started = e.stream, e.end, s.epoch+1, map[string]bool{}
		for typeURL := range s.subs {
			if typeURL != TypeSecret {
				s.resume(typeURL)
			}
		}
	case e.err != nil:
		if s.up != nil || s.epoch == 0 {
			s.log.Info("operator's stream ended", "error", e.err)
		}
		s.up = nil
		if s.anyWaiting() {
			s.armFallback()
		}
	case e.response != nil:
		if s.up == nil || s.goodListeners != "" && e.response.TypeUrl == TypeListener {
			return nil // the next stream brings it, as far as it still holds
		}
		return s.forward(e.response)
	}
	return nil
}

// tellAnew has another stream to the operator begin, if the proxy got listeners of last
// good while it waited for an answer on this one. They may have chains of its own, which
// an operator has to hear of before it sends listeners, or these would end them.
func (s *stream) tellAnew() {
	if s.up == nil || !s.started[TypeListener] {
		return
	}
	s.up = nil
	s.endUp()
}

// forward hands the operator's response to the proxy.
func (s *stream) forward(r *discovery.DeltaDiscoveryResponse) error {
	sub := s.subs[r.TypeUrl]
	if sub == nil || r.TypeUrl == TypeSecret {
		s.log.Warn("operator sent what wasn't asked for", "type", printable(r.TypeUrl, 128))
		return nil
	}
	had := sub.refused
	sub.answered(r.Resources, r.RemovedResources)
	if sub.refused != had {
		s.relay.refusedNames(s.key, r.TypeUrl, sub.refused)
	}
	return s.send(sent{epoch: s.epoch, nonce: r.Nonce, typeURL: r.TypeUrl, resources: r.Resources, removed: r.RemovedResources}, r.SystemVersionInfo)
}

func (s *stream) send(p sent, version string) error {
	s.nonces++
	nonce := strconv.Itoa(s.nonces)
	s.unacked[nonce] = p
	resources := p.resources
	if p.typeURL == TypeListener && s.key.Generation > 0 {
		resources = ofGeneration(s.key.Generation, resources)
	}
	return s.down.Send(&discovery.DeltaDiscoveryResponse{
		TypeUrl: p.typeURL, Nonce: nonce, Resources: resources, RemovedResources: p.removed, SystemVersionInfo: version,
	})
}

// resume tells the operator's stream of a type, unless there is nothing to tell or that
// stream has ended, maybe while it was told of another.
func (s *stream) resume(typeURL string) {
	sub := s.subs[typeURL]
	if s.up == nil || sub.idle() {
		return
	}
	r := sub.resume(typeURL)
	if len(s.started) == 0 {
		r.Node = s.node
	}
	s.started[typeURL] = true
	s.sendUp(r)
}

// sendUp leaves a failure to the receiving side of the same stream, which ends
// with it.
func (s *stream) sendUp(r *discovery.DeltaDiscoveryRequest) {
	if err := s.up.Send(r); err != nil {
		s.up = nil
		if s.anyWaiting() {
			s.armFallback()
		}
	}
}

func (s *stream) anyWaiting() bool {
	for typeURL, sub := range s.subs {
		if typeURL != TypeSecret && len(sub.waiting) > 0 {
			return true
		}
	}
	return false
}

// armFallback gives the operator time before last good is used: little while it
// is away.
func (s *stream) armFallback() {
	if s.armed {
		return
	}
	d := s.relay.opts.Patience
	if s.up == nil {
		d /= 4
	}
	s.armed = true
	s.fallback.Reset(d)
}

// serveLastGood answers what the operator hasn't. What isn't known stays open
// until the operator is back.
func (s *stream) serveLastGood() error {
	// Clusters before listeners, or the first connections find none.
	for _, typeURL := range []string{TypeCluster, TypeEndpoints, TypeListener, TypeFilterChain, TypeRoute} {
		sub := s.subs[typeURL]
		if sub == nil || len(sub.waiting) == 0 {
			continue
		}
		resources := slices.DeleteFunc(s.good.lookup(typeURL, sub), func(g *discovery.Resource) bool { return s.hasRefused(typeURL, g) })
		if len(resources) == 0 {
			continue
		}
		s.log.Info("serving last good configuration", "type", kinds[typeURL].short, "resources", len(resources))
		sub.answered(resources, nil)
		if err := s.sendLastGood(typeURL, resources); err != nil {
			return err
		}
	}
	return nil
}

// hasRefused reports whether the proxy has been offered this version of last good in vain.
func (s *stream) hasRefused(typeURL string, g *discovery.Resource) bool {
	version, refused := s.refusedGood[rejectionKey{typeURL, g.Name}]
	return refused && version == g.Version
}

func (s *stream) sendLastGood(typeURL string, resources []*discovery.Resource) error {
	err := s.send(sent{typeURL: typeURL, resources: resources}, "last-good")
	if typeURL == TypeListener {
		s.goodListeners = strconv.Itoa(s.nonces)
	}
	return err
}

func (s *stream) pushSecrets() error {
	for _, u := range s.secrets.updates(maxUnacked - len(s.unacked)) {
		p := sent{typeURL: TypeSecret}
		if u.resource != nil {
			p.resources = []*discovery.Resource{u.resource}
		} else {
			p.removed = []string{u.name}
		}
		if err := s.send(p, ""); err != nil {
			return err
		}
	}
	return nil
}

// allNames are those of resources; resourceNames are for people.
func allNames(rs []*discovery.Resource) (names []string) {
	for _, r := range rs {
		names = append(names, r.Name)
	}
	return names
}

func resourceNames(rs []*discovery.Resource) []string {
	names := make([]string, 0, min(len(rs), 16))
	for _, r := range rs {
		if len(names) == 16 {
			return append(names, "…")
		}
		names = append(names, r.Name)
	}
	return names
}

// printable cuts s and takes out what could forge log lines.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	b := []rune(s)
	for i, r := range b {
		if r < ' ' || r == 0x7f || r == '\u2028' {
			b[i] = ' '
		}
	}
	return string(b)
}
