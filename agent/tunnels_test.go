package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bulkhead-mesh/bulkhead/agent/figures"
	"github.com/bulkhead-mesh/bulkhead/agent/relay"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// What a proxy says of its hosts for tunnels is known as soon as it has said it, however
// many others say nothing, and that of those others isn't.
func TestTunnelHostsBesideSilentProxies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		well := model.NamespaceTenant("well")
		wells := []relay.Key{{Tenant: well}, {Tenant: well, Generation: 1}}
		var proxies []relay.Key
		for i := range 2*figuresReaders + 1 {
			proxies = append(proxies, relay.Key{Tenant: model.NamespaceTenant(fmt.Sprint("silent-", i))})
		}
		all := append(proxies, wells...)
		var hosts uint64
		ask := func(ctx context.Context, p relay.Key) (figures.TunnelHosts, error) {
			if p.Tenant != well {
				<-ctx.Done()
				return figures.TunnelHosts{}, ctx.Err()
			}
			return figures.TunnelHosts{Hosts: hosts + uint64(p.Generation)}, nil
		}
		var r tunnelReadings
		// after reads all, and looks at what is known a while after the beginning.
		after := func(while time.Duration, proxies []relay.Key, want map[model.Tenant]tunnelHosts) {
			t.Helper()
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				r.read(t.Context(), proxies, ask)
			}()
			time.Sleep(while)
			synctest.Wait()
			if got := r.all(); !reflect.DeepEqual(got, want) {
				t.Errorf("after %s known is %v, want %v", while, got, want)
			}
			select {
			case <-ended:
				t.Errorf("all have answered or had their time within %s", while)
			default:
			}
			<-ended
			if got := r.all(); !reflect.DeepEqual(got, want) {
				t.Errorf("in the end known is %v, want %v", got, want)
			}
		}
		told := func(n uint64) map[model.Tenant]tunnelHosts {
			return map[model.Tenant]tunnelHosts{well: {0: {Hosts: n}, 1: {Hosts: n + 1}}}
		}
		none := map[model.Tenant]tunnelHosts{}
		const moment = figuresTimeout / 2
		hosts = 7
		after(2*figuresTimeout+moment, all, told(7)) // it isn't known yet who is silent
		hosts = 8
		after(moment, all, told(8))
		after(moment, proxies, none) // it has gone
		after(moment, all, told(8))
	})
}

// A proxy that has fallen silent has no figures, though it had some.
func TestTunnelHostsOfAProxyThatFellSilent(t *testing.T) {
	p := relay.Key{Tenant: model.NamespaceTenant("shop")}
	var r tunnelReadings
	for i, err := range []error{nil, errors.New("silent"), nil} {
		r.read(t.Context(), []relay.Key{p}, func(context.Context, relay.Key) (figures.TunnelHosts, error) {
			return figures.TunnelHosts{Hosts: 3}, err
		})
		if _, known := r.all()[p.Tenant]; known != (err == nil) {
			t.Errorf("after reading %d its hosts are known: %t, it said %v", i, known, err)
		}
	}
}
