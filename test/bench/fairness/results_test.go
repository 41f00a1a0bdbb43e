package fairness

import (
	"fmt"

	"github.com/bulkhead-mesh/bulkhead/test/bench/report"
)

// results are the tables, of what was measured.
func results(found [][]measured) []report.Table {
	all := report.Table{Title: "A neighbour that misbehaves",
		Text: fmt.Sprintf("team-a makes %d requests a second from node to node, on %d connections and every %dth on one of its own, and counts from when a request was due; team-b, on the same two nodes, does what the first column says, its load bounded to %d thousandths of a CPU at either end. \"Waited\" is for how long a thread of team-a's proxies waited for a CPU, on average each time that it got one; \"late\" is by how much team-a's client was late by itself at the 99th percentile, before any proxy; \"tracked\" are the connections in the table of the node from which both loads come, which was empty before. Where 50 are new a second, an IsolationPolicy has them as `connections.newPerSecond` and `newDirectPerSecond`; that is measured where team-b begins too many.",
			rate, connections, newEvery, generatorCPU),
		Header: []string{"team-b", "isolation", "redirection", "p50 ms", "p99 ms", "to alone", "p99.9 ms", "failed", "waited µs", "late µs", "tracked"}}
	plot := report.Bars{Title: "p99 of a tenant while its neighbour misbehaves", Unit: "ms", Log: true}
	for _, v := range variants {
		plot.Series = append(plot.Series, report.Series{Name: v.name()})
	}
	for i, a := range aggressions {
		shown := false
		for j, v := range variants {
			m := found[i][j]
			if len(m.p99) > 0 {
				all.Rows = append(all.Rows, []string{a.name, v.isolation, string(v.redirection), m.p50.String(), m.p99.Spread(), toAlone(m, found[0][j]), m.p999.Spread(), m.failures(), m.wait.String(), m.late.String(), m.tracked.String()})
				shown = true
			}
		}
		if shown {
			plot.Groups = append(plot.Groups, short(a.name))
			for j := range variants {
				plot.Series[j].Values = append(plot.Series[j].Values, found[i][j].p99)
			}
		}
	}
	all.Plots = map[string]report.Plot{"p99": plot}
	return []report.Table{all, aim(found), price(found[0])}
}

// short leaves details to the table.
func short(name string) string {
	for i, r := range name {
		if r == ',' {
			return name[:i]
		}
	}
	return name
}

func toAlone(m, alone measured) string {
	if len(alone.p99) == 0 {
		return ""
	}
	return m.p99.Per(alone.p99).String()
}

// aim compares topologies of one redirection.
func aim(found [][]measured) report.Table {
	t := report.Table{Title: "With a proxy of one's own, beside a shared one",
		Text:   "The aim: with `Namespace` nothing fails, and p99 is at most 1.5 times what it is alone, or 2 ms more, whichever is larger; it is at least five times less than with `Node` wherever `Node` degrades tenfold. \"Rounds\" are those in which p99 was within it.",
		Header: []string{"team-b", "redirection", "Node to alone", "Namespace to alone", "Namespace: ms more than alone", "Node to Namespace", "failed", "rounds"}}
	for shared, s := range variants {
		for own, o := range variants {
			if !s.shared() || o.isolation != "Namespace" || s.redirection != o.redirection {
				continue
			}
			for i, a := range aggressions[1:] {
				m, node, alone := found[i+1][own], found[i+1][shared], found[0][own]
				if len(m.p99) == 0 || len(node.p99) == 0 || len(alone.p99) == 0 || len(found[0][shared].p99) == 0 {
					continue
				}
				within, more := 0, report.Samples{}
				for k, p99 := range m.p99 {
					more = append(more, p99-alone.p99[k])
					if p99 <= max(1.5*alone.p99[k], alone.p99[k]+2) {
						within++
					}
				}
				t.Rows = append(t.Rows, []string{a.name, string(o.redirection), toAlone(node, found[0][shared]), toAlone(m, alone), more.Spread(),
					node.p99.Per(m.p99).String(), m.failures(), fmt.Sprintf("%d of %d", within, len(m.p99))})
			}
		}
	}
	return t
}

// price is what isolation costs while nobody misbehaves.
func price(alone []measured) report.Table {
	t := report.Table{Title: "When nobody misbehaves",
		Text:   "The same load of team-a while team-b does nothing: what a proxy of one's own costs. CPU is that of the proxies on the way, at this low rate.",
		Header: []string{"isolation", "redirection", "p50 ms", "p99 ms", "p99 to the first", "proxies' CPU ms per 1,000 requests", "to the first"}}
	var first *measured
	for j, v := range variants {
		m := alone[j]
		if len(m.p99) == 0 {
			continue
		}
		if first == nil {
			first = &m
		}
		t.Rows = append(t.Rows, []string{v.isolation, string(v.redirection), m.p50.Spread(), m.p99.Spread(), m.p99.Per(first.p99).String(), m.cpu.Spread(), m.cpu.Per(first.cpu).String()})
	}
	return t
}
