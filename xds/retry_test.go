package xds

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// arrives is how long a request may be under way to its application, which counts it.
const arrives = 2 * time.Second

// A request is tried as often as its route says, after the failures that it names, and
// no more.
func TestHTTPRetries(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, _, _ := routedEnvoy(t, version)
			retry := &model.Retry{Attempts: 2, Codes: []uint32{502, 503}, Backoff: 5 * time.Millisecond}
			route(t, store, "",
				prefixed("/plain", model.Action{Backends: to("plain"), Retry: retry}),
				prefixed("/mesh", model.Action{Backends: to("web"), Retry: retry}),
				prefixed("/slow", model.Action{Backends: to("web"), Retry: &model.Retry{Attempts: 3, Codes: []uint32{503}, Backoff: 400 * time.Millisecond}}),
				prefixed("/bounded", model.Action{Backends: to("web"), Timeout: testTime, TryTimeout: arrives, Retry: &model.Retry{Attempts: 2, Backoff: 5 * time.Millisecond}}),
				prefixed("/once", model.Action{Backends: to("web")}))
			eventually(t, "it is routed", func() bool {
				r, _, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/nothing")
				return err == nil && r.StatusCode == http.StatusNotFound
			})
			apps := map[string]string{"/plain": "10.9.0.9:8080"}
			for _, http2 := range []bool{false, true} {
				pod := newHTTPPod(t, "10.1.0.2", http2)
				for _, c := range []struct {
					path, query      string
					status, attempts int
				}{
					{"/mesh", "status=503", 503, 3},
					{"/mesh", "status=502", 502, 3},
					{"/mesh", "status=500", 500, 1},
					{"/mesh", "status=404", 404, 1},
					{"/mesh", "failing=2", 200, 3},
					{"/mesh", "resetting=1", 200, 2},
					{"/mesh", "resetting=9", 503, 3},
					{"/plain", "failing=1", 200, 2},
					{"/plain", "resetting=2", 200, 3},
					{"/once", "failing=1", 503, 1},
					{"/once", "resetting=1", 200, 2}, // as every idempotent request, below
					{"/bounded", "wait=1h", 504, 3},
				} {
					app := apps[c.path]
					if app == "" {
						app = "10.1.0.3:8080"
					}
					path := fmt.Sprintf("%s?%s&of=%s-%t", c.path, c.query, version, http2)
					r, _, err := pod.get("http://10.96.1.1:15001" + path)
					if err != nil {
						t.Errorf("%s: %v", path, err)
						continue
					}
					if got := attempts(app, path); r.StatusCode != c.status || got != c.attempts {
						t.Errorf("%s: %d after %d attempts; want %d after %d", path, r.StatusCode, got, c.status, c.attempts)
					}
				}
			}
			// Envoy waits for a random part of the backoff, of twice as much the next time. That
			// nine waits, of 200, 400 and 800 ms on average, take no 200 ms isn't to be expected.
			began := time.Now()
			for i := range 3 {
				if _, _, err := newHTTPPod(t, "10.1.0.2", false).get(fmt.Sprintf("http://10.96.1.1:15001/slow?status=503&of=%s-%d", version, i)); err != nil {
					t.Error(err)
				}
			}
			if took := time.Since(began); took < 200*time.Millisecond {
				t.Errorf("nine retries with a backoff took %s", took)
			}
		})
	}
}

// A request whose connection ends without an answer is sent once more where its route
// says nothing of retries, if it may be: what isn't idempotent is never sent twice, and
// neither is what was answered or took too long.
func TestLostRequestsAreSentAgain(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, _, _ := routedEnvoy(t, version)
			route(t, store, "",
				prefixed("/plain", model.Action{Backends: to("plain")}),
				prefixed("/mesh", model.Action{Backends: to("web")}),
				prefixed("/late", model.Action{Backends: to("web"), Timeout: arrives}),
				prefixed("/try", model.Action{Backends: to("web"), TryTimeout: arrives}),
				prefixed("/never", model.Action{Backends: to("web"), Retry: &model.Retry{Attempts: 0}}))
			eventually(t, "it is routed", func() bool {
				r, _, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/nothing")
				return err == nil && r.StatusCode == http.StatusNotFound
			})
			check := func(pod *httpPod, method, path string, status, want int) {
				t.Helper()
				var body io.Reader
				if method == http.MethodPut || method == http.MethodPost {
					body = strings.NewReader("something")
				}
				r, err := http.NewRequest(method, "http://10.96.1.1:15001"+path, body)
				if err != nil {
					t.Fatal(err)
				}
				response, err := pod.Do(r)
				if err != nil {
					t.Errorf("%s %s: %v", method, path, err)
					return
				}
				response.Body.Close()
				app := "10.1.0.3:8080"
				if strings.HasPrefix(path, "/plain") {
					app = "10.9.0.9:8080"
				}
				if got := attempts(app, path); response.StatusCode != status || got != want {
					t.Errorf("%s %s: %d after %d attempts; want %d after %d", method, path, response.StatusCode, got, status, want)
				}
			}
			for _, http2 := range []bool{false, true} {
				pod := newHTTPPod(t, "10.1.0.2", http2)
				path := func(p, query, method string) string {
					return fmt.Sprintf("%s?%s&of=%s-%s-%t", p, query, version, method, http2)
				}
				for _, to := range []string{"/mesh", "/plain"} {
					for _, method := range []string{"GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"} {
						check(pod, method, path(to, "resetting=1", method), 200, 2)
					}
					for _, method := range []string{"POST", "PATCH"} {
						check(pod, method, path(to, "resetting=1", method), 503, 1)
					}
					check(pod, "GET", path(to, "resetting=9", "GET"), 503, 2)
					check(pod, "GET", path(to, "status=503", "GET"), 503, 1)
				}
				var all sync.WaitGroup // Envoy's own bound is 3 at a time
				for i := range 50 {
					all.Go(func() { check(pod, "GET", path("/mesh", fmt.Sprint("resetting=1&wait=100ms&nth=", i), "GET"), 200, 2) })
				}
				all.Wait()
				check(pod, "GET", path("/late", "wait=1h", "GET"), 504, 1)
				check(pod, "GET", path("/try", "wait=1h", "GET"), 504, 1)
				check(pod, "GET", path("/never", "resetting=1", "GET"), 503, 1)
			}
		})
	}
}

// A backend that fails isn't sent so much more as its routes would try.
func TestRetriesAreBounded(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, _ := routedEnvoy(t, version)
			route(t, store, "", prefixed("/failing", model.Action{Backends: to("web"), Retry: &model.Retry{Attempts: 1, Codes: []uint32{503}}}))
			eventually(t, "it is routed", func() bool {
				r, _, err := newHTTPPod(t, "10.1.0.2", true).get("http://10.96.1.1:15001/nothing")
				return err == nil && r.StatusCode == http.StatusNotFound
			})
			const all = minRetries + 144 // whose half is less
			pod := newHTTPPod(t, "10.1.0.2", true)
			var wg sync.WaitGroup
			for range all {
				wg.Go(func() {
					r, err := pod.Get("http://10.96.1.1:15001/failing?status=503&wait=3s")
					if err != nil {
						t.Error(err)
						return
					}
					r.Body.Close()
					if r.StatusCode != http.StatusServiceUnavailable {
						t.Errorf("got %d", r.StatusCode)
					}
				})
			}
			wg.Wait()
			retries, beyond := e.count("cluster.be.*upstream_rq_retry$"), e.count("cluster.be.*upstream_rq_retry_overflow$")
			if retries < minRetries || beyond == 0 {
				t.Errorf("%d of %d requests were sent again, %d were too many; want %d at a time", retries, all, beyond, minRetries)
			}
		})
	}
}

// A peer that refuses a tunnel refuses the request: 503, and not a byte of what the
// application would have said. It is asked twice, for that looks like a request that
// was lost. Which it was is in the log.
func TestHTTPRefused(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, _ := routedEnvoy(t, version)
			const far = "10.1.0.77"
			server := servePeer(t, e.ca, identity("web").String(), far)
			var refusals atomic.Int64
			server.allow.Store(func(id string) int {
				if id != identity("web").String() {
					refusals.Add(1)
					return http.StatusForbidden
				}
				return http.StatusOK
			})
			if err := store.SetService(endpointService("far", "10.96.1.5", model.Endpoint{Addr: netip.MustParseAddrPort(far + ":8080"), Identity: identity("web")})); err != nil {
				t.Fatal(err)
			}
			route(t, store, "", prefixed("/", model.Action{Backends: to("far")}))
			eventually(t, "it is routed", func() bool {
				r, _, err := newHTTPPod(t, "10.1.0.2", false).get("http://10.96.1.1:15001/")
				return err == nil && r.Header.Get("X-App") == far
			})
			for i, http2 := range []bool{false, true} {
				r, _, err := newHTTPPod(t, "10.1.0.3", http2).get("http://10.96.1.1:15001/")
				if err != nil || r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("X-App") != "" {
					t.Errorf("got %+v, %v", r, err)
				}
				if n := refusals.Load(); n != 2*int64(i+1) {
					t.Errorf("%d CONNECTs for %d requests", n, i+1)
				}
			}
			eventually(t, "the log tells of it", func() bool {
				log, err := os.ReadFile(e.log.Name())
				for line := range strings.Lines(string(log)) {
					if strings.Contains(line, `"bulkhead":"hbone"`) && strings.Contains(line, `"source":"10.1.0.3"`) && strings.Contains(line, `"upstream":"`+far+`:15008"`) {
						t.Log(line)
						return true
					}
				}
				return err != nil
			})
		})
	}
}
