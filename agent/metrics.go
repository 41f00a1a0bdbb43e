package agent

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsOf are the process's and this agent's.
func metricsOf(a *Agent) http.Handler {
	own := prometheus.NewRegistry()
	own.MustRegister(podMetrics{a})
	return promhttp.HandlerFor(prometheus.Gatherers{prometheus.DefaultGatherer, own}, promhttp.HandlerOpts{})
}

// podMetrics are what the last round made of pods, and what the kernel counted since
// then of them and their tenants.
type podMetrics struct{ *Agent }

var (
	bypassedDesc = prometheus.NewDesc("bulkhead_bypassed_pods", "Pods whose new connections pass the mesh by, in plain text: the emergency bypass.", []string{"namespace"}, nil)

	tenantConnectionsDesc = prometheus.NewDesc("bulkhead_tenant_connections_total", "New connections that a tenant's proxy on this node got, by its generation.", []string{"tenant", "generation"}, nil)
	tenantClearDesc       = prometheus.NewDesc("bulkhead_tenant_clear_connections_total", "New connections of a tenant's pods that passed in the clear: excluded, or bypassed.", []string{"tenant", "by"}, nil)
	tenantDropsDesc       = prometheus.NewDesc("bulkhead_tenant_dropped_packets_total", "Packets of a tenant and its pods that steering refused; refused are connections that found no proxy.", []string{"tenant", "reason"}, nil)
	podConnectionsDesc    = prometheus.NewDesc("bulkhead_pod_connections_total", "New connections of a pod by the listener of its proxy that got them; direct are those in the clear that are written down.", []string{"namespace", "pod", "listener"}, nil)
	podBytesDesc          = prometheus.NewDesc("bulkhead_pod_bytes_total", "Bytes of TCP on a pod's veth with its headers, by direction: sent or received by the pod.", []string{"namespace", "pod", "direction"}, nil)
	podDropsDesc          = prometheus.NewDesc("bulkhead_pod_dropped_packets_total", "Packets at a pod's veth that steering refused.", []string{"namespace", "pod", "reason"}, nil)
)

// Describe implements prometheus.Collector.
func (podMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{bypassedDesc, tenantConnectionsDesc, tenantClearDesc, tenantDropsDesc, podConnectionsDesc, podBytesDesc, podDropsDesc} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (m podMetrics) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	r := m.last
	m.mu.Unlock()
	bypassed := map[string]int{}
	for _, p := range r.plan.pods {
		if r.steered[p.UID].Bypass {
			bypassed[p.Namespace]++
		}
	}
	for namespace, n := range bypassed {
		c <- prometheus.MustNewConstMetric(bypassedDesc, prometheus.GaugeValue, float64(n), namespace)
	}
	d := m.steering().datapath
	if d == nil {
		return
	}
	count := func(d *prometheus.Desc, n uint64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	tenants, err := d.Counters()
	if err != nil {
		c <- prometheus.NewInvalidMetric(tenantConnectionsDesc, err)
		return
	}
	for index, counted := range tenants {
		s, ok := m.tenantOf(index)
		if !ok {
			continue
		}
		name := s.Tenant.String()
		for generation, n := range counted.Steered {
			count(tenantConnectionsDesc, n, name, strconv.Itoa(generation))
		}
		count(tenantClearDesc, counted.Excluded, name, "exclusion")
		count(tenantClearDesc, counted.Bypassed, name, "bypass")
		for reason, n := range drops(counted) {
			count(tenantDropsDesc, n, name, reason)
		}
	}
	pods, err := d.PodCounters()
	if err != nil {
		c <- prometheus.NewInvalidMetric(podConnectionsDesc, err)
		return
	}
	for _, p := range r.plan.pods {
		counted, ok := pods[p.UID]
		if !ok {
			continue
		}
		for listener, n := range podConnections(counted) {
			count(podConnectionsDesc, n, p.Namespace, p.Name, listener)
		}
		count(podBytesDesc, counted.BytesSent, p.Namespace, p.Name, "sent")
		count(podBytesDesc, counted.BytesReceived, p.Namespace, p.Name, "received")
		for reason, n := range counted.Dropped.ByReason() {
			count(podDropsDesc, n, p.Namespace, p.Name, reason)
		}
	}
}
