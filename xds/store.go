package xds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// StoreOptions configure a Store. The zero value works.
type StoreOptions struct {
	// OnReject is told of each resource that isn't in force. It is called from many
	// goroutines, sometimes with locks held: it must not block nor call the Store.
	// Default: the logger only.
	OnReject func(Rejection)
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// Store is what is known of the mesh, and who holds which part of it. It is safe
// for concurrent use. It keeps what it is given: don't change slices afterwards.
//
// Shared resources are built when the first proxy asks for them and forgotten
// with the last; a change marks them at those who hold them and costs nobody
// else anything.
type Store struct {
	opts   StoreOptions
	static map[string]*resource // clusters
	newest Form                 // NewestForm, but where a test has a former operator

	mu      sync.Mutex
	synced  bool
	changed chan struct{} // closed and replaced when a proxy may have become known
	network model.Network

	proxies map[model.ProxyKey]*proxyState
	// common are the last contents of each listener: what doesn't depend on the proxy
	// is one for all.
	common    map[commonKey]*discoveryv3.Resource
	services  map[serviceKey]model.Service
	routings  map[serviceKey]map[scope]model.Routing
	vips      map[netip.AddrPort]serviceKey
	workloads map[string]model.Workload // by UID
	addrs     map[netip.Addr][]string   // UIDs, the newest last
	shared    map[resourceKey]*entry
	// reading are the streams whose process has chains for an address.
	reading map[netip.AddrPort]map[*stream]struct{}
	builds  uint64
}

type serviceKey = model.ServiceKey

type resourceKey struct{ typeURL, name string }

type commonKey struct {
	form Form
	name string
}

// entry is a shared resource that somebody holds. Whose clients have routes of
// their own for a service holds another variant than others.
type entry struct {
	// name is one string for all who hold it.
	name string
	// version counts the times that it may have changed.
	version uint64
	built   map[variant]*built
	holders map[*stream]struct{}
}

type built struct {
	version uint64 // of the entry
	current *resource
}

// NewStore returns an empty store. Nothing is served from it before MarkSynced.
func NewStore(o StoreOptions) *Store {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Store{
		opts: o, static: map[string]*resource{}, newest: NewestForm, changed: make(chan struct{}),
		proxies: map[model.ProxyKey]*proxyState{}, common: map[commonKey]*discoveryv3.Resource{}, services: map[serviceKey]model.Service{}, routings: map[serviceKey]map[scope]model.Routing{}, vips: map[netip.AddrPort]serviceKey{},
		workloads: map[string]model.Workload{}, addrs: map[netip.Addr][]string{}, shared: map[resourceKey]*entry{}, reading: map[netip.AddrPort]map[*stream]struct{}{},
	}
	clusters, err := StaticClusters()
	if err != nil {
		panic(err) // constant: a test would have failed
	}
	for _, c := range clusters {
		r, err := encode(c.Name, Source{Kind: "Static"}, c)
		if err != nil {
			panic(err)
		}
		s.static[c.Name] = r
	}
	return s
}

// MarkSynced says that the first full picture is in the store. Before, proxies
// would be told that services which do exist have no endpoints.
func (s *Store) MarkSynced() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced = true
	s.announce()
}

func (s *Store) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// SetNetwork changes all listeners, if n is new.
func (s *Store) SetNetwork(n model.Network) error {
	if err := checkNetwork(n); err != nil {
		return &ObjectError{Source{Kind: "Network"}, err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if reflect.DeepEqual(s.network, n) {
		return nil
	}
	s.network = n
	for _, p := range s.proxies {
		p.invalidate()
	}
	return nil
}

// SetService adds or replaces a service. An address that another service had is
// the new one's. A service that is refused stays as it was.
func (s *Store) SetService(svc model.Service) error {
	if err := checkService(svc); err != nil {
		return &ObjectError{serviceSource(svc), err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := serviceKey{Namespace: svc.Namespace, Name: svc.Name}
	old, had := s.services[key]
	if had && reflect.DeepEqual(old, svc) {
		return nil
	}
	s.services[key] = svc
	was := serviceVIPs(old)
	now := serviceVIPs(svc)
	for vip := range was {
		if _, still := now[vip]; !still && s.vips[vip] == key {
			s.dropVIP(vip)
		}
	}
	for vip, port := range now {
		if _, known := s.vips[vip]; !known {
			s.invalidate(TypeCluster, VIPName(vip)) // who was told to forget it
		}
		if s.vips[vip] == key && reflect.DeepEqual(was[vip], port) {
			continue
		}
		if s.vips[vip] == key {
			s.invalidate(TypeEndpoints, VIPName(vip))
			continue
		}
		s.vips[vip] = key
		s.invalidateVIP(vip)
	}
	s.invalidateBackends(old, svc)
	return nil
}

// DeleteService forgets a service; its addresses stay with those who hold them,
// without endpoints.
func (s *Store) DeleteService(namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := serviceKey{Namespace: namespace, Name: name}
	for vip := range serviceVIPs(s.services[key]) {
		if s.vips[vip] == key {
			s.dropVIP(vip)
		}
	}
	s.invalidateBackends(s.services[key], model.Service{Namespace: namespace, Name: name})
	delete(s.services, key)
}

func (s *Store) dropVIP(vip netip.AddrPort) {
	delete(s.vips, vip)
	s.invalidateVIP(vip)
	s.invalidate(TypeCluster, VIPName(vip))
}

// ServiceOf is the service that a resource's name stands for now: a cluster, endpoints,
// or what leads requests to it.
func (s *Store) ServiceOf(resource string) (namespace, name string, ok bool) {
	if b, ok := parseBackendName(resource); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		_, ok = s.services[b.ServiceKey]
		return b.Namespace, b.Name, ok
	}
	vip, ok := parseVIPName(resource)
	if !ok {
		vip, ok = parseHTTPName(resource)
	}
	if !ok {
		return "", "", false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key, ok := s.vips[vip]
	return key.Namespace, key.Name, ok
}

func serviceVIPs(svc model.Service) map[netip.AddrPort]model.ServicePort {
	out := map[netip.AddrPort]model.ServicePort{}
	for _, v := range svc.VIPs {
		for _, p := range svc.Ports {
			out[netip.AddrPortFrom(v, p.Port)] = p
		}
	}
	return out
}

// SetWorkload adds or replaces a pod, by UID: one of the mesh, or one outside of
// it (without an identity), which is reached in plain text. An address that no
// workload has is refused until one has it.
func (s *Store) SetWorkload(w model.Workload) error {
	if err := checkWorkload(w); err != nil {
		return &ObjectError{workloadSource(w), err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, had := s.workloads[w.UID]
	if had && reflect.DeepEqual(old, w) {
		return nil
	}
	s.workloads[w.UID] = w
	for _, a := range old.IPs {
		if !slices.Contains(w.IPs, a) {
			s.dropAddr(a, w.UID)
		}
	}
	for _, a := range w.IPs {
		if !slices.Contains(s.addrs[a], w.UID) {
			s.addrs[a] = append(slices.Clip(s.addrs[a]), w.UID)
		}
		s.invalidate(TypeCluster, PodName(a))
	}
	return nil
}

// DeleteWorkload forgets a pod.
func (s *Store) DeleteWorkload(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.workloads[uid].IPs {
		s.dropAddr(a, uid)
	}
	delete(s.workloads, uid)
}

func (s *Store) dropAddr(a netip.Addr, uid string) {
	s.addrs[a] = slices.DeleteFunc(slices.Clone(s.addrs[a]), func(u string) bool { return u == uid })
	if len(s.addrs[a]) == 0 {
		delete(s.addrs, a)
	}
	s.invalidate(TypeCluster, PodName(a))
}

// holder is the workload that an address belongs to: of several, one of the mesh
// before one outside of it, which would be reached in plain text; then the newest.
func (s *Store) holder(a netip.Addr) (model.Workload, bool) {
	uids := s.addrs[a]
	for _, uid := range slices.Backward(uids) {
		if w := s.workloads[uid]; !w.Identity.IsZero() {
			return w, true
		}
	}
	if len(uids) == 0 {
		return model.Workload{}, false
	}
	return s.workloads[uids[len(uids)-1]], true
}

// invalidate marks a shared resource at those who hold it.
func (s *Store) invalidate(typeURL, name string) {
	e := s.shared[resourceKey{typeURL, name}]
	if e == nil {
		return
	}
	e.version++
	for st := range e.holders {
		st.mark(typeURL, name, false)
	}
}

// hold subscribes st to a resource by name. It reports false for names that never
// exist and for streams that are over.
func (s *Store) hold(st *stream, typeURL, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.proxies[st.key]
	if p == nil || !has(p.streams, st) {
		return false
	}
	if !s.unshared(typeURL, name) {
		if !validShared(typeURL, name) {
			return false
		}
		key := resourceKey{typeURL, name}
		e := s.shared[key]
		if e == nil {
			e = &entry{name: name, version: 1, built: map[variant]*built{}, holders: map[*stream]struct{}{}}
			s.shared[key] = e
		}
		e.holders[st] = struct{}{}
		name = e.name
	}
	// With Store.mu held, so that detach finds it.
	st.mu.Lock()
	st.types[typeURL].names[name] = struct{}{}
	st.mu.Unlock()
	return true
}

func has[K comparable](m map[K]struct{}, k K) bool { _, ok := m[k]; return ok }

// unshared reports whether name is a static cluster or a listener.
func (s *Store) unshared(typeURL, name string) bool {
	switch typeURL {
	case TypeCluster:
		return s.static[name] != nil
	case TypeListener:
		return slices.Contains(listenerNames, name)
	}
	return false
}

var listenerNames = []string{listenerOutbound, listenerInbound, listenerPlain, listenerNodePlain, listenerHBONE, listenerUnwrap}

func validShared(typeURL, name string) bool {
	_, vip := parseVIPName(name)
	_, pod := parsePodName(name)
	_, http := parseHTTPName(name)
	_, backend := parseBackendName(name)
	switch typeURL {
	case TypeCluster:
		return vip || pod || backend || name == mirrorName
	case TypeEndpoints:
		return vip || backend
	case TypeListener:
		return http || name == mirrorName
	case TypeRoutes:
		return http
	}
	return false
}

// release is the opposite of hold.
func (s *Store) release(st *stream, typeURL, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked(st, typeURL, name)
}

func (s *Store) releaseLocked(st *stream, typeURL, name string) {
	key := resourceKey{typeURL, name}
	e := s.shared[key]
	if e == nil {
		return
	}
	delete(e.holders, st)
	if len(e.holders) == 0 {
		delete(s.shared, key)
	}
}

// lookup is what st may have under a name now; nil if nothing.
func (s *Store) lookup(st *stream, typeURL, name string) *resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch typeURL {
	case TypeListener:
		if slices.Contains(listenerNames, name) {
			p := s.proxies[st.key]
			switch {
			case p == nil || !has(p.streams, st):
				return nil // the stream is over
			case name == listenerOutbound:
				return s.outbound(st, p)
			}
			return s.listeners(p, st.form(name)).listeners[name]
		}
	case TypeCluster:
		if r := s.static[name]; r != nil {
			return r
		}
	}
	e := s.shared[resourceKey{typeURL, name}]
	if e == nil {
		return nil
	}
	which := s.variant(st, typeURL, name)
	b := e.built[which]
	if b == nil {
		b = &built{}
		e.built[which] = b
	}
	if b.version != e.version {
		b.version = e.version
		s.builds++
		if r, err := s.build(typeURL, name, which); err != nil {
			s.refuse(typeURL, name, err)
		} else {
			b.current = r
		}
	}
	return b.current
}

// wildcard is the names that a wildcard subscription of st stands for.
func (s *Store) wildcard(typeURL string) []string {
	switch typeURL {
	case TypeCluster:
		return slices.Sorted(maps.Keys(s.static))
	case TypeListener:
		return listenerNames
	}
	return nil
}

func (s *Store) build(typeURL, name string, which variant) (*resource, error) {
	var m proto.Message
	var needs []resourceKey
	var err error
	var source Source
	if vip, ok := parseVIPName(name); ok {
		svc := s.services[s.vips[vip]]
		source = serviceSource(svc)
		switch {
		case typeURL == TypeCluster:
			m, err = VIPCluster(vip)
		case which.routed:
			m = HTTPEndpoints(vip)
			needs = []resourceKey{{TypeListener, HTTPName(vip)}, {TypeRoutes, HTTPName(vip)}}
		default:
			m, err = VIPEndpoints(vip, svc, which.from)
		}
	} else if addr, ok := parsePodName(name); ok {
		if w, known := s.holder(addr); known {
			source = workloadSource(w)
			m, err = PodCluster(addr, w)
		} else {
			m, err = UnknownPodCluster(addr)
		}
	} else if vip, ok := parseHTTPName(name); ok {
		source = serviceSource(s.services[s.vips[vip]])
		if typeURL == TypeListener {
			m, err = httpListenerOf(which.form, vip)
		} else {
			m, needs, err = s.buildRoutes(vip, which.consumer)
		}
	} else if b, ok := parseBackendName(name); ok {
		svc := s.services[b.ServiceKey]
		source = serviceSource(svc)
		if typeURL == TypeCluster {
			m, err = BackendCluster(b, portNumbered(svc, b.Port).Protocol)
		} else {
			m = BackendEndpoints(b, svc, which.from)
		}
	} else if name == mirrorName {
		source = Source{Kind: "Static"}
		if typeURL == TypeListener {
			m, err = mirrorListener(which.form)
		} else {
			m, err = mirrorCluster()
		}
	} else {
		err = fmt.Errorf("%q isn't a name", name)
	}
	if err != nil {
		return nil, cmp.Or[error](asObjectError(err), &ObjectError{source, err})
	}
	r, err := encode(name, source, m)
	if err == nil {
		r.needs, r.unknown = needs, s.unknown(name)
		if typeURL == TypeListener {
			which.form.mark(r)
		}
	}
	return r, err
}

// asObjectError returns nil, not a nil *ObjectError, if err isn't about an object.
func asObjectError(err error) error {
	var oe *ObjectError
	if errors.As(err, &oe) {
		return oe
	}
	return nil
}

// refuse tells that a resource couldn't be built.
func (s *Store) refuse(typeURL, name string, err error) {
	r := Rejection{Type: typeURL, Resource: name, Message: err.Error()}
	var oe *ObjectError
	if errors.As(err, &oe) {
		r.Source, r.Message = oe.Source, oe.Err.Error()
	}
	s.reject(r)
}

func (s *Store) reject(r Rejection) {
	s.opts.Logger.Warn("resource refused", "type", r.Type, "resource", r.Resource, "source", r.Source, "node", r.Proxy.Node, "tenant", r.Proxy.Tenant.String(), "reason", r.Message)
	if s.opts.OnReject != nil {
		s.opts.OnReject(r)
	}
}

// attach waits until the store is synced and knows the proxy, then registers st
// and returns the older streams that it takes the place of.
func (s *Store) attach(ctx context.Context, st *stream) ([]*stream, error) {
	for {
		s.mu.Lock()
		p := s.proxies[st.key]
		if s.synced && p != nil {
			var older []*stream
			for o := range p.streams {
				if o.generation == st.generation {
					older = append(older, o)
				}
			}
			p.streams[st] = struct{}{}
			p.wake()
			s.mu.Unlock()
			return older, nil
		}
		changed, synced := s.changed, s.synced
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			if !synced {
				return nil, errors.New("the operator doesn't know the whole mesh yet")
			}
			return nil, fmt.Errorf("%s isn't known here", proxySource(st.key))
		}
	}
}

// detach forgets st and returns how many names of each type it held.
func (s *Store) detach(st *stream) map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.proxies[st.key]; p != nil {
		delete(p.streams, st)
		p.prune()
		p.wake()
	}
	for vip := range st.straight.accounts {
		s.dropChains(st, vip)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	held := map[string]int{}
	for typeURL, sub := range st.types {
		held[typeURL] = len(sub.names)
		for name := range sub.names {
			s.releaseLocked(st, typeURL, name)
		}
	}
	return held
}
