package agent

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsOf are the process's and this agent's.
func metricsOf(a *Agent) http.Handler {
	own := prometheus.NewRegistry()
	own.MustRegister(podMetrics{a})
	return promhttp.HandlerFor(prometheus.Gatherers{prometheus.DefaultGatherer, own}, promhttp.HandlerOpts{})
}

// podMetrics are what the last round made of pods.
type podMetrics struct{ *Agent }

var bypassedDesc = prometheus.NewDesc("bulkhead_bypassed_pods", "Pods whose new connections pass the mesh by, in plain text: the emergency bypass.", []string{"namespace"}, nil)

// Describe implements prometheus.Collector.
func (podMetrics) Describe(c chan<- *prometheus.Desc) { c <- bypassedDesc }

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
}
