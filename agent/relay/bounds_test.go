package relay

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// TestRelaySlowTenant floods one proxy that doesn't read; the other one's changes
// must arrive all the same.
func TestRelaySlowTenant(t *testing.T) {
	f := setUp(t, nil)
	slow := f.proxy(teamA)
	slow.subscribe(TypeCluster)
	slowUp := f.op.stream()
	slowUp.await(t, TypeCluster, "")
	quick := f.proxy(teamB)
	quick.subscribe(TypeCluster)
	quickUp := f.op.stream()
	quickUp.await(t, TypeCluster, "")
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		big := strings.Repeat("x", 64<<10)
		for i := range 5000 {
			if slowUp.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeCluster, Nonce: fmt.Sprint(i),
				Resources: []*discovery.Resource{{Name: fmt.Sprint(i), Version: "1", Resource: &anypb.Any{TypeUrl: TypeCluster, Value: []byte(big)}}}}) != nil {
				return
			}
		}
	}()
	for i := range 200 {
		quickUp.send(t, fmt.Sprint(i), resource(TypeCluster, "deliver", fmt.Sprint(i)))
		wantNames(t, quick.next(), "deliver@"+fmt.Sprint(i))
	}
	select {
	case <-flooded:
		t.Error("the flood went through: the relay buffers without bound")
	default:
	}
	slowUp.end <- nil
}

func TestRelayRefuses(t *testing.T) {
	for name, r := range map[string]*discovery.DeltaDiscoveryRequest{
		"unknown type":    {TypeUrl: "type.googleapis.com/evil"},
		"no type":         {},
		"wildcard EDS":    {TypeUrl: TypeEndpoints, ResourceNamesSubscribe: []string{wildcard}},
		"wildcard SDS":    {TypeUrl: TypeSecret, ResourceNamesSubscribe: []string{wildcard}},
		"long name":       {TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{strings.Repeat("a", maxName+1)}},
		"control in name": {TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{"a\nb"}},
		"empty name":      {TypeUrl: TypeCluster, ResourceNamesSubscribe: []string{""}},
		"too large":       {TypeUrl: TypeCluster, ResourceNamesSubscribe: slices.Repeat([]string{strings.Repeat("a", 1000)}, 10_000)},
		"long version":    {TypeUrl: TypeCluster, InitialResourceVersions: map[string]string{"a": strings.Repeat("v", model.MaxVersion+1)}},
	} {
		t.Run(name, func(t *testing.T) {
			f := setUp(t, nil)
			p := f.proxy(teamA)
			p.subscribe(TypeRoute, "fine")
			up := f.op.stream()
			receive(t, "request", up.requests)
			p.send(r)
			if c := grpcstatus.Code(receive(t, "refusal", p.err)); c != codes.InvalidArgument && c != codes.ResourceExhausted {
				t.Errorf("ended with %s", c)
			}
			receive(t, "end of the operator's stream", up.gone)
			if n := len(up.requests); n > 0 {
				t.Errorf("reached the operator: %v", <-up.requests)
			}
		})
	}
}

func TestRelayBoundsNames(t *testing.T) {
	f := setUp(t, func(o *Options) { o.NamesPerSecond = 1e6 })
	p := f.proxy(teamA)
	for i := 0; i < maxNames+2000; i += 1000 {
		var batch []string
		for j := range 1000 {
			batch = append(batch, fmt.Sprintf("vip|%d", i+j))
		}
		p.subscribe(TypeCluster, batch...)
	}
	dropped := 0
	for dropped < 2000-maxNames%1000 {
		r := p.next()
		dropped += len(r.RemovedResources)
	}
	p.subscribe(TypeEndpoints, "last")
	up, n := f.op.stream(), 0
	for {
		r := receive(t, "request", up.requests)
		if r.TypeUrl == TypeEndpoints {
			break
		}
		n += len(r.ResourceNamesSubscribe)
	}
	if n != maxNames {
		t.Errorf("%d names reached the operator, want %d", n, maxNames)
	}
}

// An Envoy that comes back asks for all that it ever asked for; what it has must be
// among what fits.
func TestRelayKeepsWhatIsHeld(t *testing.T) {
	f := setUp(t, func(o *Options) { o.NamesPerSecond = 1e6 })
	p := f.proxy(teamA)
	names := make([]string, maxNames+5000)
	for i := range names {
		names[i] = fmt.Sprintf("vip|10.96.%d.%d:%d", i>>8&255, i&255, i)
	}
	last := names[len(names)-1]
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: names, InitialResourceVersions: map[string]string{last: "7"}})
	up := f.op.stream()
	r := receive(t, "request", up.requests)
	if len(r.ResourceNamesSubscribe) != maxNames || r.InitialResourceVersions[last] != "7" || !slices.Contains(r.ResourceNamesSubscribe, last) {
		t.Errorf("%d names reached the operator, %v of them held; %s among them: %v", len(r.ResourceNamesSubscribe), r.InitialResourceVersions, last, slices.Contains(r.ResourceNamesSubscribe, last))
	}
	if got := p.next(); len(got.RemovedResources) != 5000 {
		t.Errorf("%d names were refused", len(got.RemovedResources))
	}
	eventually(t, "it is told", func() bool {
		s := f.relay.State(Key{Tenant: teamA})
		return len(s.Rejections) == 1 && strings.Contains(s.Rejections[0].Message, "1000 or more names")
	})
	// What doesn't exist makes room for what may.
	if err := up.st.Send(&discovery.DeltaDiscoveryResponse{TypeUrl: TypeCluster, Nonce: "1", RemovedResources: []string{names[0]}}); err != nil {
		t.Fatal(err)
	}
	p.next()
	p.subscribe(TypeCluster, "vip|new")
	for {
		r := receive(t, "request", up.requests)
		if slices.Equal(r.ResourceNamesSubscribe, []string{"vip|new"}) {
			if !slices.Equal(r.ResourceNamesUnsubscribe, []string{names[0]}) {
				t.Errorf("gave back %q", r.ResourceNamesUnsubscribe)
			}
			break
		}
	}
}

// TestRelayFloodingTenant: one proxy asks as fast as it can, without reading an
// answer; the other one's changes must arrive all the same.
func TestRelayFloodingTenant(t *testing.T) {
	f := setUp(t, nil)
	loud := f.proxy(teamA)
	loud.subscribe(TypeCluster, "vip|x")
	loudUp := f.op.stream()
	loudUp.await(t, TypeCluster, "vip|x")
	quick := f.proxy(teamB)
	quick.subscribe(TypeCluster)
	quickUp := f.op.stream()
	quickUp.await(t, TypeCluster, "")
	stop, stopped := make(chan struct{}), make(chan struct{})
	var flooded atomic.Int64
	go func() {
		defer close(stopped)
		for {
			var batch []string
			for range 1000 {
				batch = append(batch, fmt.Sprintf("vip|%d", flooded.Add(1)))
			}
			if loud.st.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeCluster, ResourceNamesSubscribe: batch}) != nil {
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	go func() {
		for range loudUp.requests {
		}
	}()
	eventually(t, "the flood is a flood", func() bool { return flooded.Load() > 10_000 })
	const changes = 200
	var took []time.Duration
	for i := range changes {
		began := time.Now()
		quickUp.send(t, fmt.Sprint(i), resource(TypeCluster, "deliver", fmt.Sprint(i)))
		wantNames(t, quick.next(), "deliver@"+fmt.Sprint(i))
		took = append(took, time.Since(began))
	}
	close(stop)
	f.relay.Close(Key{Tenant: teamA}) // ends the sender if it is held back
	<-stopped
	// What waits for another proxy's pace waits each time, for seconds; a machine that stands
	// still, now and then.
	slices.Sort(took)
	t.Logf("half of the changes took up to %s, the slowest %s", took[changes/2], took[changes-1])
	if half, most := took[changes/2], took[changes-11]; half > 500*time.Millisecond || most > 3*time.Second {
		t.Errorf("half of %d changes took up to %s, all but ten up to %s", changes, half, most)
	}
}

func TestRelayHoldsFastAskerBack(t *testing.T) {
	f := setUp(t, func(o *Options) { o.NamesPerSecond = 50 }) // a burst of 200
	p := f.proxy(teamA)
	start := time.Now()
	for i := range 225 {
		p.subscribe(TypeCluster, fmt.Sprintf("vip|%d", i))
	}
	up, n := f.op.stream(), 0
	for n < 225 {
		n += len(receive(t, "request", up.requests).ResourceNamesSubscribe)
	}
	if d := time.Since(start); d < 450*time.Millisecond {
		t.Errorf("225 names at 50/s after a burst of 200 took %s", d)
	}
}

func FuzzSubscription(f *testing.F) {
	f.Add(TypeCluster, "a", "b", "*", true)
	f.Add(TypeSecret, "", "\x00", "x", false)
	f.Fuzz(func(t *testing.T, typeURL, a, b, c string, first bool) {
		s := newSubscription()
		for i := range 3 {
			_, err := s.apply(&discovery.DeltaDiscoveryRequest{
				TypeUrl: typeURL, ResourceNamesSubscribe: []string{a, b}, ResourceNamesUnsubscribe: []string{c, a},
				InitialResourceVersions: map[string]string{b: c},
			}, first && i == 0)
			if err != nil {
				return
			}
		}
		r := s.resume(typeURL)
		for _, n := range r.ResourceNamesSubscribe {
			if checkName(n) != nil || (n == wildcard && !kinds[typeURL].wildcard) {
				t.Errorf("name %q would reach the operator", n)
			}
		}
		if kinds[typeURL].short == "" {
			t.Errorf("type %q was accepted", typeURL)
		}
	})
}
