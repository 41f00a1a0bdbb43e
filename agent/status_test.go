package agent

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Whoever has news of the node asks for its status, all at once: what is written is never
// older than what was written before, and the last news are, also if an API server takes
// some of them late or not at all.
func TestStatusIsWrittenInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const news = 40
		var now atomic.Int64
		var writing atomic.Bool
		var tried, taken []int64
		var last time.Time
		kube := interceptor.NewClient(nil, interceptor.Funcs{SubResourceApply: func(_ context.Context, _ client.Client, resource string, config runtime.ApplyConfiguration, _ ...client.SubResourceApplyOption) error {
			if !writing.CompareAndSwap(false, true) {
				t.Error("two statuses are written at once")
			}
			defer func() {
				last = time.Now()
				writing.Store(false)
			}()
			if since := time.Since(last); since < 200*time.Millisecond {
				t.Errorf("a status is written %s after another", since)
			}
			var o v1alpha1.NodeProxy
			b, err := json.Marshal(config)
			if err == nil {
				err = json.Unmarshal(b, &o)
			}
			if err != nil || resource != "status" {
				t.Errorf("%s is written: %s, %v", resource, b, err)
			}
			tried = append(tried, o.Status.ObservedGeneration)
			if len(tried)%3 == 1 {
				time.Sleep(700 * time.Millisecond)
			}
			// The first time that the last news are, too.
			if len(tried)%3 == 2 || o.Status.ObservedGeneration == news && !slices.Contains(tried[:len(tried)-1], news) {
				return errors.New("away")
			}
			taken = append(taken, o.Status.ObservedGeneration)
			return nil
		}})
		a := &Agent{}
		a.reportStatus() // without Kubernetes nobody takes it
		a.status = newStatusWriter(kube, "node", func() (v1alpha1.NodeProxyStatus, bool) {
			seen := now.Load()
			// Who looks first may be the last to have seen all.
			if seen%10 == 9 {
				time.Sleep(2 * time.Second)
			}
			return v1alpha1.NodeProxyStatus{ObservedGeneration: seen}, seen > 0
		}, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			a.status.run(ctx)
		}()
		go a.reportStatus() // before there is anything
		time.Sleep(time.Second)
		synctest.Wait()
		if len(tried) > 0 {
			t.Errorf("before the first round %v is written", tried)
		}
		for range news {
			now.Add(1)
			go a.reportStatus()
			time.Sleep(30 * time.Millisecond)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(taken) == 0 || taken[len(taken)-1] != news {
			t.Errorf("the last news aren't written: %v of %d", taken, news)
		}
		now.Add(1)
		a.reportStatus()
		time.Sleep(time.Minute)
		cancel()
		<-ended
		if !slices.IsSorted(tried) || !slices.IsSorted(taken) {
			t.Errorf("an older status is written after a newer one: %v, of which %v were taken", tried, taken)
		}
		if len(taken) == 0 || taken[len(taken)-1] != news+1 {
			t.Errorf("what is new a minute later isn't written: %v", taken)
		}
	})
}
