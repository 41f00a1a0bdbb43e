package l7

import (
	"strconv"
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
)

// outbound changes the chains of ports whose connections are read there, and leads to
// none for those that are to be read behind the endpoint.
func (w *rewriter) outbound(l *listenerv3.Listener) {
	for _, c := range l.FilterChains {
		if o, ok := optionOf(c.Name[strings.LastIndexByte(c.Name, ':')+1:]); ok && strings.HasPrefix(c.Name, "http/") {
			w.manager(c.Filters[1], o)
		}
	}
	edit(w.b, l.FilterChainMatcher.GetMatcherTree().GetCustomMatch().TypedConfig, func(sources *matcherv3.IPMatcher) {
		for _, s := range sources.RangeMatchers {
			edit(w.b, s.OnMatch.GetMatcher().GetMatcherTree().GetCustomMatch().TypedConfig, func(destinations *matcherv3.IPMatcher) {
				for _, d := range destinations.RangeMatchers {
					ports := d.OnMatch.GetMatcher().GetMatcherTree().GetExactMatchMap().GetMap()
					for i, o := range options {
						// Envoy wants one at least.
						if port := strconv.Itoa(firstOption + i); o.name == behindEndpoint && len(ports) > 1 {
							delete(ports, port)
						}
					}
				}
			})
		}
	})
}
