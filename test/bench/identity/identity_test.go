// Package identity measures what workloads' certificates cost.
package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
)

const trustDomain = "cluster.local"

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func pods(n int) (out []identity.Pod, of map[string]model.Identity) {
	of = map[string]model.Identity{}
	for i := range n {
		name := fmt.Sprint("w", i)
		id := model.Identity{TrustDomain: trustDomain, Namespace: "team-a", ServiceAccount: name}
		out, of[name] = append(out, identity.Pod{UID: name, Namespace: id.Namespace, Name: name, Identity: id, Tenant: model.NamespaceTenant(id.Namespace)}), id
	}
	return out, of
}

// authority signs for any pod it has, over gRPC.
type authority struct {
	nodev1alpha1.UnimplementedNodeServiceServer
	*identity.Authority
	of map[string]model.Identity
}

func (a *authority) SignCertificate(_ context.Context, r *nodev1alpha1.SignCertificateRequest) (*nodev1alpha1.SignCertificateResponse, error) {
	chain, err := a.Sign(r.Csr, a.of[r.PodUid], time.Hour, time.Now())
	return &nodev1alpha1.SignCertificateResponse{Chain: chain}, err
}

type signer struct{ nodev1alpha1.NodeServiceClient }

func (s signer) Sign(ctx context.Context, csr []byte, p identity.Pod) ([][]byte, error) {
	r, err := s.SignCertificate(ctx, &nodev1alpha1.SignCertificateRequest{Csr: csr, PodUid: p.UID, PodNamespace: p.Namespace, PodName: p.Name})
	return r.GetChain(), err
}

// planned has a new store get certificates of all pods at once, and returns how long
// each took and what the heap has grown by, in bytes.
func planned(b *testing.B, a *identity.Authority, n int) (waits report.Samples, grown float64) {
	b.Helper()
	all, of := pods(n)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(b, err)
	server := grpc.NewServer()
	nodev1alpha1.RegisterNodeServiceServer(server, &authority{Authority: a, of: of})
	go server.Serve(listener)
	defer server.Stop()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(b, err)
	defer conn.Close()
	dir := filepath.Join(b.TempDir(), "keys")
	defer func() { check(b, identity.Uninstall(dir)) }()
	s, err := identity.OpenStore(identity.StoreOptions{Dir: dir, Signer: signer{nodev1alpha1.NewNodeServiceClient(conn)}, Log: slog.New(slog.DiscardHandler)})
	check(b, err)
	check(b, s.SetBundle(trustDomain, a.Roots()))
	s.SetPods(nil)
	before := heap()
	ctx, cancel := context.WithCancel(b.Context())
	var run, wg sync.WaitGroup
	run.Go(func() { s.Run(ctx) })
	defer run.Wait()
	defer cancel()
	waits = make(report.Samples, n)
	began := time.Now()
	s.SetPods(all)
	if n > 1000 {
		// A waiter each would measure the waiters.
		for _, p := range all {
			check(b, s.WaitReady(ctx, p.UID))
		}
		return nil, heap() - before
	}
	for i, p := range all {
		wg.Go(func() {
			if err := s.WaitReady(ctx, p.UID); err != nil {
				b.Error(err)
			}
			waits[i] = float64(time.Since(began).Microseconds()) / 1000
		})
	}
	wg.Wait()
	return waits, 0
}

// cpu is the CPU time that the process has used: what others use of the machine isn't
// in it.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	check(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heap() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

func BenchmarkIdentity(b *testing.B) {
	a, err := identity.NewAuthority(trustDomain, time.Now())
	check(b, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(b, err)
	one, _ := pods(1)
	csr, err := identity.NewCSR(key, one[0].Identity)
	check(b, err)
	var rate, p50, p99 report.Samples
	for range *report.Rounds {
		procs := runtime.GOMAXPROCS(1)
		began, used, signed := time.Now(), cpu(b), 0
		for ; time.Since(began) < *report.Duration; signed++ {
			_, err := a.Sign(csr, one[0].Identity, time.Hour, time.Now())
			check(b, err)
		}
		rate = append(rate, float64(signed)/(cpu(b)-used).Seconds())
		runtime.GOMAXPROCS(procs)
		waits, _ := planned(b, a, 50)
		slices.Sort(waits)
		p50, p99 = append(p50, waits[24]), append(p99, waits[49])
	}
	const many = 10_000
	_, grown := planned(b, a, many)
	report.Publish(b, "identity", report.Table{Title: "Certificates", Header: []string{"what", "figure"}, Rows: [][]string{
		{"CSRs checked and signed in a second of CPU time", rate.Spread()},
		{"50 pods planned at once: half have a usable certificate after, ms", p50.Spread()},
		{"50 pods planned at once: 99 % (here: all) have one after, ms", p99.Spread()},
		{"heap of a node's store with 10,000 identities, MiB", fmt.Sprintf("%.1f", grown/(1<<20))},
	}})
}
