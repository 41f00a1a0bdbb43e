package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/test/capture"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// showWire looks at the packets between the nodes while mesh pods, and pods
// outside of the mesh, send the same marker.
func (d *demo) showWire(ctx context.Context) error {
	d.step("What can be read between the nodes (packets of %s's interface)", d.nodes[0])
	report, err := d.captureWhile(ctx, d.nodes[0], marker, func(ctx context.Context) error {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var problems []string
		for _, pair := range []struct{ from, to harness.Pod }{
			{d.pod(webA, 0), d.pod(webB, 1)}, {d.pod(webB, 1), d.pod(webA, 0)}, {d.pod(jobA, 0), d.pod(webA, 1)},
			{d.pod(webO, 0), d.pod(webO, 1)},
		} {
			wg.Go(func() {
				for _, args := range [][]string{
					{"get", "--data", marker, "http://" + address(pair.to.IPv4, app.HTTPPort) + "/"},
					{"tcp", "--data", marker, address(pair.to.IPv4, app.GreetPort)},
				} {
					r, err := d.Call(ctx, pair.from, args...)
					if err != nil || !r.OK {
						mu.Lock()
						problems = append(problems, fmt.Sprintf("%s → %s: %v %+v", pair.from, pair.to, err, r.Failure))
						mu.Unlock()
					}
				}
			})
		}
		wg.Wait()
		return joined(problems)
	})
	if err != nil {
		return err
	}
	w := d.readWire(report)
	d.check(report.Dropped == 0 && !report.Full, "%d TCP packets captured, none missed", report.Packets)
	d.check(w.outsideMarked > 0, "outside → outside: the application's marker is readable (%d packets): the capture sees what is in the clear", w.outsideMarked)
	d.check(w.meshMarked == 0, "mesh → mesh: the marker is in none of them")
	d.checkErr(joined(w.clear), "mesh → mesh: every TCP payload (%d packets, %d bytes) travels to or from port 15008 (HBONE, mTLS)", w.tunnelPackets, w.tunnelBytes)
	d.check(w.tunnelPackets > 0, "and there is such traffic")
	return nil
}

const marker = "bulkhead-demo-marker-7f3a91"

// hbonePort is where mesh traffic goes: HTTP/2 CONNECT over mTLS.
const hbonePort = 15008

// wire is what a capture says about mesh and other pods.
type wire struct {
	outsideMarked, meshMarked  int
	tunnelPackets, tunnelBytes int
	clear                      []string
}

func (d *demo) readWire(r capture.Report) wire {
	mesh := d.identities()
	var w wire
	for _, f := range r.Flows {
		_, fromMesh := mesh[f.From.String()]
		_, toMesh := mesh[f.To.String()]
		switch {
		case !fromMesh && !toMesh:
			w.outsideMarked += f.Marked
		case fromMesh && toMesh:
			w.meshMarked += f.Marked
			if f.FromPort != hbonePort && f.ToPort != hbonePort {
				w.clear = append(w.clear, fmt.Sprintf("%s:%d → %s:%d, %d bytes", f.From, f.FromPort, f.To, f.ToPort, f.Bytes))
				continue
			}
			w.tunnelPackets += f.Packets
			w.tunnelBytes += f.Bytes
		}
	}
	return w
}

// captureWhile captures on a node's interface while work runs.
func (d *demo) captureWhile(ctx context.Context, node, marker string, work func(context.Context) error) (capture.Report, error) {
	var n corev1.Node
	if err := d.Client.Get(ctx, client.ObjectKey{Name: node}, &n); err != nil {
		return capture.Report{}, fmt.Errorf("get node %s: %w", node, err)
	}
	return d.Capture(ctx, node, nodeAddress(n), marker, time.Minute, work)
}
