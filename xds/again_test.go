package xds

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

// appPort is where applications listen: all that this proxy opens to pods and out of the
// mesh goes there, for without steering clients dial the ports of its listeners.
const appPort = 8080

// shortConnect is how long a connection may take that a firewall swallows.
const shortConnect = 300 * time.Millisecond

// toApps edits the clusters that don't know their endpoints.
func toApps(c *clusterv3.Cluster) {
	switch c.Name {
	case clusterDeliver, clusterDeliverNode, clusterPassthrough:
		c.LbConfig = &clusterv3.Cluster_OriginalDstLbConfig_{OriginalDstLbConfig: &clusterv3.Cluster_OriginalDstLbConfig{}}
		fallthrough
	case clusterDeliverHTTP:
		c.GetOriginalDstLbConfig().UpstreamPortOverride = wrapperspb.UInt32(appPort)
		c.ConnectTimeout = durationpb.New(shortConnect)
	}
}

// firewall is in front of the applications of the calling thread's network namespace: what
// it does with the packets that open a connection. It notes whose they are, rather than
// counts them: on a busy machine one is sent twice before its time is up.
type firewall struct{ t *testing.T }

var ports = regexp.MustCompile(`\d+`)

// put has it do what verdict says, from the first packet on.
func (f firewall) put(verdict string) {
	f.t.Helper()
	f.nft("-f", "-", fmt.Sprintf(`table inet again
delete table inet again
table inet again {
	set attempts {
		type inet_service
		flags dynamic
		size 64
	}
	chain input {
		type filter hook input priority 0
		tcp dport %d tcp flags & (syn | ack) == syn add @attempts { tcp sport } %s
	}
}`, appPort, verdict))
}

// attempts are how many connections were to be opened since.
func (f firewall) attempts() int {
	f.t.Helper()
	_, elements, _ := strings.Cut(f.nft("list", "set", "inet", "again", "attempts", ""), "elements = {")
	return len(ports.FindAllString(elements, -1))
}

// nft runs it with arguments, the last of which is its input.
func (f firewall) nft(args ...string) string {
	f.t.Helper()
	args, input := args[:len(args)-1], args[len(args)-1]
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	if err != nil {
		f.t.Fatalf("nft (of the package nftables) %q: %v: %s", args, err, out)
	}
	return string(out)
}

// refuse are verdicts that refuse so many of four connections, one after the other.
func refuse(n int) string {
	const reset = " reject with tcp reset"
	return []string{"", "numgen inc mod 4 0" + reset, "numgen inc mod 4 { 0, 1 }" + reset, "numgen inc mod 4 { 0, 1, 2 }" + reset, reset}[n]
}

// A way is how a connection comes to an application.
type way struct {
	name string
	// attempts that a connection has, by form.
	attempts [3]int
	// try returns what the client sees: the application's greeting, or how it ended.
	try func() string
}

// ways are all, with what a client sees when the application refuses, or isn't reached.
func ways(t *testing.T, ca *authority) []way {
	dial := func(source, to string) func() string {
		return func() string {
			c, err := dialFrom(source, to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			greeting, err := bufio.NewReader(c).ReadString('\n')
			if ne, is := err.(net.Error); is && ne.Timeout() {
				t.Fatalf("from %s to %s: %v", source, to, err)
			}
			if err != nil {
				return ended
			}
			return strings.TrimSpace(greeting)
		}
	}
	web := ca.certificate(identity("web").String())
	return []way{
		{"plain", [3]int{1: 1, 2: 4}, dial("10.7.7.7", fmt.Sprint("10.1.0.3:", PortPlain))},
		{"from a node", [3]int{1: 1, 2: 4}, dial("10.7.7.7", fmt.Sprint("10.1.0.3:", PortNodePlain))},
		{"out of a tunnel", [3]int{1: 1, 2: 4}, func() string { return early(t, ca, web, nil) }},
		{"to a pod outside of the mesh", [3]int{1: 1, 2: 2}, dial("10.1.0.2", fmt.Sprint("10.1.0.9:", PortOutbound))},
		{"out of the cluster", [3]int{1: 1, 2: 2}, dial("10.1.0.2", fmt.Sprint("192.0.2.9:", PortOutbound))},
	}
}

const ended = "ended"

// early is what a peer sees of a CONNECT whose client doesn't wait for the answer before
// it speaks: what it says arrives, once.
func early(t *testing.T, ca *authority, cert tls.Certificate, header http.Header) string {
	t.Helper()
	h := peerOf(t, cert)
	defer h.Close()
	body, w := io.Pipe()
	defer w.Close()
	go io.WriteString(w, "early\n")
	request := connectTo(body)
	request.Header = header
	r, err := h.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode == http.StatusServiceUnavailable {
		return ended
	}
	answers := bufio.NewReader(r.Body)
	greeting, err := answers.ReadString('\n')
	if r.StatusCode != http.StatusOK || err != nil {
		return fmt.Sprint(r.Status, " ", err)
	}
	io.WriteString(w, "late\n")
	for _, want := range []string{"early\n", "late\n"} {
		if echo, err := answers.ReadString('\n'); err != nil || echo != want {
			t.Errorf("%q came back, %v; want %q", echo, err, want)
		}
	}
	return strings.TrimSpace(greeting)
}

// A connection that is refused is tried again, as often as is for its way, by processes
// whose form has that; with the last attempt its client hears what it always did.
func TestRefusedIsTriedAgain(t *testing.T) {
	for _, version := range dist.Versions() {
		for _, f := range forms() {
			t.Run(fmt.Sprintf("%s, form %d", version, f), func(t *testing.T) { testRefused(t, version, f) })
		}
	}
}

func testRefused(t *testing.T, version string, f Form) {
	enterNetns(t)
	store, server, rejections := envoyStore(t)
	store.newest = f
	if err := store.SetWorkload(plainWorkload("plain", "10.1.0.9")); err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"10.1.0.3", "10.1.0.9", "192.0.2.9"} {
		serveApp(t, net.JoinHostPort(addr, strconv.Itoa(appPort)))
	}
	ca := newAuthority(t)
	e := startEnvoyEdited(t, version, 1, server, ca, editing(toApps))
	if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-api-0"); err != nil {
		t.Fatal(err)
	}
	wall := firewall{t}
	for _, w := range ways(t, ca) {
		tries := w.attempts[f]
		for _, c := range []struct {
			name, verdict string
			attempts      int
			greets        bool
		}{
			{"let in", "accept", 1, true},
			{"refused before the last attempt", refuse(tries - 1), tries, true},
			{"refused", refuse(4), tries, false},
			{"not answered", "drop", tries, false},
		} {
			if c.verdict == "" {
				continue // one attempt is the first and the last
			}
			wall.put(c.verdict)
			got := w.try()
			if n := wall.attempts(); n != c.attempts {
				t.Errorf("%s, %s: %d attempts; want %d", w.name, c.name, n, c.attempts)
			}
			if c.greets && !strings.Contains(got, " sees ") || !c.greets && got != ended {
				t.Errorf("%s, %s: got %q", w.name, c.name, got)
			}
		}
	}
	countedOnce(t, e, wall, f)
	if rs, refused := rejections(), e.refused(); len(rs) > 0 || len(refused) > 0 {
		t.Errorf("Envoy refused something: %+v %v", rs, refused)
	}
}

// countedOnce looks at the statistics by which canaries are compared: what goes out of the
// cluster is in one of them, once, however often it is tried, and also if its client has
// left by the last attempt.
func countedOnce(t *testing.T, e *envoy, wall firewall, f Form) {
	t.Helper()
	wall.put("drop")
	c, err := dialFrom("10.1.0.2", fmt.Sprint("192.0.2.9:", PortOutbound))
	if err != nil {
		t.Fatal(err)
	}
	// Its first attempt may be over by the time that nft has told of it.
	eventually(t, "it is being connected", func() bool { return wall.attempts() >= 1 })
	c.Close()
	connected := map[Form]int{OldestForm: 1, formAgain: 2}[f]
	for stat, want := range map[string]int{"upstream_rq_total": connected, "upstream_cx_connect_attempts_exceeded": 3} {
		eventually(t, fmt.Sprintf("%s is %d", stat, want), func() bool { return e.count(`cluster\.passthrough\.`+stat) == want })
	}
}

// A peer doesn't say how often its CONNECT is tried.
func TestPeersDontSayHowOften(t *testing.T) {
	for _, version := range dist.Versions() {
		t.Run(version, func(t *testing.T) {
			enterNetns(t)
			_, server, _ := envoyStore(t)
			ca := newAuthority(t)
			startEnvoyEdited(t, version, 1, server, ca, editing(toApps))
			if err := server.WaitServed(t.Context(), testProxy.Key(), "uid-api-0"); err != nil {
				t.Fatal(err)
			}
			wall := firewall{t}
			wall.put(refuse(4))
			got := early(t, ca, ca.certificate(identity("web").String()), http.Header{
				"X-Envoy-Max-Retries": {"50"}, "X-Envoy-Retry-On": {"connect-failure,5xx,reset"}, "X-Envoy-Internal": {"true"}, "X-Forwarded-For": {"10.0.0.1"},
			})
			if n := wall.attempts(); got != ended || n != localAttempts {
				t.Errorf("it saw %q after %d attempts; want %d", got, n, localAttempts)
			}
		})
	}
}
