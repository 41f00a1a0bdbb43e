package nodeservice

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

var reviews = model.Identity{TrustDomain: "cluster.local", Namespace: "team-a", ServiceAccount: "reviews"}

// world is everything that the service asks.
type world struct {
	caller    error
	pods      map[string]*corev1.Pod
	podErr    map[string]error
	strangers bool // nobody is a member
	ttl       time.Duration
	cidrs     []netip.Prefix
	noNode    bool
	holders   []Holder
	announce  error
	announced []string
	authority *identity.Authority
	served    func(context.Context) error
}

func newWorld(t *testing.T) *world {
	t.Helper()
	a, err := identity.NewAuthority("cluster.local", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &world{
		authority: a, podErr: map[string]error{},
		pods:  map[string]*corev1.Pod{"team-a/reviews-0": runningPod("team-a", "reviews-0", "u1", "node-1")},
		cidrs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
	}
}

func runningPod(namespace, name, uid, node string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid), Annotations: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: "reviews"},
		Status:     corev1.PodStatus{Phase: corev1.PodPending},
	}
}

func (w *world) Authenticate(context.Context) (Caller, error) {
	if w.caller != nil {
		return Caller{}, w.caller
	}
	return Caller{Node: "node-1"}, nil
}

func (w *world) Live(_ context.Context, namespace, name string) (*corev1.Pod, error) {
	key := namespace + "/" + name
	if err := w.podErr[key]; err != nil {
		return nil, err
	}
	if p := w.pods[key]; p != nil {
		return p, nil
	}
	return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, name)
}

func (w *world) Member(p *corev1.Pod) (model.Identity, model.Tenant, bool) {
	return model.Identity{TrustDomain: "cluster.local", Namespace: p.Namespace, ServiceAccount: p.Spec.ServiceAccountName},
		model.NamespaceTenant(p.Namespace), !w.strangers
}

func (w *world) CertificateTTL(string) time.Duration { return w.ttl }

func (w *world) HasTenant(node string, t model.Tenant) bool {
	return node == "node-1" && t == model.NamespaceTenant("team-a")
}

func (w *world) NodePodCIDRs(string) ([]netip.Prefix, bool) { return w.cidrs, !w.noNode }

func (w *world) Holders(a netip.Addr) []Holder {
	if a == netip.MustParseAddr("10.1.0.7") {
		return w.holders
	}
	return nil
}

func (w *world) Announce(node string, p *corev1.Pod, addrs []netip.Addr) error {
	w.announced = append(w.announced, fmt.Sprint(node, " ", p.UID, " ", addrs))
	return w.announce
}

func (w *world) Authority() *identity.Authority { return w.authority }

func (w *world) WaitServed(ctx context.Context, key model.ProxyKey, uid string) error {
	if want := (model.ProxyKey{Node: "node-1", Tenant: model.NamespaceTenant("team-a")}); key != want || uid != "u1" || len(w.announced) == 0 {
		return fmt.Errorf("waits for %v and pod %s, announced %v", key, uid, w.announced)
	}
	if w.served != nil {
		return w.served(ctx)
	}
	return nil
}

func (w *world) service(change ...func(*Options)) *Service {
	o := Options{Callers: w, Pods: w, Mesh: w, Authorities: w, Proxies: w}
	for _, f := range change {
		f(&o)
	}
	return New(o)
}

func csrFor(t *testing.T, id model.Identity) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.NewCSR(key, id)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// podCases are the refusals that signing and attaching share.
var podCases = map[string]struct {
	change func(*world, *corev1.Pod)
	code   codes.Code
}{
	"fine":            {func(*world, *corev1.Pod) {}, codes.OK},
	"terminating":     {func(_ *world, p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }, codes.OK},
	"no token":        {func(w *world, _ *corev1.Pod) { w.caller = status.Error(codes.Unauthenticated, "who?") }, codes.Unauthenticated},
	"API away":        {func(w *world, _ *corev1.Pod) { w.podErr["team-a/reviews-0"] = errors.New("connection refused") }, codes.Unavailable},
	"not visible":     {func(w *world, _ *corev1.Pod) { w.pods = nil }, codes.Unavailable},
	"other UID":       {func(_ *world, p *corev1.Pod) { p.UID = "u2"; p.Spec.NodeName = "node-2" }, codes.Unavailable},
	"not bound":       {func(_ *world, p *corev1.Pod) { p.Spec.NodeName = "" }, codes.Unavailable},
	"of another node": {func(_ *world, p *corev1.Pod) { p.Spec.NodeName = "node-2" }, codes.PermissionDenied},
	"mirror":          {func(_ *world, p *corev1.Pod) { p.Annotations["kubernetes.io/config.mirror"] = "x" }, codes.PermissionDenied},
	"hostNetwork":     {func(_ *world, p *corev1.Pod) { p.Spec.HostNetwork = true }, codes.PermissionDenied},
	"succeeded":       {func(_ *world, p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, codes.PermissionDenied},
	"failed":          {func(_ *world, p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, codes.PermissionDenied},
	"unknown node":    {func(w *world, _ *corev1.Pod) { w.noNode, w.strangers = true, true }, codes.Unavailable},
	"no member":       {func(w *world, _ *corev1.Pod) { w.strangers = true }, codes.PermissionDenied},
}

func TestPodChecks(t *testing.T) {
	for name, c := range podCases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c.change(w, w.pods["team-a/reviews-0"])
			s := w.service()
			signed, err := s.SignCertificate(t.Context(), &nodev1alpha1.SignCertificateRequest{
				Csr: csrFor(t, reviews), PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"})
			if status.Code(err) != c.code || (signed != nil) != (err == nil) {
				t.Errorf("SignCertificate: %v, want %v", err, c.code)
			}
			attached, err := s.AttachPod(t.Context(), &nodev1alpha1.AttachPodRequest{
				PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0", Ips: []string{"10.1.0.7", "fd00:1::7"}})
			if status.Code(err) != c.code || (attached != nil) != (err == nil) {
				t.Errorf("AttachPod: %v, want %v", err, c.code)
			}
			var want []string
			if c.code == codes.OK {
				want = []string{"node-1 u1 [10.1.0.7 fd00:1::7]"}
			}
			if !slices.Equal(w.announced, want) {
				t.Errorf("announced %v, want %v", w.announced, want)
			}
			if len(s.inFlight) != 0 {
				t.Errorf("still counted: %v", s.inFlight)
			}
		})
	}
}

func TestSignCertificate(t *testing.T) {
	request := func(id model.Identity) *nodev1alpha1.SignCertificateRequest {
		return &nodev1alpha1.SignCertificateRequest{Csr: csrFor(t, id), PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"}
	}
	other := reviews
	other.ServiceAccount = "ratings"
	for name, c := range map[string]struct {
		request *nodev1alpha1.SignCertificateRequest
		change  func(*testing.T, *world)
		code    codes.Code
	}{
		"other identity": {request: request(other), code: codes.PermissionDenied},
		"no CSR":         {request: &nodev1alpha1.SignCertificateRequest{PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"}, code: codes.InvalidArgument},
		"no pod":         {request: &nodev1alpha1.SignCertificateRequest{Csr: csrFor(t, reviews)}, code: codes.InvalidArgument},
		"pod as path": {request: &nodev1alpha1.SignCertificateRequest{Csr: csrFor(t, reviews), PodUid: "u1", PodNamespace: "team-a", PodName: "../secrets/a"},
			code: codes.InvalidArgument},
		"no authority": {request: request(reviews), change: func(_ *testing.T, w *world) { w.authority = nil }, code: codes.Unavailable},
		"other authority": {request: request(reviews), change: func(t *testing.T, w *world) {
			a, err := identity.NewAuthority("elsewhere", time.Now())
			if err != nil {
				t.Fatal(err)
			}
			w.authority = a
		}, code: codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.change != nil {
				c.change(t, w)
			}
			if r, err := w.service().SignCertificate(t.Context(), c.request); status.Code(err) != c.code || r != nil {
				t.Errorf("%v, want %v", err, c.code)
			}
		})
	}

	w := newWorld(t)
	r, err := w.service().SignCertificate(t.Context(), request(reviews))
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.ParseRaw(spiffeid.RequireTrustDomainFromString("cluster.local"), bytes.Join(w.authority.Roots(), nil))
	if err != nil {
		t.Fatal(err)
	}
	id, chains, err := x509svid.ParseAndVerify(r.GetChain(), bundle)
	if err != nil || id.String() != reviews.String() {
		t.Fatalf("signed %q: %v", id, err)
	}
	if life := time.Until(chains[0][0].NotAfter); life > identity.DefaultTTL || life < identity.DefaultTTL-time.Minute {
		t.Errorf("lives %v", life)
	}
}

func TestAttachPod(t *testing.T) {
	holder := []Holder{{UID: "u9", Namespace: "team-b", Name: "old"}}
	holds := func(change func(*corev1.Pod)) func(*world) {
		return func(w *world) {
			w.holders = holder
			p := runningPod("team-b", "old", "u9", "node-2")
			change(p)
			w.pods["team-b/old"] = p
		}
	}
	for name, c := range map[string]struct {
		ips    []string
		change func(*world)
		within time.Duration // a minute by default
		code   codes.Code
	}{
		"no address":            {ips: []string{}, code: codes.InvalidArgument},
		"three":                 {ips: []string{"10.1.0.7", "fd00:1::7", "10.1.0.8"}, code: codes.InvalidArgument},
		"one family twice":      {ips: []string{"10.1.0.7", "10.1.0.8"}, code: codes.InvalidArgument},
		"no address at all":     {ips: []string{"reviews"}, code: codes.InvalidArgument},
		"prefix":                {ips: []string{"10.1.0.7/24"}, code: codes.InvalidArgument},
		"zone":                  {ips: []string{"fe80::1%eth0"}, code: codes.InvalidArgument},
		"IPv4 as IPv6":          {ips: []string{"::ffff:10.1.0.7"}, code: codes.InvalidArgument},
		"loopback":              {ips: []string{"127.0.0.1"}, code: codes.InvalidArgument},
		"multicast":             {ips: []string{"ff02::1"}, code: codes.InvalidArgument},
		"outside of the ranges": {ips: []string{"10.1.0.7", "fd00:2::7"}, code: codes.PermissionDenied},
		"family without range":  {ips: []string{"fd00:1::7"}, change: func(w *world) { w.cidrs = w.cidrs[:1] }, code: codes.PermissionDenied},
		"no ranges":             {ips: []string{"192.0.2.1"}, change: func(w *world) { w.cidrs = nil }},
		"unknown node":          {change: func(w *world) { w.noNode = true }, code: codes.Unavailable},
		"held by itself":        {change: func(w *world) { w.holders = []Holder{{UID: "u1", Namespace: "team-a", Name: "reviews-0"}} }},
		"held elsewhere":        {change: holds(func(*corev1.Pod) {}), code: codes.PermissionDenied},
		"held by one that goes": {change: holds(func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: time.Now()} }), code: codes.Unavailable},
		"held on the same node": {change: holds(func(p *corev1.Pod) { p.Spec.NodeName = "node-1" }), code: codes.Unavailable},
		"holder finished":       {change: holds(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })},
		"holder replaced":       {change: holds(func(p *corev1.Pod) { p.UID = "u10" })},
		"holder gone":           {change: func(w *world) { w.holders = holder }},
		"holder can't be read":  {change: func(w *world) { w.holders = holder; w.podErr["team-b/old"] = errors.New("timeout") }, code: codes.Unavailable},
		"not announced":         {change: func(w *world) { w.announce = errors.New("not synced") }, code: codes.Unavailable},
		"never served": {change: func(w *world) {
			w.served = func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("no stream: %w", ctx.Err()) }
		}, within: 50 * time.Millisecond, code: codes.DeadlineExceeded},
		"server ends":      {change: func(w *world) { w.served = func(context.Context) error { return errors.New("closing") } }, code: codes.Unavailable},
		"cancelled caller": {change: func(w *world) { w.served = func(context.Context) error { return context.Canceled } }, code: codes.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if c.change != nil {
				c.change(w)
			}
			if c.ips == nil {
				c.ips = []string{"10.1.0.7"}
			}
			s := w.service(func(o *Options) { o.AttachTimeout = cmp.Or(c.within, time.Minute) })
			r, err := s.AttachPod(t.Context(), &nodev1alpha1.AttachPodRequest{PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0", Ips: c.ips})
			if status.Code(err) != c.code || (r.GetTenant() == "team-a") != (err == nil) {
				t.Errorf("%v, %v, want %v", r, err, c.code)
			}
			if refused := c.code == codes.InvalidArgument || c.code == codes.PermissionDenied; refused && len(w.announced) > 0 {
				t.Errorf("announced %v", w.announced)
			}
		})
	}
}

func TestInFlight(t *testing.T) {
	w := newWorld(t)
	s := w.service()
	var leave []func()
	for range signsPerNode {
		_, done, err := s.enter(t.Context(), "SignCertificate", signsPerNode)
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, done)
	}
	r := &nodev1alpha1.SignCertificateRequest{Csr: csrFor(t, reviews), PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"}
	if _, err := s.SignCertificate(t.Context(), r); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	for _, done := range leave {
		done()
	}
	if _, err := s.SignCertificate(t.Context(), r); err != nil {
		t.Error(err)
	}
}

func TestAuthorize(t *testing.T) {
	for name, c := range map[string]struct {
		tenant, generation string
		caller             error
		code               codes.Code
	}{
		"fine":          {tenant: "team-a", generation: "1"},
		"not here":      {tenant: "team-b", generation: "0", code: codes.Unavailable},
		"no tenant":     {generation: "0", code: codes.InvalidArgument},
		"no generation": {tenant: "team-a", generation: "2", code: codes.InvalidArgument},
		"no token":      {tenant: "team-a", generation: "0", caller: status.Error(codes.Unauthenticated, "who?"), code: codes.Unauthenticated},
	} {
		w := newWorld(t)
		w.caller = c.caller
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(xds.MetadataTenant, c.tenant, xds.MetadataGeneration, c.generation))
		id, err := w.service().Authorize(ctx)
		want := xds.StreamIdentity{}
		if c.code == codes.OK {
			want = xds.StreamIdentity{Node: "node-1", Tenant: model.NamespaceTenant("team-a"), Generation: 1}
		}
		if status.Code(err) != c.code || id != want {
			t.Errorf("%s: %+v, %v, want %+v, %v", name, id, err, want, c.code)
		}
	}
}
