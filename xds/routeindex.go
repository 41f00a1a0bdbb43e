package xds

import (
	"slices"
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	typematcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// Envoy goes through a list of routes from its begin to its end. Many are put into a
// tree by their paths' prefixes, each of whose leaves has the routes, in their order,
// that paths with this prefix can match. They are lists that decide on their own: the
// tree only leaves out what can't match.

const (
	// indexFrom is how many rules there must be for a tree to be worth it.
	indexFrom = 8
	// indexGrowth bounds how much larger than the list the tree may be: expressions,
	// and prefixes of prefixes, are in many leaves.
	indexGrowth = 8
	// indexSize bounds the tree in bytes, by the rules' sizes: the largest may be those
	// that are in each leaf.
	indexSize = 8 << 20
)

// indexed are a tree's leaves, by prefix: the places of the rules that can match paths
// for which this is the longest. Under "" are those that can match any other path. It
// is nil if a list is better.
func indexed(rules []model.Rule) map[string][]int {
	if len(rules) < indexFrom {
		return nil
	}
	leaves := map[string][]int{"": nil}
	for _, r := range rules {
		if r.Match.Path.Kind != model.PathRegex {
			leaves[literal(r.Match.Path)] = nil
		}
	}
	if len(leaves) < indexFrom/2 {
		return nil // they differ in something else
	}
	// The leaves below a literal are those that begin with it, one after the other.
	sorted := make([]string, 0, len(leaves))
	for prefix := range leaves {
		sorted = append(sorted, prefix)
	}
	slices.Sort(sorted)
	places, size := 0, 0
	for i, r := range rules {
		at := ""
		if r.Match.Path.Kind != model.PathRegex {
			at = literal(r.Match.Path)
		}
		first, _ := slices.BinarySearch(sorted, at)
		for _, prefix := range sorted[first:] {
			if !strings.HasPrefix(prefix, at) {
				break
			}
			leaves[prefix] = append(leaves[prefix], i)
			places, size = places+1, size+r.Size
			if places > indexGrowth*len(rules) || size > indexSize {
				return nil
			}
		}
	}
	return leaves
}

// literal is what all paths begin with that match.
func literal(p model.PathMatch) string {
	if p.Kind == model.PathExact {
		return p.Value
	}
	if v := trimSlash(p.Value); v != "" {
		return v
	}
	return "/"
}

// routeTree makes a tree of routes, which stand where their rules did.
func (p *packer) routeTree(leaves map[string][]int, routes []*routev3.Route) *xdsmatcherv3.Matcher {
	list := func(places []int) *xdsmatcherv3.Matcher_OnMatch {
		of := &routev3.RouteList{}
		for _, i := range places {
			of.Routes = append(of.Routes, routes[i])
		}
		return &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Action{Action: &xdscorev3.TypedExtensionConfig{Name: "routes", TypedConfig: p.any(of)}}}
	}
	prefixes := &xdsmatcherv3.Matcher_MatcherTree_MatchMap{Map: map[string]*xdsmatcherv3.Matcher_OnMatch{}}
	for prefix, places := range leaves {
		if prefix != "" && len(places) > 0 {
			prefixes.Map[prefix] = list(places)
		}
	}
	m := &xdsmatcherv3.Matcher{MatcherType: &xdsmatcherv3.Matcher_MatcherTree_{MatcherTree: &xdsmatcherv3.Matcher_MatcherTree{
		// With the query behind it.
		Input:    &xdscorev3.TypedExtensionConfig{Name: "path", TypedConfig: p.any(&typematcherv3.HttpRequestHeaderMatchInput{HeaderName: ":path"})},
		TreeType: &xdsmatcherv3.Matcher_MatcherTree_PrefixMatchMap{PrefixMatchMap: prefixes},
	}}}
	if rest := leaves[""]; len(rest) > 0 {
		m.OnNoMatch = list(rest)
	}
	return m
}
