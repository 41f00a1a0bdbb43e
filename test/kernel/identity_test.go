package kernel

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

const echoPort = 9000

// echo sends back what comes over TCP to a port of a pod or a node.
func echo(t *testing.T, n *lab.Namespace, port int) {
	t.Helper()
	var listener net.Listener
	n.Do(t, func() {
		var err error
		listener, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		lab.Check(t, err)
	})
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// pairLoad has each client talk to its server: on a connection that stays, and on
// a new one each time.
type pairLoad struct {
	t    *testing.T
	stop func()
	wg   sync.WaitGroup

	mu       sync.Mutex
	requests int
	failures []string
}

func startPairs(t *testing.T, l *lab.Lab, pairs int, pause time.Duration) *pairLoad {
	stopped := make(chan struct{})
	p := &pairLoad{t: t, stop: sync.OnceFunc(func() { close(stopped) })}
	t.Cleanup(func() { p.stop(); p.wg.Wait() })
	clients, servers := map[string]*lab.Host{}, map[string]*lab.Host{}
	for _, h := range l.Pods {
		clients[h.Name], servers[h.Name] = h, h
	}
	for i := range pairs {
		c, s := clients[fmt.Sprint("c", i)], servers[fmt.Sprint("s", i)]
		echo(t, s.Namespace, echoPort)
		to := lab.At(s.V4, echoPort).String()
		dial := func() (conn net.Conn, err error) {
			done := make(chan struct{})
			c.Go(func() {
				defer close(done)
				conn, err = net.DialTimeout("tcp", to, lab.Patience)
			})
			<-done
			return conn, err
		}
		p.wg.Go(func() {
			time.Sleep(pause * time.Duration(i) / time.Duration(pairs)) // not all at once
			held, err := dial()
			if err != nil {
				p.note(fmt.Errorf("%s: %w", c.Name, err))
				return
			}
			defer held.Close()
			for {
				p.note(exchange(held))
				once, err := dial()
				if err == nil {
					err = exchange(once)
					once.Close()
				}
				p.note(err)
				select {
				case <-stopped:
					return
				case <-time.After(pause):
				}
			}
		})
	}
	return p
}

func exchange(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(lab.Patience)); err != nil {
		return err
	}
	sent := []byte("hello")
	if _, err := c.Write(sent); err != nil {
		return err
	}
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(sent, got) {
		return errors.New("another answer than was sent")
	}
	return nil
}

func (p *pairLoad) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests++
	if err != nil {
		p.failures = append(p.failures, time.Now().Format("15:04:05.000 ")+err.Error())
	}
}

func (p *pairLoad) end() {
	p.t.Helper()
	p.stop()
	p.wg.Wait()
	if len(p.failures) > 0 {
		p.t.Errorf("%d of %d requests failed, %q", len(p.failures), p.requests, p.failures[:min(len(p.failures), 10)])
	}
	p.t.Logf("%d requests, %d failed", p.requests, len(p.failures))
}

// serials are those that the servers' proxy on node2 saw of each client on connections
// that began since then: by their time, for the log is begun anew meanwhile.
func serials(t *testing.T, l *lab.Lab, since time.Time) map[string]map[string]bool {
	t.Helper()
	seen := map[string]map[string]bool{}
	for _, line := range l.Node2.AccessLog("team-b") {
		began, err := time.Parse(time.RFC3339, line["time"])
		lab.Check(t, err)
		if began.Before(since) {
			continue
		}
		if seen[line["peer"]] == nil {
			seen[line["peer"]] = map[string]bool{}
		}
		seen[line["peer"]][line["peer_serial"]] = true
	}
	return seen
}

// All identities get new certificates and then another root while they talk, and
// no request notices.
func TestRotationUnderLoad(t *testing.T) {
	const pairs = 100
	// Certificates live a minute and are renewed after 15 seconds.
	l := lab.NewWith(t, lab.Options{Pairs: pairs, Behind: identity.MinTTL - time.Minute, TunnelAge: 5 * time.Second})
	load := startPairs(t, l, pairs, time.Second)
	// all waits until the servers have seen other serials than those of before, of
	// all clients.
	all := func(what string, before map[string]map[string]bool, since time.Time) map[string]map[string]bool {
		t.Helper()
		var seen map[string]map[string]bool
		deadline := time.Now().Add(2 * time.Minute)
		for {
			seen = serials(t, l, since)
			fresh := 0
			for i := range pairs {
				id := fmt.Sprintf("spiffe://%s/ns/team-a/sa/client-%d", lab.TrustDomain, i)
				for serial := range seen[id] {
					if !before[id][serial] {
						fresh++
						break
					}
				}
			}
			if fresh == pairs {
				return seen
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: only %d of %d clients have been seen with a new serial", what, fresh, pairs)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	first := all("at the start", nil, time.Time{})
	second := all("after a renewal", first, time.Time{})
	renewed := time.Now()

	// The roots, by the state machine itself on a clock that is ahead.
	clock := time.Now()
	a := l.Authority
	old := a.Roots()[0]
	w := identity.Wanted{TTL: identity.MinTTL, Request: "test"}
	step := func(to identity.Phase) {
		t.Helper()
		for {
			next, change, err := a.Step(w, clock)
			lab.Check(t, err)
			if change == "" {
				t.Fatalf("nothing is due before phase %q", to)
			}
			t.Log(change)
			a = next
			if phase, _, _ := a.Rotation(); phase == to {
				break
			}
		}
		l.SetAuthority(a)
		for _, n := range []*lab.Node{l.Node1, l.Node2} {
			n.WritePlan()
			lab.Eventually(t, "the roots of "+n.Name, func() error {
				i, err := n.Inspect()
				if err == nil && i.TrustBundle != identity.BundleDigest(a.Roots()) {
					err = fmt.Errorf("it trusts %q", i.TrustBundle)
				}
				return err
			})
		}
	}
	step(identity.PhasePublishing)
	w.Acknowledged, clock = true, clock.Add(10*time.Minute)
	step(identity.PhaseRetiring)
	all("under the new root", second, renewed)
	// What the old one signed has ended by now: the last of it lived a minute.
	time.Sleep(time.Minute)
	clock = clock.Add(time.Hour)
	step(identity.PhaseStable)
	if roots := a.Roots(); len(roots) != 1 || bytes.Equal(roots[0], old) {
		t.Fatalf("%d roots", len(roots))
	}
	all("without the old root", serials(t, l, renewed), time.Now())
	load.end()
}

// The operator is away, the agent is started again, the proxy is killed: it serves
// again with what lies on the node.
func TestOperatorAway(t *testing.T) {
	l := lab.New(t)
	flow{from: l.A1, to: l.B2}.check(t, 4)
	flow{from: l.B2, to: l.A1}.check(t, 4)
	// What the proxies have is written down a moment after they took it.
	for file, names := range map[string][]string{
		filepath.Join(l.Node1.Dir, "lib", "lastgood", "team-a@*"): {"outbound", "pod|" + l.B2.V4.String()},
		filepath.Join(l.Node1.Dir, "lib", "lastgood", "team-b@*"): {"outbound"},
		filepath.Join(l.Node2.Dir, "lib", "lastgood", "team-a@*"): {"outbound"},
		filepath.Join(l.Node2.Dir, "lib", "lastgood", "team-b@*"): {"outbound", "pod|" + l.A1.V4.String()},
	} {
		lab.Eventually(t, file, func() error {
			found, err := filepath.Glob(file)
			if err != nil || len(found) != 1 {
				return fmt.Errorf("%q, %v", found, err)
			}
			b, err := os.ReadFile(found[0])
			for _, name := range names {
				if !bytes.Contains(b, []byte(name)) {
					return fmt.Errorf("it has no %s, %v", name, err)
				}
			}
			return err
		})
	}
	for _, n := range []*lab.Node{l.Node1, l.Node2} {
		n.StopOperator()
		n.Kill()
		n.Start()
		n.WaitReady()
		for _, tenant := range []string{"team-a", "team-b"} {
			pid := n.Running(tenant).PID
			lab.Check(t, unix.Kill(pid, unix.SIGKILL))
			lab.Eventually(t, "the proxy's return", func() error {
				b := n.Tenant(tenant)
				if !b.Ready || lab.First(b).PID == pid {
					return fmt.Errorf("%s, %+v", b.Reason, b.Generations)
				}
				return nil
			})
		}
	}
	flow{from: l.A1, to: l.B2}.check(t, 4)
	flow{from: l.B2, to: l.A1}.check(t, 4)
	keysStay(t, l.Node1)
	keysStay(t, l.Node2)
}

// keysStay checks that the keys of a node are in their directory and in no other file
// of the agent's and its proxies', last good configuration and logs among them.
func keysStay(t *testing.T, n *lab.Node) {
	t.Helper()
	directory := filepath.Join(n.Isolation().RunDir, "keys")
	files, err := filepath.Glob(filepath.Join(directory, "*.pem"))
	lab.Check(t, err)
	secrets := [][]byte{[]byte("PRIVATE KEY")}
	for _, file := range files {
		b, err := os.ReadFile(file)
		lab.Check(t, err)
		_, key, ok := bytes.Cut(b, []byte("-----BEGIN PRIVATE KEY-----\n"))
		if !ok {
			t.Fatalf("%s has no key", file)
		}
		block, _ := pem.Decode(append([]byte("-----BEGIN PRIVATE KEY-----\n"), key...))
		// In the text there is a line of 64 characters with the middle of the key in it.
		secrets = append(secrets, key[64+1:64+1+40], block.Bytes[len(block.Bytes)/2:len(block.Bytes)/2+20])
	}
	if len(files) < len(n.Pods)-1 {
		t.Fatalf("%s has the keys of %d identities", n.Name, len(files))
	}
	looked := 0
	lab.Check(t, filepath.WalkDir(n.Dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case path == directory, path == filepath.Join(n.Isolation().RunDir, "netns"), path == filepath.Join(n.Dir, "bpf"):
			return filepath.SkipDir
		case errors.Is(err, fs.ErrNotExist): // it has just gone
			return nil
		case err != nil || !d.Type().IsRegular():
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		looked++
		if bytes.HasPrefix(b, []byte("\x7fELF")) {
			return err // Envoy, which knows the words
		}
		for _, s := range secrets {
			if bytes.Contains(b, s) {
				t.Errorf("%s holds a key", path)
			}
		}
		return err
	}))
	if looked < 5 {
		t.Fatalf("%s has %d files: looking there proves nothing", n.Name, looked)
	}
}
