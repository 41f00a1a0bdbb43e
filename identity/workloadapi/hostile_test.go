package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/attest"
)

func (n *node) wantRefused(what string, where place) {
	n.t.Helper()
	f := n.fetch(where)
	if f.ID != "" || f.Token != "" || f.Bundles != 0 {
		n.t.Errorf("%s got %+v", what, f)
	}
	wantCode(n.t, what, f.X509Error, "PermissionDenied")
	wantCode(n.t, what, f.JWTError, "PermissionDenied")
}

func TestCallersThatAreNoPodOfTheMeshAreRefused(t *testing.T) {
	n := newNode(t, web1, db)
	n.wantRefused("a process of the node", place{})
	n.wantRefused("a process of the node in the node's network", place{nodeNetwork: true})
	n.wantRefused("a pod that isn't in the mesh", inPod(podOf(uidPass, "other", "x")))
	n.wantRefused("a process in all pods' cgroup", place{cgroup: "burstable"})
	n.wantRefused("a pod's process in the node's network", place{cgroup: inPod(web1).cgroup, nodeNetwork: true})
	n.wantRefused("a cgroup with a pod's UID and no prefix", place{cgroup: uidWeb1})
	n.wantRefused("a cgroup beside all pods' that is named like it", place{cgroup: "../kubepods2/pod" + uidWeb1 + "/c1"})
	if got := n.operator.asked; len(got) != 0 {
		t.Errorf("the operator was asked for tokens by %v", got)
	}
	if s := n.log.String(); !strings.Contains(s, "call refused") || !strings.Contains(s, uidPass) {
		t.Errorf("the log doesn't say who was refused: %s", s)
	}
}

// What a pod makes below its own cgroup, with cgroups of its own to write, is its.
func TestPodCannotForgeAnotherPodsCgroup(t *testing.T) {
	n := newNode(t, web1, db)
	own := inPod(web1).cgroup
	for name, where := range map[string]place{
		"another's UID below its own":       {cgroup: own + "/pod" + uidDB + "/c1"},
		"all of the path below its own":     {cgroup: own + "/kubepods/burstable/pod" + uidDB + "/c1"},
		"as its systemd would":              {cgroup: own + "/kubepods.slice/kubepods-pod" + strings.ReplaceAll(uidDB, "-", "_") + ".slice"},
		"and a cgroup namespace of its own": {cgroup: own + "/kubepods/burstable/pod" + uidDB + "/c1", cgroupNamespace: true},
	} {
		if f := n.fetch(where); f.ID != web1.Identity.String() || f.Subject != web1.Identity.String() {
			t.Errorf("%s: it has the identity of %q and %q: %s", name, f.ID, f.Subject, f.X509Error)
		}
	}
}

func TestProcessOutsideOfItsPodsNetworkIsRefused(t *testing.T) {
	n := newNode(t, web1, db)
	pod := n.run(inPod(web1), "idle")
	next[string](pod)
	n.netns.Store(uidWeb1, pod.netns())
	n.wantRefused("a process in another network", inPod(web1))
	if f := n.fetch(inPod(db)); f.ID != db.Identity.String() {
		t.Errorf("a pod whose network isn't known: %+v", f)
	}
	n.netns.Store(uidWeb1, "/proc/self/gone") // can't be told any more
	if f := n.fetch(inPod(web1)); f.ID != web1.Identity.String() {
		t.Errorf("a pod whose network's name is gone: %+v", f)
	}
}

// passed returns a connection that a process in a place made and handed on.
func (n *node) passed(where place) (*process, net.Conn) {
	t := n.t
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	theirs := os.NewFile(uintptr(fds[1]), "theirs")
	where.files = []*os.File{theirs}
	p := n.run(where, "connect")
	theirs.Close()
	next[string](p)
	buf := make([]byte, unix.CmsgSpace(4))
	_, size, _, _, err := unix.Recvmsg(fds[0], make([]byte, 1), buf, 0)
	check(t, err)
	unix.Close(fds[0])
	messages, err := unix.ParseSocketControlMessage(buf[:size])
	check(t, err)
	rights, err := unix.ParseUnixRights(&messages[0])
	check(t, err)
	f := os.NewFile(uintptr(rights[0]), "passed")
	defer f.Close()
	c, err := net.FileConn(f)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	return p, c
}

// client calls over one connection.
func client(t *testing.T, c net.Conn) workload.SpiffeWorkloadAPIClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///passed", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return c, nil }))
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	return workload.NewSpiffeWorkloadAPIClient(conn)
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, header, "true")
}

// A connection stays the process's that made it. Who hands it on hands on its own
// identity, as with a key; it ends with the process.
func TestConnectionThatIsPassedOn(t *testing.T) {
	n := newNode(t, web1, db)
	p, c := n.passed(inPod(web1))
	api := client(t, c)
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
	defer cancel()
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	check(t, err)
	r, err := stream.Recv()
	check(t, err)
	if got := r.GetSvids()[0].GetSpiffeId(); got != web1.Identity.String() {
		t.Errorf("the connection of %s is taken for %s's", web1.Name, got)
	}
	p.kill()
	if r, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream goes on after its process: %v, %v", r, err)
	}
	if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}}); err == nil {
		t.Error("a connection works after its process")
	}
	if len(n.operator.asked) > 0 {
		t.Error("a token was signed for a process that has exited")
	}
}

// A pid that is used again, by another pod's process, makes it nobody's: of a
// connection that wasn't accepted yet,
func TestPidThatIsUsedAgainBeforeTheConnectionIsAccepted(t *testing.T) {
	n := newNode(t, web1, db)
	n.stop() // so that the connection waits to be accepted
	l, err := listen(n.socket())
	check(t, err)
	p, c := n.passed(inPod(web1))
	p.kill()
	n.withPid(p.cmd.Process.Pid, inPod(db))
	n.Server, err = New(n.o)
	check(t, err)
	n.publish()
	server := n.Server
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- server.serve(ctx, l) }()
	defer func() { cancel(); check(t, <-served) }()
	stream, err := client(t, c).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	if err == nil {
		var r *workload.X509SVIDResponse
		if r, err = stream.Recv(); err == nil {
			t.Fatalf("the connection of an exited process of %s is taken for %s's", web1.Name, r.GetSvids()[0].GetSpiffeId())
		}
	}
	// The one that has the pid now is itself.
	if f := n.fetch(inPod(db)); f.ID != db.Identity.String() {
		t.Errorf("%+v", f)
	}
}

// and of one that was.
func TestPidThatIsUsedAgainByAnother(t *testing.T) {
	n := newNode(t, web1, db)
	n.stop()
	l, err := listen(n.socket())
	check(t, err)
	defer l.Close()
	p, _ := n.passed(inPod(web1))
	c, err := l.AcceptUnix()
	check(t, err)
	defer c.Close()
	peer, err := attest.Peer(c)
	check(t, err)
	defer peer.Close()
	if got, err := peer.Pod(n.o.Pods); got != uidWeb1 || peer.PID != p.cmd.Process.Pid {
		t.Errorf("process %d of pod %q, %v", peer.PID, got, err)
	}
	p.kill()
	n.withPid(peer.PID, inPod(db))
	if got, err := peer.Pod(n.o.Pods); !errors.Is(err, attest.ErrExited) {
		t.Errorf("a process that has exited is pod %q's, %v", got, err)
	}
	if _, err := peer.NetworkNamespace(); !errors.Is(err, attest.ErrExited) {
		t.Errorf("a process that has exited has a network: %v", err)
	}
}

// withPid starts a process with a given pid: the kernel gives the one after the
// last. Others start processes too, so it is tried again.
func (n *node) withPid(pid int, where place) {
	n.t.Helper()
	for range 200 {
		check(n.t, os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, pid-1), 0))
		p := n.run(where, "idle")
		next[string](p)
		if p.cmd.Process.Pid == pid {
			return
		}
		p.kill()
	}
	n.t.Fatalf("pid %d couldn't be had again", pid)
}

func TestCallWithoutTheHeaderIsRefused(t *testing.T) {
	n := newNode(t, web1)
	_, c := n.passed(inPod(web1))
	api := client(t, c)
	for name, ctx := range map[string]context.Context{
		"none":  t.Context(),
		"false": metadata.AppendToOutgoingContext(t.Context(), header, "false"),
		"twice": withHeader(withHeader(t.Context())),
		"upper": metadata.AppendToOutgoingContext(t.Context(), header, "TRUE"),
	} {
		ctx, cancel := context.WithTimeout(ctx, patience)
		_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: unary %v", name, err)
		}
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: stream %v", name, err)
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
	defer cancel()
	if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"db"}}); err != nil {
		t.Errorf("with it: %v", err)
	}
	if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "db", Svid: strings.Repeat("a", maxRequest)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request of more than %d bytes: %v", maxRequest, err)
	}
}

func TestValidateRefusesWhatIsNotOurs(t *testing.T) {
	n := newNode(t, web1)
	_, c := n.passed(inPod(web1))
	api := client(t, c)
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), patience)
	defer cancel()
	foreign := must[*identity.JWTAuthority](t)(identity.NewJWTAuthority(time.Now()))
	sign := func(a *identity.JWTAuthority, domain string, now time.Time) string {
		t.Helper()
		id := db.Identity
		id.TrustDomain = domain
		token, _, err := a.Sign(id, []string{"web"}, time.Minute, now)
		check(t, err)
		return token
	}
	ours := sign(n.operator.jwts, trustDomain, time.Now())
	for name, c := range map[string]struct{ audience, token string }{
		"foreign authority": {"web", sign(foreign, trustDomain, time.Now())},
		"foreign domain":    {"web", sign(n.operator.jwts, "example.com", time.Now())},
		"expired":           {"web", sign(n.operator.jwts, trustDomain, time.Now().Add(-10*time.Minute))},
		"other audience":    {"db", ours},
		"no audience":       {"", ours},
		"no token":          {"web", ""},
		"cut":               {"web", ours[:len(ours)-4]},
		"no signature":      {"web", strings.Join(strings.Split(ours, ".")[:2], ".") + "."},
		"long":              {"web", strings.Repeat("a", maxToken+1)},
	} {
		if r, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: c.audience, Svid: c.token}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	r, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "web", Svid: ours})
	if err != nil || r.GetSpiffeId() != db.Identity.String() || r.GetClaims().GetFields()["sub"].GetStringValue() != db.Identity.String() {
		t.Errorf("a good one: %v, %v", r, err)
	}
	if err := n.SetBundle(trustDomain, []byte(`{"keys":[]}`)); err == nil {
		t.Error("a bundle without keys is taken")
	}
	if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "web", Svid: ours}); err != nil {
		t.Errorf("a bad bundle changed what verifies: %v", err)
	}
}

// A pod that takes all that it gets, and asks for more all the time, keeps neither
// another pod nor another user of its own pod's from being served.
func TestOnePodCannotStarveAnother(t *testing.T) {
	n := newNode(t, web1, db)
	alone := n.times(inPod(db), 5)
	hostile := inPod(web1)
	p := n.run(hostile, "hold")
	until(p, "refusals", func(refused int) bool { return refused > 100 })
	beside := n.times(inPod(db), 10)
	t.Logf("fetch of everything, with the process's start: alone %v, beside a hostile pod %v", alone, beside)
	n.limits.mu.Lock()
	held := *n.limits.pods[uidWeb1]
	if held.conns.all > connsPerPod || held.conns.by[0] > connsPerUID || held.calls.all > callsPerPod || held.calls.by[0] > callsPerUID {
		t.Errorf("the hostile pod has %+v", held)
	}
	n.limits.mu.Unlock()
	p.kill()
	eventually(t, "nothing of it to be left", func() error {
		n.limits.mu.Lock()
		defer n.limits.mu.Unlock()
		for pod, u := range n.limits.pods {
			if u.conns.all != 0 || u.calls.all != 0 || len(u.conns.by)+len(u.calls.by) != 0 {
				return fmt.Errorf("pod %q still has %+v", pod, u)
			}
		}
		return nil
	})
}

// times is how long fetches take.
func (n *node) times(where place, count int) (all []time.Duration) {
	n.t.Helper()
	for range count {
		started := time.Now()
		if f := n.fetch(where); f.ID == "" || f.Subject == "" {
			n.t.Fatalf("not served: %+v", f)
		}
		all = append(all, time.Since(started).Round(time.Millisecond))
	}
	slices.Sort(all)
	return all
}

func TestLimits(t *testing.T) {
	l := limits{pods: map[string]*usage{}}
	for range connsPerUID {
		if !l.connect("a", 1) {
			t.Fatal("fewer connections than a uid may have")
		}
	}
	if l.connect("a", 1) {
		t.Error("a uid has more connections than it may")
	}
	for uid := range uint32(connsPerPod - connsPerUID) {
		if !l.connect("a", 100+uid) {
			t.Fatal("another uid has none")
		}
	}
	if l.connect("a", 2) || !l.connect("b", 2) {
		t.Error("a pod has more connections than it may, or another has none")
	}
	var ends []func()
	for range callsPerUID {
		done, ok := l.call("b", 2)
		if !ok {
			t.Fatal("fewer calls than a uid may have")
		}
		ends = append(ends, done)
	}
	if _, ok := l.call("b", 2); ok {
		t.Error("a uid has more calls than it may")
	}
	for _, done := range ends {
		done()
	}
	begun := callsPerUID + 2
	for ; begun < 2*startsAtOnce; begun++ {
		done, ok := l.call("b", 2)
		if !ok {
			break
		}
		done()
	}
	if begun < startsAtOnce || begun > startsAtOnce+startsPerSecond {
		t.Errorf("%d calls were begun at once, want %d", begun, startsAtOnce)
	}
}
