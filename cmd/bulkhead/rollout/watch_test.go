package rollout

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/live"
)

// hurried is for tests: as in life, but for how long it takes.
var hurried = live.Pace{Every: 10 * time.Millisecond, Most: 50 * time.Millisecond, Patience: 3 * time.Second}

const patience = time.Minute // a loaded machine's

// lines are what is written, by several at once.
type lines struct {
	mu  sync.Mutex
	all bytes.Buffer
	// wants and seen: what is waited for.
	want string
	seen chan struct{}
	once sync.Once
}

func waitingFor(want string) *lines { return &lines{want: want, seen: make(chan struct{})} }

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.all.Write(b)
	if l.want != "" && strings.Contains(l.all.String(), l.want) {
		l.once.Do(func() { close(l.seen) })
	}
	return n, err
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

func (l *lines) wait(t *testing.T) {
	t.Helper()
	select {
	case <-l.seen:
	case <-time.After(patience):
		t.Fatalf("no %q in\n%s", l.want, l)
	}
}

// ended waits for the end of a view.
func ended(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatal("it doesn't end")
		return nil
	}
}

// A live view tells each change once, stays with its rollout, and ends with it.
func TestWatch(t *testing.T) {
	r := rollout("now", time.Hour, v1alpha1.RolloutProgressing)
	c := server(t, r)
	out, problems := waitingFor("Progressing"), &lines{}
	done := make(chan error, 1)
	go func() { done <- watch(t.Context(), c, "", "", hurried, out, problems) }()
	out.wait(t)
	// Another one begins before anybody has looked.
	if err := c.Create(t.Context(), rollout("a-later-one", time.Minute, v1alpha1.RolloutProgressing)); err != nil {
		t.Fatal(err)
	}
	r.Status.Phase = v1alpha1.RolloutSucceeded
	if err := c.Update(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := ended(t, done); err != nil || strings.Count(out.String(), "Rollout:") != 2 || !strings.Contains(out.String(), "Succeeded") || strings.Contains(out.String(), "a-later-one") {
		t.Errorf("%v:\n%s", err, out)
	}
	if problems.String() != "" {
		t.Errorf("problems: %s", problems)
	}
}

// failing is an API server that has a rollout, and fails as it is told.
type failing struct {
	mu      sync.Mutex
	rollout *v1alpha1.ProxyRollout // nil is none
	// fails are how the next requests do, one each.
	fails []http.HandlerFunc
}

func (f *failing) set(r *v1alpha1.ProxyRollout, fails ...http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rollout, f.fails = r, fails
}

func (f *failing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	var fail http.HandlerFunc
	if len(f.fails) > 0 {
		fail, f.fails = f.fails[0], f.fails[1:]
	}
	version := metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String()}
	var list any
	switch {
	case strings.HasSuffix(r.URL.Path, "/proxyrollouts"):
		version.Kind = "ProxyRolloutList"
		rollouts := v1alpha1.ProxyRolloutList{TypeMeta: version}
		if f.rollout != nil {
			rollouts.Items = append(rollouts.Items, *f.rollout)
		}
		list = rollouts
	case strings.HasSuffix(r.URL.Path, "/tenantproxies"):
		version.Kind = "TenantProxyList"
		list = v1alpha1.TenantProxyList{TypeMeta: version}
	case strings.HasSuffix(r.URL.Path, "/nodeproxies"):
		version.Kind = "NodeProxyList"
		list = v1alpha1.NodeProxyList{TypeMeta: version}
	}
	f.mu.Unlock()
	if fail != nil {
		fail(w, r)
		return
	}
	answer(w, http.StatusOK, list)
}

func answer(w http.ResponseWriter, code int, object any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(object) // a client that has gone
}

func overloaded(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusServiceUnavailable, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
		Message: "etcd is away", Reason: metav1.StatusReasonServiceUnavailable, Code: http.StatusServiceUnavailable})
}

func forbidden(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusForbidden, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure,
		Message: "the authorizer is away", Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden})
}

// cut ends the connection without an answer.
func cut(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// silent never answers.
func silent(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func (f *failing) client(t *testing.T) client.Client {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	mapper := meta.NewDefaultRESTMapper(nil)
	for kind, scope := range map[string]meta.RESTScope{"ProxyRollout": meta.RESTScopeRoot, "NodeProxy": meta.RESTScopeRoot, "TenantProxy": meta.RESTScopeNamespace} {
		mapper.Add(v1alpha1.GroupVersion.WithKind(kind), scope)
	}
	c, err := client.New(&rest.Config{Host: s.URL, QPS: -1}, client.Options{Scheme: scheme, Mapper: mapper})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A live view outlives an API server that fails in any way for a while, and says so.
func TestWatchGoesOn(t *testing.T) {
	f := &failing{rollout: rollout("now", time.Hour, v1alpha1.RolloutProgressing)}
	out, problems := waitingFor("Progressing"), waitingFor("the API server answers again")
	done := make(chan error, 1)
	c := f.client(t)
	go func() { done <- watch(t.Context(), c, "", "", hurried, out, problems) }()
	out.wait(t)
	f.set(rollout("now", time.Hour, v1alpha1.RolloutWaiting), overloaded, cut, silent, forbidden, overloaded)
	problems.wait(t)
	f.set(rollout("now", time.Hour, v1alpha1.RolloutSucceeded), overloaded)
	if err := ended(t, done); err != nil {
		t.Error(err)
	}
	for _, phase := range []string{"Progressing", "Waiting", "Succeeded"} {
		if n := strings.Count(out.String(), "Phase:    "+phase); n != 1 {
			t.Errorf("%s is told %d times in\n%s", phase, n, out)
		}
	}
	for _, says := range []string{"etcd is away", "deadline exceeded", "the authorizer is away", "looking again in "} {
		if !strings.Contains(problems.String(), says) {
			t.Errorf("no %q in\n%s", says, problems)
		}
	}
	if strings.Contains(out.String(), "away") {
		t.Errorf("problems in\n%s", out)
	}
}

// What can't be seen at all is an error at once, and so is the end of what was seen.
func TestWatchEnds(t *testing.T) {
	f := &failing{rollout: rollout("now", time.Hour, v1alpha1.RolloutProgressing), fails: []http.HandlerFunc{overloaded}}
	c := f.client(t)
	if err := watch(t.Context(), c, "", "", hurried, &lines{}, &lines{}); err == nil || !strings.Contains(err.Error(), "etcd is away") {
		t.Errorf("an API server that fails: %v", err)
	}
	if err := watch(t.Context(), c, "nobody", "", hurried, &lines{}, &lines{}); !errors.Is(err, ErrNone) {
		t.Errorf("one that isn't there: %v", err)
	}
	out := waitingFor("Progressing")
	done := make(chan error, 1)
	go func() { done <- watch(t.Context(), c, "", "", hurried, out, &lines{}) }()
	out.wait(t)
	f.set(nil)
	if err := ended(t, done); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "now") {
		t.Errorf("one that is deleted: %v", err)
	}
}
