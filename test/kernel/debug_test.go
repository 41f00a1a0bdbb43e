package kernel

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// Root of a node looks into the proxies there, which show everything but keys.
func TestDebug(t *testing.T) {
	l := lab.New(t)
	n := l.Node1
	// Of this connection, both proxies have certificates.
	flow{from: l.A1, to: l.B1}.check(t, 4)
	ask := func(args ...string) []byte {
		t.Helper()
		out, err := n.CLI(t.Context(), append([]string{"debug"}, args...)...)
		lab.Check(t, err)
		return out
	}
	t.Run("configuration without keys", func(t *testing.T) {
		traces := keyTraces(t, filepath.Join(n.Dir, "run", "keys"))
		for _, tenant := range []string{"team-a", "team-b"} {
			dump := ask("config", "--tenant", tenant)
			if !json.Valid(dump) {
				t.Errorf("no JSON: %.200s", dump)
			}
			id := l.A1.Identity.String()
			if tenant == "team-b" {
				id = l.B1.Identity.String()
			}
			// That there is a secret which could show its key.
			for _, want := range []string{id, base64.StdEncoding.EncodeToString([]byte("[redacted]"))} {
				if !bytes.Contains(dump, []byte(want)) {
					t.Errorf("the configuration of %s lacks %s", tenant, want)
				}
			}
			for _, trace := range traces {
				if bytes.Contains(dump, []byte(trace)) {
					t.Errorf("the configuration of %s holds a key", tenant)
				}
			}
		}
		part := ask("config", "--tenant", "team-a", "--filter", "dynamic_listeners")
		if !bytes.Contains(part, []byte(`"outbound"`)) || bytes.Contains(part, []byte("BootstrapConfigDump")) {
			t.Errorf("a part of the configuration is %.200s", part)
		}
	})
	t.Run("stats", func(t *testing.T) {
		if out := ask("stats", "--tenant", "team-a", "--filter", "^server.live$"); string(out) != "server.live: 1\n" {
			t.Errorf("%q", out)
		}
	})
	t.Run("heap profile", func(t *testing.T) {
		if len(ask("heap", "--tenant", "team-a")) == 0 {
			t.Error("it is empty")
		}
	})
	t.Run("log level", func(t *testing.T) {
		ask("loglevel", "--tenant", "team-a", "--logger", "upstream", "--level", "debug")
		if out := ask("loglevel", "--tenant", "team-a"); !bytes.Contains(out, []byte("upstream: debug")) || !bytes.Contains(out, []byte("admin: warning")) {
			t.Errorf("%s", out)
		}
		if out := ask("loglevel", "--tenant", "team-b"); bytes.Contains(out, []byte("debug")) {
			t.Errorf("the other tenant's: %s", out)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for want, args := range map[string][]string{
			"no such process runs": {"stats", "--tenant", "team-z"},
			"can't be asked for":   {"quitquitquit", "--tenant", "team-a"},
			"is none of trace":     {"loglevel", "--tenant", "team-a", "--level", "loud"},
			"name the tenant":      {"stats"},
		} {
			if out, err := n.CLI(t.Context(), append([]string{"debug"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v %.100s; want %s", args, err, out, want)
			}
		}
	})
}

// keyTraces are parts of all private keys below a folder, as text shows them: the
// lines of PEM, and base64 at any offset of the PEM and of what is in it.
func keyTraces(t *testing.T, dir string) (traces []string) {
	t.Helper()
	keys := 0
	lab.Check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		for rest := b; err == nil; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			if !strings.Contains(block.Type, "PRIVATE KEY") {
				continue
			}
			keys++
			text := pem.EncodeToMemory(block)
			for line := range strings.Lines(string(text)) {
				if !strings.Contains(line, "-----") {
					traces = append(traces, strings.TrimSpace(line))
				}
			}
			for _, data := range [][]byte{text, block.Bytes} {
				for offset := range 3 {
					// Only what the bytes around it don't change, of the second half: the
					// first says what kind of key it is.
					half := data[len(data)/6*3+offset:]
					traces = append(traces, base64.StdEncoding.EncodeToString(half[:24]))
				}
			}
		}
		return err
	}))
	if keys < 3 {
		t.Fatalf("%d keys in %s", keys, dir)
	}
	return traces
}

// Only root can ask an agent.
func TestControlSocketIsRootsAlone(t *testing.T) {
	l := lab.New(t)
	dir := l.Node1.Isolation().RunDir
	own := agent.Options{RunDir: dir}
	everybodys, err := net.Listen("unix", filepath.Join(dir, "everybody.sock"))
	lab.Check(t, err)
	defer everybodys.Close()
	lab.Check(t, os.Chmod(filepath.Join(dir, "everybody.sock"), 0o666))
	lab.Check(t, os.Chmod(dir, 0o755)) // as a kubelet makes it
	uid := l.Node1.Running("team-a").UID
	for _, c := range []struct {
		uid    int
		socket string
		want   error
	}{
		{0, "agent.sock", nil}, {uid, "everybody.sock", nil},
		{uid, "agent.sock", unix.EACCES}, {65534, "agent.sock", unix.EACCES},
	} {
		if err := connectAsUser(dir, c.socket, c.uid); err != c.want {
			t.Errorf("uid %d, %s: %v, want %v", c.uid, c.socket, err, c.want)
		}
	}
	if info, err := os.Stat(own.ControlSocket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// connectAsUser connects in a thread of its own, which ends with it. The folder is
// entered before, since the test's are root's.
func connectAsUser(dir, socket string, uid int) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Chdir(dir); err != nil {
				return err
			}
			// Of this thread alone, unlike syscall.Setresuid.
			if _, _, errno := syscall.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				return errno
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
		}()
	}()
	return <-result
}
