package controllers

import (
	"github.com/prometheus/client_golang/prometheus"
)

var bypassDesc = prometheus.NewDesc("bulkhead_emergency_bypass", "1 for each namespace that an emergency bypass takes past the mesh; there is no series while none is on.", []string{"namespace", "topology"}, nil)

var rangesDesc = prometheus.NewDesc("bulkhead_nodes_without_pod_ranges", "Nodes with pods of the mesh that have no podCIDRs: these pods are dialled in plain text by their own addresses.", nil, nil)

// Describe implements prometheus.Collector.
func (m *mesh) Describe(c chan<- *prometheus.Desc) {
	c <- bypassDesc
	c <- rangesDesc
}

// Collect implements prometheus.Collector.
func (m *mesh) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, ns := range m.namespaces {
		if ns.Bypass {
			c <- prometheus.MustNewConstMetric(bypassDesc, prometheus.GaugeValue, 1, name, ns.Topology)
		}
	}
	without := 0
	for name, n := range m.nodes {
		if n.WithoutRanges() && len(m.members(name)) > 0 {
			without++
		}
	}
	c <- prometheus.MustNewConstMetric(rangesDesc, prometheus.GaugeValue, float64(without))
}
