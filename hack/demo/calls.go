package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// call is one call that the demo makes, and what it must show.
type call struct {
	from harness.Pod
	to   harness.Echo
	// what is called, and how.
	what string
	args []string
	got  app.CallResult
	err  error
}

func serviceName(a harness.Echo) string { return a.Name + "." + a.Namespace + ".svc" }

func address(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

func (d *demo) callsFrom(from harness.Pod) []call {
	var calls []call
	add := func(to harness.Echo, what string, args ...string) {
		calls = append(calls, call{from: from, to: to, what: what, args: args})
	}
	for _, to := range []harness.Echo{webA, webB, webC} {
		host := serviceName(to)
		add(to, "HTTP to the service", "get", "http://"+address(host, app.HTTPPort)+"/")
		add(to, "gRPC to the service", "grpc", address(host, app.GRPCPort))
		add(to, "server-first TCP to the service", "tcp", address(host, app.GreetPort))
		other := d.pod(to, 0) // a pod on the other node, by its own address
		if other.Spec.NodeName == from.Spec.NodeName {
			other = d.pod(to, 1)
		}
		add(to, "server-first TCP to the pod on the other node", "tcp", address(other.IPv4, app.GreetPort))
		if other.IPv6 != "" {
			add(to, "HTTP to the pod on the other node, IPv6", "get", "http://"+address(other.IPv6, app.HTTPPort)+"/")
		}
	}
	return calls
}

// showCalls calls everybody from everybody and compares what the servers saw
// with who called.
func (d *demo) showCalls(ctx context.Context) error {
	d.step("Everybody calls everybody: HTTP, gRPC and a protocol in which the server speaks first")
	sources := []harness.Pod{d.pod(webA, 0), d.pod(jobA, 1), d.pod(webB, 0), d.pod(webC, 1)}
	var all []call
	for _, s := range sources {
		all = append(all, d.callsFrom(s)...)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	for i := range all {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			c := &all[i]
			c.got, c.err = d.Call(ctx, c.from, c.args...)
		})
	}
	wg.Wait()
	for _, from := range sources {
		for _, to := range []harness.Echo{webA, webB, webC} {
			var problems []string
			n := 0
			for _, c := range all {
				if c.from.Name != from.Name || c.to != to {
					continue
				}
				n++
				if p := c.problem(); p != "" {
					problems = append(problems, p)
				}
			}
			d.checkErr(joined(problems), "%-19s → %s/%s: %d calls, each answered, each time the application saw the client's own address", from, to.Namespace, to.Name, n)
		}
	}
	return d.showIdentities(ctx)
}

// showIdentities compares what the servers' proxies logged of their clients
// (certificate and address) with who has that address.
func (d *demo) showIdentities(ctx context.Context) error {
	d.step("The identities that the servers' sides saw (from the proxies' access logs)")
	owner := d.identities()
	type side struct{ server, client string }
	var seen map[side]int
	var wrong []string
	err := harness.Wait(ctx, 30*time.Second, time.Second, "access logs", func(ctx context.Context) error {
		seen, wrong = map[side]int{}, nil
		for _, node := range d.nodes {
			for _, team := range teams {
				entries, err := d.AccessLog(ctx, node, team)
				if err != nil {
					return err
				}
				for _, e := range entries {
					if e.Time.Before(d.started) {
						continue // addresses may have been others' then
					}
					seen[side{e.Own, e.Peer}]++
					if e.Peer != owner[e.Source] || e.Own != owner[hostOf(e.Destination)] {
						wrong = append(wrong, fmt.Sprintf("%s claimed to be %s towards %s at %s", e.Source, e.Peer, e.Own, e.Destination))
					}
				}
			}
		}
		for _, from := range []harness.Echo{webA, jobA, webB, webC} {
			for _, to := range []harness.Echo{webA, webB, webC} {
				if seen[side{spiffeID(to), spiffeID(from)}] == 0 {
					return fmt.Errorf("no connection of %s logged by %s yet", spiffeID(from), spiffeID(to))
				}
			}
		}
		return nil
	})
	d.checkErr(err, "each server saw each client's own SPIFFE ID over mTLS")
	for _, s := range slices.SortedFunc(maps.Keys(seen), func(a, b side) int { return cmp.Or(cmp.Compare(a.server, b.server), cmp.Compare(a.client, b.client)) }) {
		fmt.Printf("       %-42s saw %-42s %4d connections\n", strings.TrimPrefix(s.server, "spiffe://"), strings.TrimPrefix(s.client, "spiffe://"), seen[s])
	}
	d.checkErr(joined(wrong), "no connection carried an identity that isn't its address's")
	return nil
}

func spiffeID(a harness.Echo) string {
	return harness.Pod{Echo: a}.Identity(trustDomain)
}

func hostOf(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return host
}

// joined is nil for no problems, and else an error that names the first ones.
func joined(problems []string) error {
	switch n := len(problems); {
	case n == 0:
		return nil
	case n > 3:
		return fmt.Errorf("%d times, such as %s", n, strings.Join(problems[:3], "; "))
	}
	return errors.New(strings.Join(problems, "; "))
}

// problem says what is wrong with a call's outcome, "" if nothing is.
func (c call) problem() string {
	switch {
	case c.err != nil:
		return c.what + ": " + c.err.Error()
	case !c.got.OK:
		return fmt.Sprintf("%s: %+v", c.what, c.got.Failure)
	case c.got.Answer == nil:
		return c.what + ": no answer from the application"
	case c.got.Answer.Namespace != c.to.Namespace:
		return fmt.Sprintf("%s: answered by %s/%s", c.what, c.got.Answer.Namespace, c.got.Answer.Pod)
	}
	want := c.from.IPv4
	if strings.Contains(c.got.Answer.ClientIP(), ":") {
		want = c.from.IPv6
	}
	if c.got.Answer.Pod == c.from.Name {
		want = harness.SelfAddress(want) // the service chose the caller itself
	}
	if c.got.Answer.ClientIP() != want {
		return fmt.Sprintf("%s: the application saw client %s, not %s", c.what, c.got.Answer.Client, want)
	}
	return ""
}
