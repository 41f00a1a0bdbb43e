package kernel

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// publishHTTP gives a host a service at an address of its own, with the ports of HTTP
// and of TCP whose server speaks first.
func publishHTTP(t *testing.T, l *lab.Lab, name string, vip lab.Pair, h *lab.Host) model.ServiceKey {
	t.Helper()
	s := model.Service{Namespace: h.Identity.Namespace, Name: name, VIPs: vip.Both()}
	for _, port := range []uint16{app.HTTPPort, app.GreetPort} {
		p := model.ServicePort{Port: port, Protocol: map[uint16]model.Protocol{app.HTTPPort: model.ProtocolHTTP}[port]}
		for _, ip := range h.Both() {
			p.Endpoints = append(p.Endpoints, model.Endpoint{Addr: lab.At(ip, port), Identity: h.Identity})
		}
		s.Ports = append(s.Ports, p)
	}
	lab.Check(t, l.Store.SetService(s))
	return model.ServiceKey{Namespace: s.Namespace, Name: s.Name}
}

// leadTo routes a service's requests to another one's, or nowhere else.
func leadTo(t *testing.T, l *lab.Lab, service model.ServiceKey, to *model.ServiceKey) {
	t.Helper()
	var r []model.Routing
	if to != nil {
		r = []model.Routing{{Port: app.HTTPPort, Rules: []model.Rule{{
			Match:  model.RequestMatch{Path: model.PathMatch{Value: "/"}},
			Action: &model.Action{Backends: []model.Backend{{To: model.ServicePortKey{ServiceKey: *to, Port: app.HTTPPort}, Weight: 1}}},
		}}}}
	}
	lab.Check(t, l.Store.SetRoutings(service, r))
}

// get is who answers a request over a connection of its own.
func get(t *testing.T, from *lab.Host, to netip.AddrPort) (string, error) {
	t.Helper()
	r := from.Call(t, "get", "--timeout", "10s", "http://"+to.String()+"/")
	if !r.OK || r.Answer == nil {
		return "", fmt.Errorf("%d %q, %+v", r.Status, r.Body, r.Failure)
	}
	if client := netip.MustParseAddrPort(r.Answer.Client).Addr(); client != from.Of(map[bool]int{true: 4, false: 6}[to.Addr().Is4()]) {
		return "", fmt.Errorf("the server sees %s", client)
	}
	return r.Answer.Pod, nil
}

// A destination becomes HTTP, other HTTP, and none again, between nodes and with
// connections on it: not one of them ends or misses an answer, and neither do those of
// the service's other port.
func TestHTTPComesAndGoes(t *testing.T) { eachRedirection(t, testHTTPComesAndGoes) }

func testHTTPComesAndGoes(t *testing.T, l *lab.Lab) {
	vip := lab.Addresses("10.96.0.201", "fd96::201")
	web := publishHTTP(t, l, "web", vip, l.B2)
	other := publishHTTP(t, l, "other", lab.Addresses("10.96.0.202", "fd96::202"), l.A3)
	eachFamily(t, func(t *testing.T, family int) {
		to := lab.At(vip.Of(family), app.HTTPPort)
		const connections = 60
		type held struct {
			what string
			wait func(any)
		}
		var all []held
		hold := func(what, protocol string, to netip.AddrPort) {
			all = append(all, held{what, l.A1.Begin(t, "hold", "--protocol", protocol, "--connections", fmt.Sprint(connections), "--interval", "200ms", "--duration", "6s", "--timeout", "20s", to.String())})
		}
		leads := func(to netip.AddrPort, pod string) {
			t.Helper()
			lab.Eventually(t, "requests lead to "+pod, func() error {
				if got, err := get(t, l.A1, to); err != nil || got != pod {
					return fmt.Errorf("got %s, %v", got, err)
				}
				return nil
			})
		}
		leads(to, "b2")
		for round, next := range []*model.ServiceKey{nil, &other, nil, &web, nil} {
			leadTo(t, l, web, next)
			leads(to, map[bool]string{true: "a3", false: "b2"}[next == &other])
			hold(fmt.Sprint("HTTP/1.1, round ", round), "http", to)
			hold(fmt.Sprint("HTTP/2, round ", round), "h2c", to)
			hold(fmt.Sprint("TCP, round ", round), "tcp", lab.At(vip.Of(family), app.GreetPort))
		}
		for _, h := range all {
			var r app.RunResult
			if h.wait(&r); !r.OK || r.Held != connections || r.Failures.Total > 0 || r.Exchanges < 2*connections {
				t.Errorf("%s: %d of %d connections held, %d exchanges, %d failures, first %+v", h.what, r.Held, connections, r.Exchanges, r.Failures.Total, r.Failures.First)
			}
		}
	})
}

// The first request to a service that is HTTP finds all that it needs, in whichever
// worker of the proxy it is.
func TestHTTPFirstRequests(t *testing.T) { eachRedirection(t, testHTTPFirstRequests) }

func testHTTPFirstRequests(t *testing.T, l *lab.Lab) {
	for i := range 40 {
		vip := lab.Addresses(fmt.Sprintf("10.96.1.%d", i+1), fmt.Sprintf("fd96::1:%d", i+1))
		service := publishHTTP(t, l, fmt.Sprint("cold-", i), vip, l.B2)
		leadTo(t, l, service, &service)
		family := 4 + i%2*2
		if got, err := get(t, l.A1, lab.At(vip.Of(family), app.HTTPPort)); err != nil || got != "b2" {
			t.Errorf("service %d: got %s, %v", i, got, err)
		}
	}
}
