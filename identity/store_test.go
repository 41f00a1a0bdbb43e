package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-mesh/bulkhead/model"
)

var (
	teamA = model.NamespaceTenant("team-a")
	teamB = model.NamespaceTenant("team-b")
)

func pod(uid string, id model.Identity) Pod {
	return Pod{UID: uid, Namespace: id.Namespace, Name: "pod-" + uid, Identity: id, Tenant: model.NamespaceTenant(id.Namespace)}
}

// authoritySigner is an operator without a network.
type authoritySigner struct {
	authority *Authority
	ttl       time.Duration
	mu        sync.Mutex
	refuse    func(Pod) error
	asked     []string // UIDs
	times     []time.Time
	hold      chan struct{} // if not nil, calls wait for it
}

func (s *authoritySigner) Sign(ctx context.Context, csr []byte, p Pod) ([][]byte, error) {
	s.mu.Lock()
	s.asked, s.times = append(s.asked, p.UID), append(s.times, time.Now())
	refuse, hold := s.refuse, s.hold
	s.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	if refuse != nil {
		if err := refuse(p); err != nil {
			return nil, err
		}
	}
	return s.authority.Sign(csr, p.Identity, s.ttl, time.Now())
}

func (s *authoritySigner) set(refuse func(Pod) error) {
	s.mu.Lock()
	s.refuse = refuse
	s.mu.Unlock()
}

func (s *authoritySigner) calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// node is a Store that runs, on a directory that stays when it stops.
type node struct {
	*Store
	t      *testing.T
	dir    string
	log    *bytes.Buffer
	signer *authoritySigner
	stop   func()
}

func keyDir(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("mounting a tmpfs needs root: make test-kernel")
	}
	dir := filepath.Join(t.TempDir(), "keys")
	t.Cleanup(func() {
		if err := Uninstall(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func newNode(t *testing.T, dir string) *node {
	t.Helper()
	return &node{t: t, dir: dir, log: &bytes.Buffer{}, signer: &authoritySigner{
		authority: must[*Authority](t)(NewAuthority("cluster.local", time.Now())), ttl: time.Hour,
	}}
}

// start opens the store and runs it.
func (n *node) start() {
	n.t.Helper()
	log := slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	n.Store = must[*Store](n.t)(OpenStore(StoreOptions{Dir: n.dir, Signer: n.signer, Log: log}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	}
}

func (n *node) bundle() {
	n.t.Helper()
	if err := n.SetBundle("cluster.local", n.signer.authority.Roots()); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) ready(uid string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := n.WaitReady(ctx, uid); err != nil {
		n.t.Fatal(err)
	}
}

// certificate is what an Envoy would make of a secret, with its version.
func (n *node) certificate(t model.Tenant, id model.Identity) (tls.Certificate, []byte, string) {
	n.t.Helper()
	r, denied := n.Secret(t, id.String())
	if r == nil {
		n.t.Fatalf("%s has no secret %s (denied: %v)", t, id, denied)
	}
	var s tlsv3.Secret
	if err := r.GetResource().UnmarshalTo(&s); err != nil || s.GetName() != id.String() || r.GetName() != id.String() {
		n.t.Fatalf("secret %q: %v", s.GetName(), err)
	}
	key := s.GetTlsCertificate().GetPrivateKey().GetInlineBytes()
	return must[tls.Certificate](n.t)(tls.X509KeyPair(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), key)), key, r.GetVersion()
}

func (n *node) refused(t model.Tenant, id model.Identity, wantDenied bool) {
	n.t.Helper()
	if r, denied := n.Secret(t, id.String()); r != nil || denied != wantDenied {
		n.t.Errorf("secret %s for %s: resource %v, denied %v, want none and %v", id, t, r != nil, denied, wantDenied)
	}
}

func (n *node) files() []string {
	n.t.Helper()
	var names []string
	for _, f := range must[[]fs.DirEntry](n.t)(os.ReadDir(n.dir)) {
		info := must[fs.FileInfo](n.t)(f.Info())
		if info.Mode() != 0o600 {
			n.t.Errorf("%s has mode %v", f.Name(), info.Mode())
		}
		names = append(names, f.Name())
	}
	slices.Sort(names)
	return names
}

func TestStoreLife(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		n.start()
		defer func() { n.stop() }()
		n.refused(teamA, reviews, false) // who knows which pods there are?
		n.SetPods([]Pod{pod("1", reviews), pod("2", reviews), pod("3", ratings), pod("4", other), {UID: "5"}})
		if r, denied := n.Secret(teamA, RootCA); r != nil || denied {
			t.Error("roots before there are any")
		}
		n.bundle()
		for _, uid := range []string{"1", "2", "3", "4"} {
			n.ready(uid)
		}
		if asked := n.signer.calls(); len(asked) != 3 {
			t.Errorf("%d signatures for three identities: %v", len(asked), asked)
		}
		if r, _ := n.Secret(teamB, RootCA); r == nil || r.GetName() != RootCA {
			t.Errorf("roots: %v", r)
		}

		// A tenant gets its own and nothing else.
		n.certificate(teamB, other)
		n.refused(teamB, reviews, true)
		n.refused(teamA, other, true)
		n.refused(model.Tenant{}, reviews, true)
		if r, denied := n.Secret(teamA, "none"); r != nil || !denied {
			t.Error("a name that is no SPIFFE ID")
		}

		// One that has left goes on to have it as long as it is told so.
		changed := n.Changed(teamB)
		n.SetFormers(map[model.Tenant][]model.Identity{teamB: {reviews}})
		select {
		case <-changed:
		default:
			t.Error("a former tenant isn't told")
		}
		n.certificate(teamB, reviews)
		n.refused(teamB, ratings, true)
		changed = n.Changed(teamB)
		n.SetFormers(nil)
		<-changed
		n.refused(teamB, reviews, true)

		// Private, and where it belongs.
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC || st.Flags&statfsWanted != statfsWanted {
			t.Errorf("key directory: type %x, flags %x, %v", st.Type, st.Flags, err)
		}
		if info := must[fs.FileInfo](t)(os.Stat(dir)); info.Mode().Perm() != 0o700 {
			t.Errorf("key directory: %v", info.Mode())
		}
		if want := []string{fileName(reviews), fileName(ratings), fileName(other)}; len(n.files()) != len(want) {
			t.Errorf("files %v, want %v", n.files(), want)
		}

		// Half of its life: 5 min before, 60 after it was signed, ±10 %.
		certificate, key, version := n.certificate(teamA, reviews)
		half := certificate.Leaf.NotAfter.Sub(certificate.Leaf.NotBefore) / 2
		keys := [][]byte{key}
		for range 3 {
			for {
				changed := n.Changed(teamA)
				if _, _, v := n.certificate(teamA, reviews); v != version {
					break
				}
				<-changed
			}
			at := time.Since(certificate.Leaf.NotBefore)
			if at < half*9/10-time.Second || at > half*11/10+time.Second {
				t.Errorf("renewed %v after its start, half of its life is %v", at, half)
			}
			certificate, key, version = n.certificate(teamA, reviews)
			if slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) }) {
				t.Error("a key was used again")
			}
			keys = append(keys, key)
		}

		// Those who have come are known at once, and nothing else changes: not the tenant of
		// one that is known by another.
		moved := pod("3", ratings)
		moved.Tenant = teamB
		n.AddPods([]Pod{pod("6", late), moved, {UID: "7"}})
		n.ready("6")
		n.certificate(teamA, late)
		n.certificate(teamA, ratings)
		n.refused(teamB, ratings, true)
		n.SetPods([]Pod{pod("1", reviews), pod("2", reviews), pod("3", ratings), pod("4", other)})
		n.refused(teamA, late, true)

		// The last pod takes the key along, not the last but one.
		n.SetPods([]Pod{pod("2", reviews), pod("4", other)})
		n.certificate(teamA, reviews)
		changed = n.Changed(teamA)
		n.SetPods([]Pod{pod("4", other)})
		<-changed
		n.refused(teamA, reviews, true)
		if files := n.files(); !slices.Equal(files, []string{fileName(other)}) {
			t.Errorf("left: %v", files)
		}
		if err := n.WaitReady(t.Context(), "2"); !errors.Is(err, ErrUnknownPod) {
			t.Errorf("waiting for a pod that went: %v", err)
		}
		synctest.Wait() // nobody writes to the log or the store now
		if len(n.entries) != 1 || len(n.pods) != 1 {
			t.Errorf("%d identities and %d pods are remembered", len(n.entries), len(n.pods))
		}
		for _, k := range keys {
			if secret := bytes.Split(k, []byte("\n"))[1]; bytes.Contains(n.log.Bytes(), secret) {
				t.Error("a key is in the log")
			}
		}
		if n.log.Len() == 0 || strings.Contains(n.log.String(), pemKey) {
			t.Errorf("log: %s", n.log)
		}
		if left := must[[]string](t)(filepath.Glob(filepath.Join(filepath.Dir(dir), "*"))); len(left) != 1 {
			t.Errorf("files outside of the key directory: %v", left)
		}
	})
}

func TestReopen(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		n.start()
		n.SetPods([]Pod{pod("1", reviews), pod("2", ratings)})
		n.bundle()
		n.ready("1")
		n.ready("2")
		_, key, version := n.certificate(teamA, reviews)
		n.stop()

		// As if it had been killed while writing, and by a stranger.
		left := filepath.Join(dir, fileName(reviews)+tempSuffix)
		strange := filepath.Join(dir, fileName(other))
		data := must[[]byte](t)(os.ReadFile(filepath.Join(dir, fileName(reviews))))
		if err := errors.Join(os.WriteFile(left, data[:100], 0o600), os.WriteFile(strange, data, 0o600)); err != nil {
			t.Fatal(err)
		}
		n.start()
		n.bundle()
		n.refused(teamA, reviews, false)
		n.SetPods([]Pod{pod("3", reviews)}) // another pod; ratings has gone meanwhile
		n.ready("3")
		if _, again, v := n.certificate(teamA, reviews); !bytes.Equal(again, key) || v != version {
			t.Error("another key after a restart")
		}
		synctest.Wait()
		if asked := n.signer.calls(); len(asked) != 2 {
			t.Errorf("signed again after a restart: %v", asked)
		}
		if files := n.files(); !slices.Equal(files, []string{fileName(reviews)}) {
			t.Errorf("left: %v", files)
		}

		// Other roots: what doesn't chain to them is replaced.
		n.signer.authority = must[*Authority](t)(NewAuthority("cluster.local", time.Now()))
		n.bundle()
		n.ready("3")
		if _, again, _ := n.certificate(teamA, reviews); bytes.Equal(again, key) {
			t.Error("the old certificate is still handed out")
		}
		n.stop()

		// An expired one, too, also on the way from the file.
		time.Sleep(2 * time.Hour)
		n.signer.set(func(Pod) error { return status.Error(codes.Unavailable, "operator is away") })
		n.start()
		defer func() { n.stop() }()
		n.bundle()
		n.SetPods([]Pod{pod("3", reviews)})
		n.refused(teamA, reviews, false)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.WaitReady(ctx, "3"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "operator is away") {
			t.Errorf("WaitReady: %v", err)
		}
	})
}

// Pods that are told of before it is known which there are have what was kept, too: an
// agent that starts doesn't have all identities of its node signed again.
func TestReopenForPodsThatCome(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		n.start()
		n.SetPods([]Pod{pod("1", reviews)})
		n.bundle()
		n.ready("1")
		_, key, version := n.certificate(teamA, reviews)
		n.stop()

		n.start()
		defer func() { n.stop() }()
		n.bundle()
		n.AddPods([]Pod{pod("1", reviews)})
		synctest.Wait() // Run has done what it finds to do
		if asked := n.signer.calls(); len(asked) != 1 {
			t.Errorf("signed again after a restart: %v", asked)
		}
		n.SetPods([]Pod{pod("1", reviews)})
		n.ready("1")
		if _, again, v := n.certificate(teamA, reviews); !bytes.Equal(again, key) || v != version {
			t.Error("another key after a restart")
		}
	})
}

func TestRetry(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		unavailable := status.Error(codes.Unavailable, "not visible yet")
		n.signer.set(func(Pod) error { return unavailable })
		n.start()
		defer func() { n.stop() }()
		n.bundle()
		n.SetPods([]Pod{pod("1", reviews)})
		time.Sleep(5 * time.Minute)
		n.signer.mu.Lock()
		times := slices.Clone(n.signer.times)
		n.signer.mu.Unlock()
		first, last := times[1].Sub(times[0]), times[len(times)-1].Sub(times[len(times)-2])
		if first > firstRetry*2 || last < lastRetry/2 || last > lastRetry*2 || len(times) < 20 || len(times) > 60 {
			t.Errorf("%d attempts in 5 minutes, first after %v, last after %v", len(times), first, last)
		}
		n.refused(teamA, reviews, false)
		n.signer.set(nil)
		n.ready("1")

		// One pod is denied, the other has it signed for both.
		denial := fmt.Errorf("call operator: %w", status.Error(codes.PermissionDenied, "finished"))
		deny := func(uids ...string) {
			n.signer.set(func(p Pod) error {
				if slices.Contains(uids, p.UID) {
					return denial
				}
				return nil
			})
		}
		deny("2", "4")
		n.SetPods([]Pod{pod("2", ratings), pod("3", ratings)})
		n.ready("2")
		if asked := n.signer.calls(); !slices.Equal(asked[len(asked)-2:], []string{"2", "3"}) {
			t.Errorf("asked for %v", asked)
		}
		n.SetPods([]Pod{pod("3", ratings), pod("4", other)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := n.WaitReady(ctx, "4")
		if !errors.Is(err, ErrDenied) || status.Code(err) != codes.PermissionDenied {
			t.Errorf("WaitReady: %v", err)
		}
		n.refused(teamB, other, true)
		// A denial may be lifted, and a new pod isn't held to it.
		n.SetPods([]Pod{pod("4", other), pod("5", other)})
		n.ready("5")
		n.ready("4")
		deny("6")
		n.SetPods([]Pod{pod("6", other)})
		n.certificate(teamB, other)
	})
}

// TestGoneWhileSigning: what comes back for an identity without pods is dropped.
func TestGoneWhileSigning(t *testing.T) {
	dir := keyDir(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, dir)
		n.signer.hold = make(chan struct{})
		n.start()
		defer func() { n.stop() }()
		n.bundle()
		n.SetPods([]Pod{pod("1", reviews)})
		synctest.Wait()
		n.SetPods(nil)
		close(n.signer.hold)
		synctest.Wait()
		if files := n.files(); len(files) != 0 || len(n.signer.calls()) != 1 {
			t.Errorf("%v after %d signatures", files, len(n.signer.calls()))
		}
		n.refused(teamA, reviews, true)

		// Signed for somebody else: not taken.
		n.Store.signer = swapped{n.signer}
		n.SetPods([]Pod{pod("2", reviews)})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.WaitReady(ctx, "2"); err == nil || !strings.Contains(err.Error(), "of another key") {
			t.Errorf("another's chain: %v", err)
		}
		if files := n.files(); len(files) != 0 {
			t.Errorf("files: %v", files)
		}
	})
}

type swapped struct{ *authoritySigner }

func (s swapped) Sign(_ context.Context, _ []byte, p Pod) ([][]byte, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	csr, err := NewCSR(key, p.Identity)
	if err != nil {
		return nil, err
	}
	return s.authority.Sign(csr, p.Identity, time.Hour, time.Now())
}

func TestOpenRefuses(t *testing.T) {
	dir := keyDir(t)
	o := StoreOptions{Dir: dir, Signer: &authoritySigner{}}
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(o); err == nil {
		t.Error("mounted over files")
	}
	if err := errors.Join(os.RemoveAll(dir), os.Symlink(t.TempDir(), dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(o); err == nil {
		t.Error("followed a link")
	}
	if err := errors.Join(os.Remove(dir), os.Mkdir(dir, 0o755), unix.Mount("test", dir, "tmpfs", 0, "mode=0777")); err != nil {
		t.Fatal(err)
	}
	s := must[*Store](t)(OpenStore(o)) // a tmpfs, but a loose one
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&statfsWanted != statfsWanted {
		t.Errorf("flags %x, %v", st.Flags, err)
	}
	if info := must[fs.FileInfo](t)(os.Stat(dir)); info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}
	if err := s.SetBundle("cluster.local", nil); err == nil {
		t.Error("took a bundle without roots")
	}
	for range 2 {
		if err := Uninstall(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Uninstall: %v", err)
		}
	}
}
