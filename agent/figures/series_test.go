package figures

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestReadEnvoy(t *testing.T) {
	var c Counts
	var l Levels
	ReadEnvoy(strings.Join([]string{
		"cluster.vip|10.96.0.1:80.upstream_cx_total: 7",
		"cluster.vip|10.96.0.1:80.upstream_cx_connect_fail: 2",
		// Of 10 connections out of the mesh 3 failed, each at its second attempt, and another
		// was there at the second.
		"cluster.passthrough.upstream_cx_total: 14",
		"cluster.passthrough.upstream_cx_connect_fail: 7",
		"cluster.passthrough.upstream_cx_connect_attempts_exceeded: 3",
		"cluster.passthrough.upstream_rq_total: 7",
		"cluster.hbone.ssl.handshake: 3",
		"cluster.hbone.ssl.fail_verify_san: 1",
		"cluster.xds.upstream_cx_total: 1000",
		"listener.[__]_15008.ssl.connection_error: 4",
		"listener.[__]_15001.downstream_cx_active: 5",
		"listener.[__]_15001.downstream_cx_total: 9",
		"listener.admin.downstream_cx_active: 1",
		"http.inbound.downstream_rq_completed: 11",
		"http.inbound.downstream_rq_5xx: 1",
		"http.inbound.downstream_cx_total: 3",
		"http.inbound.downstream_cx_active: 2",
		"cluster.deliver-http.upstream_cx_total: 500",
		"cluster.deliver-http.upstream_cx_connect_fail: 400",
		"cluster.deliver.upstream_cx_total: 500",
		"cluster.deliver.upstream_cx_connect_fail: 400",
		"cluster.deliver-node.upstream_cx_total: 500",
		"cluster.deliver-node.upstream_cx_connect_fail: 400",
		"http.l7.downstream_rq_completed: 20",
		"http.l7.downstream_rq_5xx: 6",
		"http.l7.downstream_cx_total: 8",
		"tcp.tcp.downstream_cx_rx_bytes_total: 100",
		"http.l7.downstream_rq_time: B0.5(1,6) B1(0,2) B5(0,0) B10(0,0) B25(0,0) B50(0,0) B100(0,0) B250(0,0) B500(0,0) B1000(0,0) B2500(0,0) B5000(0,0) B10000(0,0) B30000(0,0) B60000(0,0) B300000(0,1) B600000(0,1) B1.8e+06(0,0) B3.6e+06(0,0)",
		// What a proxy that is taken over may say.
		"http.l7.downstream_rq_5xx: -1", "http.l7.downstream_rq_5xx: 99999999999999999999", "http.l7.downstream_rq_time: B(,) x", ": ", "nothing",
	}, "\n"), &c, &l)
	want := Counts{Upstreams: 7 + 10, UpstreamFailures: 2 + 3, Handshakes: 3, HandshakeFailures: 5, Tunnelled: 11, TunnelConnections: 3, TunnelErrors: 1,
		Requests: 20, ServerErrors: 6, RequestConnections: 8, Work: 9 + 11 + 20, Bytes: 100}
	want.Latency[0], want.Latency[1], want.Latency[15] = 6, 2, 2
	if c != want || l != (Levels{OpenConnections: 5, OpenTunnelConnections: 2}) {
		t.Errorf("read %+v, %+v", c, l)
	}
}

func TestSeries(t *testing.T) {
	began := time.Unix(1e9, 0)
	var s Series
	read := func(after time.Duration, old, canary Counts) {
		s.Add(Reading{At: began.Add(after), Counts: [2]Counts{old, canary}, Levels: [2]Levels{{}, {PrivateBytes: int64(after)}}})
	}
	read(0, Counts{Connections: 1e6, Resets: 500}, Counts{})
	if _, ok := s.Figures(); ok {
		t.Error("figures of no time")
	}
	// What was before the canary doesn't count, nor how fast it is at first.
	read(time.Second, Counts{Connections: 1e6 + 8, Resets: 501, CPU: 5}, Counts{Connections: 2, CPU: 50})
	f, ok := s.Figures()
	if !ok || f.Counts[0] != (Counts{Connections: 8, Resets: 1}) || f.Counts[1] != (Counts{Connections: 2}) || f.Over != time.Second || f.Levels[1].PrivateBytes != int64(time.Second) {
		t.Errorf("%v, %+v", ok, f)
	}
	// Envoy forgot a cluster: that isn't a negative number of connections.
	read(2*time.Second, Counts{Connections: 3, Resets: 500}, Counts{Connections: 4})
	if f, _ = s.Figures(); f.Counts[0] != (Counts{Connections: 8, Resets: 1}) || f.Counts[1].Connections != 4 {
		t.Errorf("%+v", f)
	}
	// Little happens: all of it is kept, up to an hour.
	for at := 3 * time.Second; at <= 30*time.Minute; at += time.Second {
		read(at, Counts{Connections: 3}, Counts{Connections: 4})
	}
	if f, _ = s.Figures(); f.Counts[0].Connections != 8 || f.Over != 30*time.Minute {
		t.Errorf("%+v over %s", f.Counts[0], f.Over)
	}
	// Much happens: only the last minute counts.
	n := uint64(4)
	for at := 30 * time.Minute; at <= 35*time.Minute; at += time.Second {
		n += 10
		read(at, Counts{Connections: 3}, Counts{Connections: n, CPU: n})
	}
	if f, _ = s.Figures(); f.Over < window || f.Over > window+step || f.Counts[1].Connections != uint64(f.Over/time.Second)*10 || f.Counts[1].CPU != f.Counts[1].Connections || f.Counts[0].Connections != 0 {
		t.Errorf("%+v over %s", f.Counts, f.Over)
	}
	for at := 35 * time.Minute; at <= 5*time.Hour; at += time.Second {
		read(at, Counts{Connections: 3}, Counts{Connections: n})
	}
	if f, _ = s.Figures(); f.Over > longest+longStep || len(s.marks) > 32 {
		t.Errorf("%d marks, over %s", len(s.marks), f.Over)
	}
}

// A process whose Envoy doesn't answer is still counted by the kernel, and what Envoy
// says later is added once.
func TestSeriesWithoutEnvoy(t *testing.T) {
	began := time.Unix(1e9, 0)
	var s Series
	read := func(after time.Duration, unread string, c Counts) Figures {
		t.Helper()
		s.Add(Reading{At: began.Add(after), Unread: unread, Counts: [2]Counts{c, c}, Levels: [2]Levels{{PrivateBytes: 1}, {PrivateBytes: int64(after)}}})
		f, ok := s.Figures()
		if ok != (after > 0) || f.Unread != unread && ok {
			t.Fatalf("after %s: %v, %+v", after, ok, f)
		}
		return f
	}
	read(0, "no answer", Counts{Connections: 10})
	if f := read(time.Second, "no answer", Counts{Connections: 12, Resets: 1}); f.Counts[1] != (Counts{Connections: 2, Resets: 1}) || f.Levels[1].PrivateBytes != 0 {
		t.Errorf("%+v", f)
	}
	// What Envoy counted before isn't of this time.
	if f := read(2*time.Second, "", Counts{Connections: 12, Resets: 1, Requests: 500}); f.Counts[1] != (Counts{Connections: 2, Resets: 1}) {
		t.Errorf("%+v", f)
	}
	read(3*time.Second, "", Counts{Connections: 12, Resets: 1, Requests: 503})
	if f := read(4*time.Second, "no answer", Counts{Connections: 15, Resets: 1}); f.Counts[1] != (Counts{Connections: 5, Resets: 1, Requests: 3}) {
		t.Errorf("%+v", f)
	}
	if f := read(5*time.Second, "", Counts{Connections: 15, Resets: 1, Requests: 507}); f.Counts[1] != (Counts{Connections: 5, Resets: 1, Requests: 7}) {
		t.Errorf("%+v", f)
	}
	// CPU and memory are of the time of what they are set against.
	read(settling+time.Second, "", Counts{Requests: 507, CPU: 50})
	if f := read(settling+2*time.Second, "no answer", Counts{CPU: 58}); f.Counts[1].CPU != 0 || f.Levels[1].PrivateBytes != int64(settling+time.Second) {
		t.Errorf("%+v", f)
	}
	if f := read(settling+3*time.Second, "", Counts{Requests: 510, CPU: 60}); f.Counts[1].CPU != 10 || f.Counts[1].Requests != 10 || f.Levels[1].PrivateBytes != int64(settling+3*time.Second) {
		t.Errorf("%+v", f)
	}
}

// Each count is taken from where it is read to where it is told, once, for the process
// that it is of.
func TestSeriesHasEachCount(t *testing.T) {
	// distinct has another number in each field.
	distinct := func(n uint64) (c Counts) {
		for i, v := 0, reflect.ValueOf(&c).Elem(); i < v.NumField(); i++ {
			if v.Field(i).Kind() == reflect.Uint64 {
				n++
				v.Field(i).SetUint(n)
				continue
			}
			for k := range v.Field(i).Len() {
				n++
				v.Field(i).Index(k).SetUint(n)
			}
		}
		return c
	}
	began := time.Unix(1e9, 0)
	var s Series
	told := func(when string, after time.Duration, unread string, counts, want [2]Counts) {
		t.Helper()
		s.Add(Reading{At: began.Add(after), Unread: unread, Counts: counts})
		if f, _ := s.Figures(); f.Counts != want {
			t.Errorf("%s: %+v, want %+v", when, f.Counts, want)
		}
	}
	none, all, more := [2]Counts{}, [2]Counts{distinct(1000), distinct(2000)}, [2]Counts{distinct(5000), distinct(7000)}
	told("at first", 0, "", none, none)
	told("settled", settling, "", none, none)
	told("then", settling+time.Second, "", all, all)
	// Without Envoy only the kernel's rise.
	kernels := all
	for i := range kernels {
		c, m := &kernels[i], &more[i]
		c.Connections, c.Unanswered, c.Resets, c.FirstByte = m.Connections, m.Unanswered, m.Resets, m.FirstByte
	}
	told("in silence", settling+2*time.Second, "no answer", more, kernels)
	told("after it", settling+3*time.Second, "", more, more)
}
