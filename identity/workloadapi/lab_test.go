package workloadapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/identity/attest"
	"github.com/bulkhead-mesh/bulkhead/model"
)

const (
	trustDomain = "example.org"
	patience    = time.Minute
	// Real UIDs, as the cgroups have them.
	uidWeb1 = "0a9cb2b6-5a1f-4c0e-8d3e-3f4f0f1a2b31"
	uidWeb2 = "0a9cb2b6-5a1f-4c0e-8d3e-3f4f0f1a2b32"
	uidDB   = "11111111-2222-3333-4444-555555555555"
	uidPass = "99999999-2222-3333-4444-555555555555" // no pod of the mesh
)

func podOf(uid, namespace, account string) identity.Pod {
	return identity.Pod{UID: uid, Namespace: namespace, Name: "pod-" + uid[:8], Tenant: model.NamespaceTenant(namespace),
		Identity: model.Identity{TrustDomain: trustDomain, Namespace: namespace, ServiceAccount: account}}
}

var (
	web1 = podOf(uidWeb1, "team-a", "web")
	web2 = podOf(uidWeb2, "team-a", "web")
	db   = podOf(uidDB, "team-b", "db")
)

// operator signs with real authorities; it counts and can refuse.
type operator struct {
	x509 *identity.Authority
	ttl  time.Duration

	mu     sync.Mutex
	jwts   *identity.JWTAuthority
	asked  []string // UIDs, for tokens
	refuse error
}

func (o *operator) Sign(_ context.Context, csr []byte, pod identity.Pod) ([][]byte, error) {
	o.mu.Lock()
	a := o.x509
	o.mu.Unlock()
	return a.Sign(csr, pod.Identity, o.ttl, time.Now())
}

func (o *operator) SignJWT(_ context.Context, pod identity.Pod, audiences []string) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asked = append(o.asked, pod.UID)
	if o.refuse != nil {
		return "", o.refuse
	}
	token, _, err := o.jwts.Sign(pod.Identity, audiences, 5*time.Minute, time.Now())
	return token, err
}

func (o *operator) change(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f()
}

// node serves the API to pods that are processes in cgroups as a kubelet makes
// them, with a network of their own.
type node struct {
	*Server
	t        *testing.T
	dir      string
	cgroup   string // of all pods, as a file
	operator *operator
	store    *identity.Store
	log      *safeBuffer
	netns    sync.Map // of pods by UID
	stop     func()
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newNode(t *testing.T, pods ...identity.Pod) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("makes cgroups and namespaces, needs root: make test-kernel")
	}
	n := &node{t: t, dir: t.TempDir(), log: &safeBuffer{}, operator: &operator{ttl: time.Hour,
		x509: must[*identity.Authority](t)(identity.NewAuthority(trustDomain, time.Now())),
		jwts: must[*identity.JWTAuthority](t)(identity.NewJWTAuthority(time.Now()))}}
	check(t, os.Chmod(filepath.Dir(n.dir), 0o755)) // for callers that aren't root
	root := fmt.Sprintf("/bhtest-workloadapi-%d", os.Getpid())
	n.cgroup = filepath.Join(cgroupMount(t), root, "kubepods")
	check(t, os.MkdirAll(n.cgroup, 0o755))
	t.Cleanup(func() { removeCgroup(t, filepath.Dir(n.cgroup)) })
	keys := filepath.Join(n.dir, "keys")
	t.Cleanup(func() { check(t, identity.Uninstall(keys)) })
	n.store = must[*identity.Store](t)(identity.OpenStore(identity.StoreOptions{Dir: keys, Signer: n.operator, Log: slog.New(slog.NewTextHandler(n.log, nil))}))
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- n.store.Run(ctx) }()
	t.Cleanup(func() { cancel(); check(t, <-ran) })
	n.store.SetPods(pods)
	check(t, n.store.SetBundle(trustDomain, n.operator.x509.Roots()))
	n.start(root + "/kubepods")
	t.Cleanup(func() {
		n.stop()
		if t.Failed() {
			t.Log(n.log.String())
		}
	})
	return n
}

// start serves as a new agent does.
func (n *node) start(pods string) {
	n.t.Helper()
	where := must[attest.PodCgroups](n.t)(attest.NewPodCgroups(pods))
	var err error
	n.Server, err = New(Options{Socket: n.socket(), Identities: n.store, Signer: n.operator, Pods: where, Log: slog.New(slog.NewTextHandler(n.log, nil)),
		Netns: func(uid string) string {
			if path, ok := n.netns.Load(uid); ok {
				return path.(string)
			}
			return ""
		}})
	check(n.t, err)
	n.publish()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	server := n.Server
	go func() { served <- server.Serve(ctx) }()
	n.stop = sync.OnceFunc(func() { cancel(); check(n.t, <-served) })
}

// publish gives the node the keys of JWT-SVIDs as they are.
func (n *node) publish() {
	n.t.Helper()
	check(n.t, n.SetBundle(trustDomain, must[[]byte](n.t)(n.operator.x509.BundleDocument(n.operator.jwts))))
}

// root is the cgroup of all pods as processes have it.
func (n *node) root() string { return strings.TrimPrefix(n.cgroup, cgroupMount(n.t)) }

func (n *node) socket() string { return filepath.Join(n.dir, "workload-api", "socket") }

// cgroupMount is where cgroups of version 2 are: a process can be born in one.
func cgroupMount(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Fatal("no cgroups of version 2 on this machine")
	return ""
}

func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	var dirs []string
	check(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	}))
	for i := len(dirs) - 1; i >= 0; i-- {
		deadline := time.Now().Add(patience) // for processes that were killed
		for {
			err := os.Remove(dirs[i])
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Error(err)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// place says where a process runs. The zero value is the node itself.
type place struct {
	cgroup string // below the cgroup of all pods
	// nodeNetwork: not in a network of its own.
	nodeNetwork bool
	// cgroupNamespace: its own cgroup is its root.
	cgroupNamespace bool
	uid             uint32
	files           []*os.File
}

func inPod(p identity.Pod) place { return place{cgroup: "burstable/pod" + p.UID + "/c1"} }

// process is a program of the test's in a place.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	err *safeBuffer
}

// run starts the test's own program in a role; see roles_test.go.
func (n *node) run(where place, role string, args ...string) *process {
	n.t.Helper()
	return n.exec(where, exec.Command("/proc/self/exe", args...), roleVariable+"="+role)
}

func (n *node) exec(where place, cmd *exec.Cmd, env ...string) *process {
	t := n.t
	t.Helper()
	p := &process{t: t, cmd: cmd, err: &safeBuffer{}}
	cmd.Env = append(append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+n.socket()), env...)
	cmd.Stderr, cmd.ExtraFiles = p.err, where.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if !where.nodeNetwork {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	if where.cgroupNamespace {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWCGROUP
	}
	if where.uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: where.uid, Gid: where.uid}
	}
	if where.cgroup != "" {
		dir := filepath.Join(n.cgroup, where.cgroup)
		check(t, os.MkdirAll(dir, 0o755))
		f := must[*os.File](t)(os.Open(dir))
		defer f.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
	p.in = must[io.WriteCloser](t)(cmd.StdinPipe())
	p.out = bufio.NewScanner(must[io.ReadCloser](t)(cmd.StdoutPipe()))
	p.out.Buffer(nil, 1<<20)
	check(t, cmd.Start())
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

func (p *process) netns() string { return "/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/ns/net" }

// next is the next line of its output.
func next[T any](p *process) (v T) {
	p.t.Helper()
	timer := time.AfterFunc(patience, func() { p.cmd.Process.Kill() })
	defer timer.Stop()
	if !p.out.Scan() {
		p.t.Fatalf("%v: no more output: %s", p.cmd.Args, p.err)
	}
	if err := json.Unmarshal(p.out.Bytes(), &v); err != nil {
		p.t.Fatalf("%v: %q: %v", p.cmd.Args, p.out.Text(), err)
	}
	return v
}

// until skips output until ok.
func until[T any](p *process, what string, ok func(T) bool) T {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		v := next[T](p)
		if ok(v) {
			return v
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waited for %s, last was %+v", what, v)
		}
	}
}

// fetch runs a client to its end.
func (n *node) fetch(where place) fetched {
	n.t.Helper()
	p := n.run(where, "fetch")
	defer p.kill()
	return next[fetched](p)
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func wantCode(t *testing.T, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, "code = "+want) {
		t.Errorf("%s: %q, want %s", what, got, want)
	}
}

var errNotYet = errors.New("not yet")
