package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/bootstrap"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// proxyMemory compares an Envoy that uses 20 services of many with one in a mesh
// that has no more than these.
func proxyMemory(b *testing.B) report.Table {
	var small, large report.Samples
	for range 3 {
		small = append(small, proxyUsing(b, used))
		large = append(large, proxyUsing(b, *services))
	}
	return report.Table{
		Title:  "One Envoy",
		Text:   fmt.Sprintf("Private memory of a real Envoy %s that has used %d services with %d endpoints each, by connections, in meshes of two sizes; three of each, in turn.", dist.Default, used, endpoints),
		Header: []string{fmt.Sprintf("mesh of %d services", used), fmt.Sprintf("mesh of %d services", *services), "ratio"},
		Rows:   [][]string{{small.Spread() + " MiB", large.Spread() + " MiB", large.Per(small).Spread()}},
	}
}

// proxyUsing is the private memory, in MiB, of an Envoy in a mesh of so many
// services that has been asked for some of them.
func proxyUsing(b *testing.B, meshSize int) (mib float64) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	bin, err := dist.Fetch(ctx, dist.Default)
	if err != nil {
		b.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its network namespace
		var err error
		mib, err = measureProxy(bin.Binary, meshSize)
		failed <- err
	}()
	if err := <-failed; err != nil {
		b.Fatal(err)
	}
	return mib
}

func measureProxy(binary string, meshSize int) (float64, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return 0, fmt.Errorf("make network namespace: %w", err)
	}
	for _, args := range []string{"link set lo up", "route add local 0.0.0.0/0 dev lo"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("ip %s: %w: %s", args, err, out)
		}
	}
	w, err := newWorld(meshSize, endpoints)
	if err != nil {
		return 0, err
	}
	const client = "10.200.0.1"
	tenant := tenantOf(0)
	id := model.Identity{TrustDomain: trustDomain, Namespace: tenant.Namespace, ServiceAccount: "default"}
	if err := w.store.SetProxy(model.Proxy{Node: "node", Tenant: tenant, Workloads: []model.Workload{
		{UID: "client", Namespace: tenant.Namespace, Name: "client", Node: "node", Identity: id, Tenant: tenant, IPs: []netip.Addr{netip.MustParseAddr(client)}},
	}}); err != nil {
		return 0, err
	}
	server := xds.NewServer(w.store, xds.ServerOptions{Logger: slog.New(slog.DiscardHandler), Authorize: func(context.Context) (xds.StreamIdentity, error) {
		return xds.StreamIdentity{Node: "node", Tenant: tenant}, nil
	}})
	root, err := rootSecret()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "bulkhead-bench-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "xds.sock"))
	if err != nil {
		return 0, err
	}
	g := grpc.NewServer(xds.GRPCOptions()...)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, &withRoot{server: server, root: root})
	go g.Serve(l)
	defer g.Stop()
	if err := os.WriteFile(filepath.Join(dir, "bootstrap.yaml"), []byte(bootstrap.ADS), 0o600); err != nil {
		return 0, err
	}
	cmd := exec.Command(binary, "-c", "bootstrap.yaml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
	cmd.Dir = dir
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := server.WaitServed(ctx, model.ProxyKey{Node: "node", Tenant: tenant}, "client"); err != nil {
		return 0, err
	}
	for i := range used {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}, Timeout: 5 * time.Second}
		c, err := d.Dial("tcp", netip.AddrPortFrom(vip(i), 15001).String())
		if err != nil {
			return 0, fmt.Errorf("dial service %d: %w", i, err)
		}
		defer c.Close()
	}
	admin := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(dir, "admin.sock"))
	}}}
	for {
		r, err := admin.Get("http://envoy/clusters")
		if err != nil {
			return 0, err
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil {
			return 0, err
		}
		if strings.Count(string(body), "::health_flags::") >= used*endpoints {
			break
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("Envoy doesn't hold %d services: %w", used, ctx.Err())
		}
		time.Sleep(10 * time.Millisecond)
	}
	return private(cmd.Process.Pid)
}

func private(pid int) (mib float64, err error) {
	rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(rollup)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Private_") {
			kib, _ := strconv.ParseFloat(f[1], 64)
			mib += kib / 1024
		}
	}
	return mib, err
}

// withRoot answers for the agent: there is a root, and nobody has a certificate.
type withRoot struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	server *xds.Server
	root   *discoveryv3.Resource
}

func (w *withRoot) DeltaAggregatedResources(g discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return w.server.DeltaAggregatedResources(&rootStream{AggregatedDiscoveryService_DeltaAggregatedResourcesServer: g, root: w.root})
}

type rootStream struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	root *discoveryv3.Resource
	mu   sync.Mutex
}

func (s *rootStream) Send(r *discoveryv3.DeltaDiscoveryResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Send(r)
}

func (s *rootStream) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	for {
		r, err := s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Recv()
		if err != nil || r.TypeUrl != s.root.Resource.TypeUrl {
			return r, err
		}
		for _, name := range r.ResourceNamesSubscribe {
			answer := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.TypeUrl, Nonce: "secret " + name, RemovedResources: []string{name}}
			if name == xds.RootCA {
				answer.Resources, answer.RemovedResources = []*discoveryv3.Resource{s.root}, nil
			}
			if err := s.Send(answer); err != nil {
				return nil, err
			}
		}
	}
}

func rootSecret() (*discoveryv3.Resource, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	a, err := anypb.New(&tlsv3.Secret{Name: xds.RootCA, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}},
	}}})
	return &discoveryv3.Resource{Name: xds.RootCA, Version: "1", Resource: a}, err
}
