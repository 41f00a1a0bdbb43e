package xds

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// pathMatches says what the model says.
func pathMatches(p model.PathMatch, path string) bool {
	switch p.Kind {
	case model.PathExact:
		return path == p.Value
	case model.PathRegex:
		return regexp.MustCompile("^(?:" + p.Value + ")$").MatchString(path)
	}
	v := trimSlash(p.Value)
	return path == v || strings.HasPrefix(path, v+"/")
}

// randomPath has few segments, so that many are prefixes of others.
func randomPath(r *rand.Rand) string {
	if r.IntN(50) == 0 {
		return "/"
	}
	path := ""
	for range 1 + r.IntN(3) {
		path += "/" + []string{"a", "ab", "b", "a-b", "c.", "abc", "a.b", "d", "de", "bb"}[r.IntN(10)]
	}
	if r.IntN(16) == 0 {
		path += "/"
	}
	return path
}

func randomRules(r *rand.Rand, n int) (rules []model.Rule) {
	for range n {
		p := model.PathMatch{Kind: model.PathKind(r.IntN(2)), Value: randomPath(r)}
		if r.IntN(100) == 0 {
			p = model.PathMatch{Kind: model.PathRegex, Value: "/a.*/b"}
		}
		rules = append(rules, prefixed("/", model.Action{}))
		rules[len(rules)-1].Match.Path = p
	}
	return rules
}

// firstOf is the place of the first rule that matches a path, among places in order.
func firstOf(rules []model.Rule, places []int, path string) int {
	for _, i := range places {
		if pathMatches(rules[i].Match.Path, path) {
			return i
		}
	}
	return -1
}

// The leaf that a path is in has the rule that a list would have found.
func TestRouteIndex(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	trees := 0
	for range 300 {
		rules := randomRules(r, 1+r.IntN(60))
		leaves := indexed(rules)
		if leaves == nil {
			continue
		}
		trees++
		var all []int
		for i := range rules {
			all = append(all, i)
		}
		for range 100 {
			path := randomPath(r)
			leaf := ""
			for prefix := range leaves {
				if strings.HasPrefix(path+"?q=1", prefix) && len(prefix) > len(leaf) {
					leaf = prefix
				}
			}
			if !slices.IsSorted(leaves[leaf]) {
				t.Fatalf("the leaf %q isn't in the rules' order: %v", leaf, leaves[leaf])
			}
			if got, want := firstOf(rules, leaves[leaf], path), firstOf(rules, all, path); got != want {
				t.Fatalf("%s in the leaf %q: rule %d, want %d", path, leaf, got, want)
			}
		}
	}
	if trees < 100 {
		t.Errorf("only %d trees", trees)
	}
	// Where a tree would be much larger than the list, there is none.
	var chain []model.Rule
	for i := range 1000 {
		chain = append(chain, prefixed(strings.Repeat("/a", i+1), model.Action{}))
	}
	if indexed(chain) != nil {
		t.Error("prefixes of prefixes made a tree")
	}
	if leaves := indexed(chain[:20]); leaves != nil && len(leaves) != 21 {
		t.Errorf("%d leaves", len(leaves))
	}
}

// Envoy finds in a tree what it would in the list.
func TestHTTPManyRoutes(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			store, e, rejections := routedEnvoy(t, version)
			r := rand.New(rand.NewPCG(3, 4))
			rules := randomRules(r, 100)
			for indexed(rules) == nil {
				rules = randomRules(r, 100)
			}
			for i := range rules {
				rules[i].Action = &model.Action{Redirect: &model.Redirect{Code: 302, Host: fmt.Sprintf("rule-%d.example.com", i)}}
				if i%3 == 0 {
					rules[i].Match.Headers = []model.ValueMatch{{Name: "x-third", Value: "yes"}}
				}
			}
			route(t, store, "", rules...)
			for _, http2 := range []bool{false, true} {
				pod := newHTTPPod(t, "10.1.0.2", http2)
				eventually(t, "it is routed", func() bool {
					r, _, err := newHTTPPod(t, "10.1.0.2", http2).get("http://10.96.1.1:15001/none")
					return err == nil && r.StatusCode != http.StatusOK
				})
				for range 400 {
					path, third := randomPath(r), r.IntN(2) == 0
					want := slices.IndexFunc(rules, func(x model.Rule) bool {
						return pathMatches(x.Match.Path, path) && (third || len(x.Match.Headers) == 0)
					})
					url, headers := "http://10.96.1.1:15001"+path, []string(nil)
					if r.IntN(2) == 0 {
						url += "?/a/b"
					}
					if third {
						headers = []string{"X-Third: yes"}
					}
					response, _, err := pod.get(url, headers...)
					if err != nil {
						t.Fatal(err)
					}
					got := -1
					if response.StatusCode == http.StatusFound {
						fmt.Sscanf(response.Header.Get("Location"), "http://rule-%d.", &got)
					}
					if got != want || got < 0 && response.StatusCode != http.StatusNotFound {
						t.Errorf("%s, third %t: %d by rule %d; want rule %d", url, third, response.StatusCode, got, want)
					}
				}
			}
			if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
				t.Errorf("Envoy refused something: %+v %v", rs, refused)
			}
		})
	}
}

// A tree doesn't have a few large rules in so many leaves that it becomes far larger than
// the list.
func TestIndexBoundsSize(t *testing.T) {
	var rules []model.Rule
	for i := range 100 {
		rules = append(rules, prefixed(fmt.Sprint("/p", i), model.Action{}))
	}
	large := prefixed("/.*", model.Action{})
	large.Match.Path.Kind = model.PathRegex
	rules = append(rules, large)
	for size, tree := range map[int]bool{0: true, 1 << 10: true, indexSize / 102: true, indexSize / 50: false} {
		rules[100].Size = size
		if leaves := indexed(rules); (leaves != nil) != tree {
			t.Errorf("with an expression of %d bytes there are %d leaves", size, len(leaves))
		}
	}
}
