package agent

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/bulkhead-mesh/bulkhead/agent/cost"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/isolation"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/steer"
)

// metricsOf are the process's and this agent's.
func metricsOf(a *Agent) http.Handler {
	own := prometheus.NewRegistry()
	own.MustRegister(podMetrics{a}, tenantMetrics{a})
	return promhttp.HandlerFor(prometheus.Gatherers{prometheus.DefaultGatherer, own}, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}

// podMetrics are what the last round made of pods, and what the kernel counted since
// then of them.
type podMetrics struct{ *Agent }

var (
	bypassedDesc = prometheus.NewDesc("bulkhead_bypassed_pods", "Pods whose new connections pass the mesh by, in plain text: the emergency bypass.", []string{"namespace"}, nil)

	podConnectionsDesc = prometheus.NewDesc("bulkhead_pod_connections_total", "New connections of a pod by the listener of its proxy that got them; direct are those in the clear that are written down.", []string{"namespace", "pod", "listener"}, nil)
	podBytesDesc       = prometheus.NewDesc("bulkhead_pod_bytes_total", "Bytes of TCP on a pod's veth with its headers, by direction: sent or received by the pod.", []string{"namespace", "pod", "direction"}, nil)
	podDropsDesc       = prometheus.NewDesc("bulkhead_pod_dropped_packets_total", "Packets at a pod's veth that steering refused.", []string{"namespace", "pod", "reason"}, nil)
)

// Describe implements prometheus.Collector.
func (podMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{bypassedDesc, podConnectionsDesc, podBytesDesc, podDropsDesc} {
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
	pods, err := d.PodCounters()
	if err != nil {
		c <- prometheus.NewInvalidMetric(podConnectionsDesc, err)
		return
	}
	told := map[string]bool{}
	for _, p := range r.plan.pods {
		counted, ok := pods[p.UID]
		// One that is on its way out may have its name with the one after it.
		if !ok || told[p.Namespace+"/"+p.Name] {
			continue
		}
		told[p.Namespace+"/"+p.Name] = true
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

// tenantMetrics are of each tenant on the node: what its proxy takes, as of the
// last reading, and what steering counts. Label values come from the plan and from
// this file alone, so that no workload can make more of them.
type tenantMetrics struct{ *Agent }

// tenantDesc describes a metric with the tenant's labels and others; namespace is
// "" for a proxy that namespaces share.
func tenantDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("bulkhead_tenant_"+name, help, append([]string{"namespace", "tenant"}, labels...), nil)
}

var (
	tenantReady       = tenantDesc("ready", "1 if the tenant's proxy serves its pods, else 0.")
	tenantPods        = tenantDesc("pods", "Pods that are steered to the tenant's proxy.")
	tenantRestarts    = tenantDesc("restarts_total", "Restarts of the tenant's proxy since it came to the node.", "generation")
	tenantCPU         = tenantDesc("cpu_seconds_total", "CPU time of the tenant's proxy.")
	tenantThrottled   = tenantDesc("cpu_throttled_seconds_total", "Time that the proxy's threads waited for the tenant's CPU limit.")
	tenantMemory      = tenantDesc("memory_bytes", "Memory of the proxy: private is shared with nobody, pss counts shared pages in parts, charged is what the tenant's cgroup holds, sockets included.", "kind")
	tenantMemoryMax   = tenantDesc("memory_limit_bytes", "Charged memory at which the kernel ends the proxy; only where there is a limit.")
	tenantOOMKills    = tenantDesc("oom_kills_total", "Processes of the tenant that the kernel ended at its memory limit.")
	tenantThreads     = tenantDesc("threads", "Threads of the tenant's proxy.")
	tenantPressure    = tenantDesc("pressure_seconds_total", "Time that at least one of the proxy's threads waited for a resource; only where the kernel measures it.", "resource")
	tenantSent        = tenantDesc("sent_bytes_total", "TCP bytes, with headers, that the tenant's pods sent.")
	tenantReceived    = tenantDesc("received_bytes_total", "TCP bytes, with headers, that the tenant's pods received.")
	tenantConnections = tenantDesc("connections_total", "New connections that the tenant's proxy took, by listener.", "listener")
	tenantSteered     = tenantDesc("steered_connections_total", "New connections that the tenant's proxy took, by its generation.", "generation")
	tenantRefused     = tenantDesc("refused_connections_total", "New connections of the tenant that found no proxy.")
	tenantUnmeshed    = tenantDesc("unmeshed_connections_total", "New connections that passed the proxy by, in plain text.", "why")
	tenantDropped     = tenantDesc("dropped_packets_total", "Packets that steering refused, by reason.", "reason")
	tenantEventsLost  = tenantDesc("events_lost_total", "Connection events of the tenant that nobody was told of: beyond a pace, or for want of room, which with eBPF is also where nobody watches.")
	tenantCut         = tenantDesc("cut_connections_total", "Connections that pods of the tenant lost when they joined, moved or left, for 65,536 of the tenant were written down.")
	tenantRejected    = tenantDesc("rejected_resources", "Resources of configuration that the proxy refused and holds no newer version of.")

	tenantTunnelHosts        = tenantDesc("tunnel_hosts", "Endpoints that the tenant's proxy has a place for, for tunnels to them; there are 16,384 places.", "generation")
	tenantTunnelHostsRefused = tenantDesc("tunnel_hosts_refused_total", "Connections that the tenant's proxy closed because all places for endpoints were taken.", "generation")

	tenantDescs = []*prometheus.Desc{tenantReady, tenantPods, tenantRestarts, tenantCPU, tenantThrottled, tenantMemory, tenantMemoryMax, tenantOOMKills,
		tenantThreads, tenantPressure, tenantSent, tenantReceived, tenantConnections, tenantSteered, tenantRefused, tenantUnmeshed, tenantDropped, tenantCut, tenantEventsLost, tenantRejected,
		tenantTunnelHosts, tenantTunnelHostsRefused}
)

// Describe implements prometheus.Collector.
func (tenantMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range tenantDescs {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (m tenantMetrics) Collect(c chan<- prometheus.Metric) {
	o := m.observe()
	m.mu.Lock()
	usages, d := m.usages, m.datapath.datapath
	m.mu.Unlock()
	tunnels := m.tunnels.all()
	var counters map[uint16]steer.Counters
	if d != nil {
		var err error
		if counters, err = d.Counters(); err != nil {
			m.log.Error("connections can't be counted", "error", err)
		}
	}
	for n, t := range makeStatus(o).Tenants {
		tenant := o.round.plan.tenants[n].tenant
		f := tenantFigures{status: t, tunnels: tunnels[tenant]}
		if u, ok := usages[tenant]; ok {
			f.usage = &u
		}
		if account, ok := m.costs.Account(tenant); ok {
			f.account = &account
		}
		if count, ok := counters[o.states[tenant].Index]; ok {
			f.counters = &count
		}
		tenantSink{c: c, tenant: tenant}.all(f)
	}
}

// tenantFigures are what is known of a tenant; nil is not yet.
type tenantFigures struct {
	status   v1alpha1.NodeTenantStatus
	usage    *isolation.Usage
	account  *cost.Account
	counters *steer.Counters
	tunnels  tunnelHosts
}

// tenantSink takes one tenant's metrics.
type tenantSink struct {
	c      chan<- prometheus.Metric
	tenant model.Tenant
}

func (s tenantSink) all(f tenantFigures) {
	ready := 0.0
	if f.status.Ready {
		ready = 1
	}
	s.gauge(tenantReady, ready)
	s.gauge(tenantPods, float64(f.status.Pods))
	s.gauge(tenantRejected, float64(len(f.status.Rejected)))
	for _, g := range f.status.Generations {
		s.counter(tenantRestarts, float64(g.Restarts), strconv.Itoa(int(g.Generation)))
	}
	if most := f.status.Limits.MemoryMax; most > 0 {
		s.gauge(tenantMemoryMax, float64(most))
	}
	for generation, hosts := range f.tunnels {
		s.gauge(tenantTunnelHosts, float64(hosts.Hosts), strconv.Itoa(generation))
		s.counter(tenantTunnelHostsRefused, float64(hosts.Refused), strconv.Itoa(generation))
	}
	if f.usage != nil {
		s.usage(*f.usage)
	}
	if f.account != nil {
		s.counter(tenantSent, float64(f.account.BytesSent))
		s.counter(tenantReceived, float64(f.account.BytesReceived))
	}
	if f.counters != nil {
		s.counters(*f.counters)
	}
}

func (s tenantSink) add(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels []string) {
	s.c <- prometheus.MustNewConstMetric(d, kind, v, append([]string{s.tenant.Namespace, s.tenant.String()}, labels...)...)
}

func (s tenantSink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	s.add(d, prometheus.GaugeValue, v, labels)
}

func (s tenantSink) counter(d *prometheus.Desc, v float64, labels ...string) {
	s.add(d, prometheus.CounterValue, v, labels)
}

func (s tenantSink) usage(u isolation.Usage) {
	s.counter(tenantCPU, u.CPU.Seconds())
	s.counter(tenantThrottled, u.Throttled.Seconds())
	s.gauge(tenantMemory, float64(u.Private), "private")
	s.gauge(tenantMemory, float64(u.PSS), "pss")
	s.gauge(tenantMemory, float64(u.Memory), "charged")
	s.counter(tenantOOMKills, float64(u.OOMKills))
	s.gauge(tenantThreads, float64(u.Threads))
	if p := u.Pressure; p != nil {
		s.counter(tenantPressure, p.CPU.Some.Seconds(), "cpu")
		s.counter(tenantPressure, p.Memory.Some.Seconds(), "memory")
		s.counter(tenantPressure, p.IO.Some.Seconds(), "io")
	}
}

func (s tenantSink) counters(n steer.Counters) {
	for listener, connections := range n.ByListener() {
		s.counter(tenantConnections, float64(connections), listener)
	}
	for generation, connections := range n.Steered {
		s.counter(tenantSteered, float64(connections), strconv.Itoa(generation))
	}
	s.counter(tenantRefused, float64(n.Refused))
	s.counter(tenantUnmeshed, float64(n.Excluded), "excluded")
	s.counter(tenantUnmeshed, float64(n.Bypassed), "bypass")
	for reason, packets := range n.Dropped.ByReason() {
		s.counter(tenantDropped, float64(packets), reason)
	}
	s.counter(tenantCut, float64(n.Cut))
	s.counter(tenantEventsLost, float64(n.EventsLost))
}
