package l7

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/bench/container"
	"github.com/bulkhead-mesh/bulkhead/test/bench/load"
	"github.com/bulkhead-mesh/bulkhead/test/bench/loader"
	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

var optionConnections = flag.Int("option-connections", 64, "connections with which single options are measured")

// option is one setting of what a proxy has for a port, other than it is.
type option struct {
	name     string
	protocol load.Protocol
	// Each is nil or changes its part.
	manager func(*hcmv3.HttpConnectionManager)
	router  func(*routerv3.Router)
	cluster func(*clusterv3.Cluster, *upstreamhttpv3.HttpProtocolOptions)
	route   func(*routev3.Route)
}

// asItIs is what the others are compared with.
const asItIs = "as it is"

const httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

var (
	yes, no = wrapperspb.Bool(true), wrapperspb.Bool(false)
	never   = durationpb.New(0)
)

var options = append([]option{
	{name: asItIs},
	{name: "a request ID", manager: func(m *hcmv3.HttpConnectionManager) { m.GenerateRequestId = nil }},
	{name: "a Server header", manager: func(m *hcmv3.HttpConnectionManager) {
		m.ServerHeaderTransformation = hcmv3.HttpConnectionManager_OVERWRITE
	}},
	{name: "x-envoy headers", router: func(r *routerv3.Router) { r.SuppressEnvoyHeaders = false }},
	{name: "X-Forwarded-For", manager: func(m *hcmv3.HttpConnectionManager) {
		m.SkipXffAppend, m.UseRemoteAddress, m.OriginalIpDetectionExtensions = false, yes, nil
	}},
	{name: "the router's dynamic statistics", router: func(r *routerv3.Router) { r.DynamicStats = yes }},
	{name: "statistics of the route", route: func(r *routev3.Route) { r.StatPrefix = "route" }},
	{name: "an access log", manager: func(m *hcmv3.HttpConnectionManager) { m.AccessLog = []*accesslogv3.AccessLog{accessLog()} }},
	{name: "a timeout of the request", route: func(r *routev3.Route) { r.GetRoute().Timeout = durationpb.New(15 * time.Second) }},
	{name: "a timeout of idle streams", manager: func(m *hcmv3.HttpConnectionManager) { m.StreamIdleTimeout = nil }},
	{name: "a timeout of idle clients", manager: func(m *hcmv3.HttpConnectionManager) { m.CommonHttpProtocolOptions = nil }},
	{name: "retries", route: func(r *routev3.Route) {
		r.GetRoute().RetryPolicy = &routev3.RetryPolicy{RetryOn: "reset,connect-failure,refused-stream"}
	}},
	{name: "paths as they are", manager: func(m *hcmv3.HttpConnectionManager) { m.NormalizePath = no }},
	{name: "the client's address from X-Forwarded-For", manager: func(m *hcmv3.HttpConnectionManager) { m.OriginalIpDetectionExtensions = nil }},
	{name: "idle backends kept", cluster: func(_ *clusterv3.Cluster, o *upstreamhttpv3.HttpProtocolOptions) {
		o.CommonHttpProtocolOptions.IdleTimeout = never
	}},
	{name: "no ejection", cluster: func(c *clusterv3.Cluster, _ *upstreamhttpv3.HttpProtocolOptions) { c.OutlierDetection = nil }},
	{name: "round robin", cluster: func(c *clusterv3.Cluster, _ *upstreamhttpv3.HttpProtocolOptions) {
		c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
	}},
	{name: "upstream buffers of 1 MiB", cluster: func(c *clusterv3.Cluster, _ *upstreamhttpv3.HttpProtocolOptions) {
		c.PerConnectionBufferLimitBytes = wrapperspb.UInt32(1 << 20)
	}},
	{name: "upstream buffers of 16 KiB", cluster: func(c *clusterv3.Cluster, _ *upstreamhttpv3.HttpProtocolOptions) {
		c.PerConnectionBufferLimitBytes = wrapperspb.UInt32(16 << 10)
	}},
	{name: "the protocol is known", manager: func(m *hcmv3.HttpConnectionManager) { m.CodecType = hcmv3.HttpConnectionManager_HTTP1 }},
	{name: behindEndpoint},
}, http2Options()...)

// behindEndpoint has all connections read in the internal listener behind the address'
// endpoint, as the first ones are.
const behindEndpoint = "read behind the endpoint"

func http2Options() []option {
	each := func(change func(*corev3.Http2ProtocolOptions)) option {
		return option{protocol: load.HTTP2,
			manager: func(m *hcmv3.HttpConnectionManager) { change(m.Http2ProtocolOptions) },
			cluster: func(_ *clusterv3.Cluster, o *upstreamhttpv3.HttpProtocolOptions) {
				change(o.GetUseDownstreamProtocolConfig().Http2ProtocolOptions)
			}}
	}
	named := func(name string, o option) option {
		o.name, o.protocol = name, load.HTTP2
		return o
	}
	return []option{
		named(asItIs, option{}),
		named("oghttp2", each(func(o *corev3.Http2ProtocolOptions) { o.UseOghttp2Codec = yes })),
		named("nghttp2", each(func(o *corev3.Http2ProtocolOptions) { o.UseOghttp2Codec = no })),
		named("windows of 64 KiB", each(func(o *corev3.Http2ProtocolOptions) {
			o.InitialStreamWindowSize, o.InitialConnectionWindowSize = wrapperspb.UInt32(65535), wrapperspb.UInt32(65535)
		})),
		named("windows of 16 MiB", each(func(o *corev3.Http2ProtocolOptions) {
			o.InitialStreamWindowSize, o.InitialConnectionWindowSize = wrapperspb.UInt32(16<<20), wrapperspb.UInt32(64<<20)
		})),
		named("no header table", each(func(o *corev3.Http2ProtocolOptions) { o.HpackTableSize = wrapperspb.UInt32(0) })),
		named("four requests of a connection to the backend", option{cluster: func(_ *clusterv3.Cluster, o *upstreamhttpv3.HttpProtocolOptions) {
			o.GetUseDownstreamProtocolConfig().Http2ProtocolOptions.MaxConcurrentStreams = wrapperspb.UInt32(4)
		}}),
		named("paths as they are", option{manager: func(m *hcmv3.HttpConnectionManager) { m.NormalizePath = no }}),
		named("the protocol is known", option{manager: func(m *hcmv3.HttpConnectionManager) { m.CodecType = hcmv3.HttpConnectionManager_HTTP2 }}),
		named(behindEndpoint, option{}),
	}
}

// accessLog is a line for each request, of the fields that a line of the mesh's has.
func accessLog() *accesslogv3.AccessLog {
	log, err := anypb.New(&streamv3.StdoutAccessLog{AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
		Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{
			InlineString: "%START_TIME% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_ADDRESS% %REQ(:METHOD)% %REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %UPSTREAM_HOST% %BYTES_RECEIVED% %BYTES_SENT% %DURATION%\n",
		}}},
	}}})
	if err != nil {
		panic(err)
	}
	return &accesslogv3.AccessLog{Name: "stdout", ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: log}}
}

// firstOption is the first option's port; the others follow.
const firstOption = 9300

// optionOf is the one of a port.
func optionOf(port string) (o option, ok bool) {
	n, err := strconv.Atoi(port)
	if n -= firstOption; err != nil || n < 0 || n >= len(options) {
		return o, false
	}
	return options[n], true
}

// rewriter changes what the client's proxy gets, by the port that it is for.
type rewriter struct {
	b      *testing.B
	tenant model.Tenant
	vip    netip.Addr
}

func (w *rewriter) rewrite(node string, tenant model.Tenant, r *discoveryv3.Resource) {
	if node != "node1" || tenant != w.tenant {
		return
	}
	if r.Name == "outbound" {
		edit(w.b, r.Resource, w.outbound)
		return
	}
	o, ok := optionOf(r.Name[strings.LastIndexByte(r.Name, ':')+1:])
	if !ok {
		return
	}
	switch r.Resource.TypeUrl {
	case xds.TypeListener:
		edit(w.b, r.Resource, func(l *listenerv3.Listener) { w.manager(l.FilterChains[0].Filters[0], o) })
	case xds.TypeCluster:
		if o.cluster == nil || !strings.HasPrefix(r.Name, "be|") {
			return
		}
		edit(w.b, r.Resource, func(c *clusterv3.Cluster) {
			edit(w.b, c.TypedExtensionProtocolOptions[httpOptions], func(p *upstreamhttpv3.HttpProtocolOptions) { o.cluster(c, p) })
		})
	case xds.TypeRoutes:
		if o.route != nil {
			edit(w.b, r.Resource, func(c *routev3.RouteConfiguration) { o.route(c.VirtualHosts[0].Routes[0]) })
		}
	}
}

// manager changes a connection manager.
func (w *rewriter) manager(f *listenerv3.Filter, o option) {
	edit(w.b, f.GetTypedConfig(), func(m *hcmv3.HttpConnectionManager) {
		if o.router != nil {
			edit(w.b, m.HttpFilters[len(m.HttpFilters)-1].GetTypedConfig(), o.router)
		}
		if o.manager != nil {
			o.manager(m)
		}
	})
}

// edit changes a packed message.
func edit[M any, P interface {
	*M
	proto.Message
}](b *testing.B, a *anypb.Any, change func(P)) {
	b.Helper()
	m := P(new(M))
	lab.Check(b, a.UnmarshalTo(m))
	change(m)
	lab.Check(b, a.MarshalFrom(m))
}

func BenchmarkOptions(b *testing.B) {
	w := &rewriter{b: b, tenant: model.NamespaceTenant("team-a"), vip: netip.MustParseAddr("10.96.0.15")}
	l := lab.NewWith(b, lab.Options{PathMTU: 1500, NoAccessLog: true, Rewrite: w.rewrite})
	if l.B2.VIP.V4 != w.vip || l.A1.Tenant != w.tenant {
		b.Fatal("the lab has other addresses now")
	}
	ld := loader.New(b)
	ld.Serve(l.B2, "serve", "server", container.Pod)
	wanted, err := regexp.Compile(*only)
	lab.Check(b, err)
	var ways []way
	var measured []int
	for i, o := range options {
		if o.protocol == "" {
			o.protocol = load.HTTP1
		}
		ways = append(ways, way{o.name, o.protocol, 1, uint16(firstOption + i), false})
		if o.name == asItIs || wanted.MatchString(string(o.protocol)+" "+o.name) {
			measured = append(measured, i)
		}
	}
	publish(b, l, l.B2, ways)
	mesh := []int{l.Node1.Tenant(l.A1.Tenant.String()).Generations[0].PID, l.Node2.Tenant(l.B2.Tenant.String()).Generations[0].PID}
	run := func(i int, d time.Duration) load.Result {
		return run(b, ld, l.A1, load.Options{To: netip.AddrPortFrom(w.vip, ways[i].port), Connections: *optionConnections, Protocol: ways[i].protocol, Duration: d, Processes: mesh})
	}
	for _, i := range measured {
		run(i, 200*time.Millisecond) // from now on its connections are read in outbound
	}
	all := make([]samples, len(options))
	for round := range *report.Rounds {
		for k := range measured {
			i := measured[(k+round)%len(measured)]
			r, s := run(i, *report.Duration), &all[i]
			s.rate = append(s.rate, float64(r.Requests)/r.Duration.Seconds())
			s.cpu = append(s.cpu, float64(r.CPU.Processes)/1e3/float64(r.Requests))
		}
		fmt.Fprintf(os.Stderr, "options: round %d of %d\n", round+1, *report.Rounds)
	}
	t := report.Table{Title: fmt.Sprintf("One option other than it is, at %d connections", *optionConnections), Text: "The same proxies at the same time, of which the client's has another port with one option changed for each line; otherwise the way is that of one route above.",
		Header: []string{"protocol", "option", "requests/s", "CPU ms per 1,000 requests", "CPU to as it is"}}
	base := map[load.Protocol]report.Samples{}
	for _, i := range measured {
		if ways[i].name == asItIs {
			base[ways[i].protocol] = all[i].cpu
		}
		t.Rows = append(t.Rows, []string{string(ways[i].protocol), ways[i].name, all[i].rate.String(), all[i].cpu.Spread(), all[i].cpu.Per(base[ways[i].protocol]).Spread()})
	}
	report.Publish(b, fmt.Sprintf("l7-options-%d", *optionConnections), t)
}
