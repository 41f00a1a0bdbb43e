package e2e

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/capture"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// destinations of an application as its clients can name it. The one with the
// client's own node is there for the direct way through one node.
func destinations(t *testing.T, a harness.Echo, port int) map[string]string {
	t.Helper()
	d := map[string]string{
		"service name":  hostPort(a.Name+"."+a.Namespace+".svc", port),
		"headless name": hostPort(a.Name+"-headless."+a.Namespace+".svc", port),
	}
	var service corev1.Service
	if err := e.Client.Get(t.Context(), client.ObjectKey{Namespace: a.Namespace, Name: a.Name}, &service); err != nil {
		t.Fatal(err)
	}
	for _, vip := range service.Spec.ClusterIPs {
		d["VIP "+family(vip)] = hostPort(vip, port)
	}
	for _, node := range e.nodes[:2] {
		for _, ip := range e.pods[a][node].Status.PodIPs {
			d["pod "+family(ip.IP)+" on "+node] = hostPort(ip.IP, port)
		}
	}
	return d
}

func family(ip string) string {
	if strings.Contains(ip, ":") {
		return "IPv6"
	}
	return "IPv4"
}

func TestEveryPairByEveryAddress(t *testing.T) {
	for _, from := range []harness.Pod{e.pod(webA, 0), e.pod(jobA, 1), e.pod(webB, 0)} {
		for _, to := range meshApps {
			for how, address := range destinations(t, to, app.HTTPPort) {
				t.Run(fmt.Sprintf("%s to %s/%s by %s", from, to.Namespace, to.Name, how), func(t *testing.T) {
					r := mustCall(t, from, "", "get", "http://"+address+"/")
					if r.Answer == nil {
						return
					}
					if r.Answer.Namespace != to.Namespace {
						t.Errorf("answered by %s/%s", r.Answer.Namespace, r.Answer.Pod)
					}
					want := from.IPv4
					if strings.Contains(r.Answer.ClientIP(), ":") {
						want = from.IPv6
					}
					if r.Answer.Pod == from.Name && (how == "service name" || strings.HasPrefix(how, "VIP ")) {
						want = harness.SelfAddress(want)
					}
					if r.Answer.ClientIP() != want {
						t.Errorf("the application saw client %s, want %s", r.Answer.Client, want)
					}
				})
			}
		}
	}
}

func TestProtocols(t *testing.T) {
	from, to := e.pod(webA, 0), e.pod(webB, 1)
	service := webB.Name + "." + webB.Namespace + ".svc"
	for _, host := range []string{service, to.IPv4, to.IPv6} {
		mustCall(t, from, "", "grpc", hostPort(host, app.GRPCPort))
		mustCall(t, from, "", "get", "--protocol", "h2c", "http://"+hostPort(host, app.HTTPPort)+"/")
		// The server speaks first: it must not have to wait for the client.
		r := mustCall(t, from, "", "tcp", hostPort(host, app.GreetPort))
		if r.Latency > 8000 { // of the 10 s that a call has
			t.Errorf("server-first at %s took %v ms", host, r.Latency)
		}
	}
}

// TestIdentities compares each line of the servers' access logs with who owns
// the addresses in it: after all other traffic, so it covers that too.
func TestIdentities(t *testing.T) {
	for _, from := range meshApps {
		for _, to := range meshApps {
			mustCall(t, e.pod(from, 0), e.pod(from, 0).IPv4, "tcp", hostPort(e.pod(to, 1).IPv4, app.GreetPort))
			mustCall(t, e.pod(from, 0), e.pod(from, 0).IPv4, "tcp", hostPort(e.pod(to, 0).IPv4, app.GreetPort))
		}
	}
	owner := e.identities()
	type pair struct{ source, destination string }
	err := harness.Wait(t.Context(), patience, time.Second, "access logs", func(ctx context.Context) error {
		seen := map[pair]bool{}
		for _, node := range e.nodes {
			for _, tenant := range tenants {
				entries, err := e.AccessLog(ctx, node, tenant)
				if err != nil {
					return err
				}
				for _, a := range entries {
					source, destination := host(a.Source), host(a.Destination)
					if a.Kind != "inbound" || owner[source] == "" || owner[destination] == "" {
						continue
					}
					seen[pair{source, destination}] = true
					if a.Peer != owner[source] || a.Own != owner[destination] {
						t.Errorf("%s is %s and was seen as %s by %s, which is %s and answered as %s", source, owner[source], a.Peer, destination, owner[destination], a.Own)
					}
				}
			}
		}
		for _, from := range meshApps {
			for _, to := range meshApps {
				for node := range 2 {
					if from == to && node == 0 {
						continue // the pod itself, by its own address: that never leaves it
					}
					if p := (pair{e.pod(from, 0).IPv4, e.pod(to, node).IPv4}); !seen[p] {
						return fmt.Errorf("no connection from %s to %s in the log yet", e.pod(from, 0), e.pod(to, node))
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func host(address string) string {
	if h, _, err := net.SplitHostPort(address); err == nil {
		return h
	}
	return address
}

func TestOutside(t *testing.T) {
	for node := range 2 {
		mesh, outside := e.pod(webA, 0), e.pod(webO, node)
		for _, ip := range []string{outside.IPv4, outside.IPv6} {
			mustCall(t, mesh, map[string]string{"IPv4": mesh.IPv4, "IPv6": mesh.IPv6}[family(ip)], "tcp", hostPort(ip, app.GreetPort))
		}
		for _, ip := range []string{mesh.IPv4, mesh.IPv6} {
			mustCall(t, outside, map[string]string{"IPv4": outside.IPv4, "IPv6": outside.IPv6}[family(ip)], "tcp", hostPort(ip, app.GreetPort))
		}
	}
	mustCall(t, e.pod(webA, 0), "", "get", "http://"+hostPort(webO.Name+"."+webO.Namespace+".svc", app.HTTPPort)+"/")
	mustCall(t, e.pod(webO, 0), e.pod(webO, 0).IPv4, "get", "http://"+hostPort(webA.Name+"."+webA.Namespace+".svc", app.HTTPPort)+"/")
}

func TestBulk(t *testing.T) {
	const size = "67108864"
	for name, address := range map[string]string{
		"other node": e.pod(webB, 1).IPv4, "same node": e.pod(webB, 0).IPv4, "IPv6": e.pod(webB, 1).IPv6,
		"service": webB.Name + "." + webB.Namespace + ".svc",
	} {
		t.Run(name, func(t *testing.T) {
			r := mustCall(t, e.pod(webA, 0), "", "bulk", "--up", size, "--down", size, hostPort(address, app.BulkPort))
			if r.Up != 64<<20 || r.Down != 64<<20 {
				t.Errorf("%d bytes up, %d down", r.Up, r.Down)
			}
		})
	}
}

// TestWire looks at the packets between two nodes.
func TestWire(t *testing.T) {
	const marker = "e2e-marker-5d1c07"
	var node corev1.Node
	if err := e.Client.Get(t.Context(), client.ObjectKey{Name: e.nodes[0]}, &node); err != nil {
		t.Fatal(err)
	}
	address := ""
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && address == "" {
			address = a.Address
		}
	}
	complete := false
	for range 3 { // a busy machine may miss a packet
		report, err := e.Capture(t.Context(), node.Name, address, marker, patience, func(context.Context) error {
			for _, pair := range [][2]harness.Pod{{e.pod(webA, 0), e.pod(webB, 1)}, {e.pod(webB, 1), e.pod(webA, 0)}, {e.pod(webO, 0), e.pod(webO, 1)}} {
				for _, ip := range []string{pair[1].IPv4, pair[1].IPv6} {
					mustCall(t, pair[0], "", "tcp", "--data", marker, hostPort(ip, app.GreetPort))
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		tunnelled := e.noneReadable(t, report)
		if complete = report.Dropped == 0 && !report.Full; !complete {
			t.Logf("of %d packets, %d were missed: once more", report.Packets, report.Dropped)
			continue
		}
		if n := marked(report, func(f capture.Flow) bool { return !e.isMesh(f.From.String()) && !e.isMesh(f.To.String()) }); n == 0 {
			t.Error("the marker isn't readable between pods outside of the mesh: the capture proves nothing")
		}
		if tunnelled == 0 {
			t.Error("no HBONE traffic was captured")
		}
		break
	}
	if !complete {
		t.Error("no capture was complete")
	}
}

// noneReadable fails if a capture has anything readable between pods in the mesh, which
// one that isn't complete shows as well, and returns how many bytes went through tunnels.
func (e *env) noneReadable(t *testing.T, report capture.Report) (tunnelled int) {
	t.Helper()
	for _, f := range report.Flows {
		if !e.isMesh(f.From.String()) || !e.isMesh(f.To.String()) {
			continue
		}
		if f.FromPort != 15008 && f.ToPort != 15008 {
			t.Errorf("%d bytes of TCP payload in the clear: %s:%d to %s:%d", f.Bytes, f.From, f.FromPort, f.To, f.ToPort)
		}
		if f.Marked > 0 {
			t.Errorf("the marker is readable from %s to %s", f.From, f.To)
		}
		tunnelled += f.Bytes
	}
	return tunnelled
}

func (e *env) isMesh(ip string) bool { return e.identities()[ip] != "" }

func marked(r capture.Report, match func(capture.Flow) bool) int {
	n := 0
	for _, f := range r.Flows {
		if match(f.Flow) {
			n += f.Marked
		}
	}
	return n
}
