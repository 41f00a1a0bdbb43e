package controllers

import (
	"github.com/prometheus/client_golang/prometheus"
)

var bypassDesc = prometheus.NewDesc("bulkhead_emergency_bypass", "1 for each namespace that an emergency bypass takes past the mesh; there is no series while none is on.", []string{"namespace", "topology"}, nil)

// Describe implements prometheus.Collector.
func (m *mesh) Describe(c chan<- *prometheus.Desc) { c <- bypassDesc }

// Collect implements prometheus.Collector.
func (m *mesh) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, ns := range m.namespaces {
		if ns.Bypass {
			c <- prometheus.MustNewConstMetric(bypassDesc, prometheus.GaugeValue, 1, name, ns.Topology)
		}
	}
}
