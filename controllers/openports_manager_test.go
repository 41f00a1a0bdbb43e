package controllers

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

// A manager serves both ports, without caches or a leader, and ends although somebody
// still holds a connection.
func TestManagerServesOpenPorts(t *testing.T) {
	mgr, err := manager.New(&rest.Config{Host: "127.0.0.1:1"}, manager.Options{HealthProbeBindAddress: "0", Metrics: metricsserver.Options{BindAddress: "0"}})
	if err != nil {
		t.Fatal(err)
	}
	free := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	health, metrics := free(), free()
	if err := openPorts(mgr, health, metrics, func(*http.Request) error { return nil }); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- mgr.Start(ctx) }()
	for address, path := range map[string]string{health: "/readyz", metrics: "/metrics"} {
		if code, body, err := get(t, "127.0.0.1", address, path); err != nil || code != http.StatusOK || path == "/metrics" && !strings.Contains(body, "bulkhead_operator_connections_refused_total") {
			t.Errorf("%s: %d, %v", path, code, err)
		}
	}
	fmt.Fprint(dialOpen(t, "127.0.0.2", health), "GET /healthz HTTP/1.1\r\n")
	begun := time.Now()
	stop()
	if err := <-ended; err != nil || time.Since(begun) > openHeaderTime-time.Second {
		t.Errorf("it ended after %v: %v", time.Since(begun), err)
	}
}
