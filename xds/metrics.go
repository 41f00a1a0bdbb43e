package xds

import (
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
)

// metrics are about the server as a whole; labels are types, never names.
type metrics struct {
	streams    prometheus.Gauge
	names      *prometheus.GaugeVec
	pushes     *prometheus.CounterVec
	bytes      *prometheus.CounterVec
	removals   *prometheus.CounterVec
	rejections *prometheus.CounterVec
	refused    *prometheus.CounterVec
	throttled  prometheus.Counter
	letGo      prometheus.Counter
	builds     prometheus.CounterFunc
	forms      []prometheus.Collector
}

func newMetrics(store *Store) *metrics {
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "bulkhead", Subsystem: "xds", Name: name, Help: help}, []string{"type"})
	}
	var forms []prometheus.Collector
	for f := OldestForm; f <= NewestForm; f++ {
		forms = append(forms, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "bulkhead", Subsystem: "xds", Name: "streams_of_form", ConstLabels: prometheus.Labels{"form": strconv.Itoa(int(f))},
			Help: "Open streams by the forms of their filter chains; one that has two counts for both. An operator that doesn't know a form drains its chains.",
		}, func() float64 { return float64(store.streamsOf(f)) }))
	}
	return &metrics{
		forms:      forms,
		streams:    prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "bulkhead", Subsystem: "xds", Name: "streams", Help: "Open delta ADS streams, one for each tenant proxy generation."}),
		names:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "bulkhead", Subsystem: "xds", Name: "names", Help: "Names that all streams hold on demand."}, []string{"type"}),
		pushes:     counter("pushes_total", "Responses sent."),
		bytes:      counter("pushed_bytes_total", "Size of the responses sent, without framing."),
		removals:   counter("removed_total", "Names that proxies were told don't exist."),
		rejections: counter("rejections_total", "Responses that a proxy refused."),
		refused:    counter("names_refused_total", "Names asked for that can't exist or were over a stream's limit."),
		throttled:  prometheus.NewCounter(prometheus.CounterOpts{Namespace: "bulkhead", Subsystem: "xds", Name: "throttled_total", Help: "Requests that had to wait, for their stream asked for names too fast."}),
		letGo:      prometheus.NewCounter(prometheus.CounterOpts{Namespace: "bulkhead", Subsystem: "xds", Name: "let_go_total", Help: "Clusters of addresses that nobody has which proxies were told to forget."}),
		builds: prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "bulkhead", Subsystem: "xds", Name: "builds_total", Help: "Resources built from the model."}, func() float64 {
			store.mu.Lock()
			defer store.mu.Unlock()
			return float64(store.builds)
		}),
	}
}

// Collectors are the server's metrics, to be registered once.
func (s *Server) Collectors() []prometheus.Collector {
	m := s.metrics
	return append([]prometheus.Collector{m.streams, m.names, m.pushes, m.bytes, m.removals, m.rejections, m.refused, m.throttled, m.letGo, m.builds}, m.forms...)
}

func (m *metrics) pushed(r *discoveryv3.DeltaDiscoveryResponse) {
	t := shortType(r.TypeUrl)
	m.pushes.WithLabelValues(t).Inc()
	m.bytes.WithLabelValues(t).Add(float64(proto.Size(r)))
	m.removals.WithLabelValues(t).Add(float64(len(r.RemovedResources)))
}

func shortType(typeURL string) string {
	switch typeURL {
	case TypeListener:
		return "lds"
	case TypeCluster:
		return "cds"
	case TypeEndpoints:
		return "eds"
	case TypeRoutes:
		return "rds"
	}
	return "other"
}
