package chain

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var entry = Entry{Socket: "/run/bulkhead/cni.sock", Membership: "/var/lib/bulkhead/cni/membership.json", TimeoutSeconds: 30}

const entryJSON = `{"type":"bulkhead-cni","socket":"/run/bulkhead/cni.sock","membership":"/var/lib/bulkhead/cni/membership.json","timeoutSeconds":30}`

var conflists = map[string]string{
	"compact":       `{"cniVersion":"1.0.0","name":"lab","plugins":[{"type":"ptp","ipam":{"type":"host-local"}}]}`,
	"pretty":        "{\n  \"name\": \"k8s-pod-network\",\n  \"plugins\": [\n    {\n      \"type\": \"calico\"\n    },\n    {\"type\": \"portmap\", \"snat\": true}\n  ],\n  \"cniVersion\": \"0.3.1\"\n}\n",
	"plugins first": `{ "plugins" : [ {"type":"a"} , {"type":"b"}  ] ,"name":"x"}` + "\n\n",
	"nested":        `{"plugins":[{"type":"a","plugins":[{"type":"bulkhead-cni"}]}],"x":{"plugins":[]},"name":"é\u00e9]}"}`,
}

func TestChainedIsTakenOutByteIdentical(t *testing.T) {
	for name, in := range conflists {
		t.Run(name, func(t *testing.T) {
			out, err := Chained([]byte(in), entry)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(out), ","+entryJSON) {
				t.Errorf("entry isn't there: %s", out)
			}
			all, err := elements(out)
			if err != nil || all[len(all)-1].kind != Type {
				t.Errorf("plugins: %v, %v", all, err)
			}
			again, err := Chained(out, entry)
			if err != nil || string(again) != string(out) {
				t.Errorf("second time: %s, %v", again, err)
			}
			other := entry
			other.TimeoutSeconds = 5
			changed, err := Chained(out, other)
			if err != nil || strings.Count(string(changed), entryJSON[:10]) != strings.Count(string(out), entryJSON[:10]) || !strings.Contains(string(changed), `"timeoutSeconds":5}`) {
				t.Errorf("another entry: %s, %v", changed, err)
			}
			for _, x := range [][]byte{out, changed, []byte(in)} {
				if bare, err := Unchained(x); err != nil || string(bare) != in {
					t.Errorf("taken out:\n%s\n%v, want\n%s", bare, err, in)
				}
			}
		})
	}
}

func TestChainedMovesToTheEnd(t *testing.T) {
	in := `{"name":"x","plugins":[` + entryJSON + `, {"type":"a"},` + entryJSON + `,{"type":"b"}]}`
	out, err := Chained([]byte(in), entry)
	if want := `{"name":"x","plugins":[{"type":"a"},{"type":"b"},` + entryJSON + `]}`; err != nil || string(out) != want {
		t.Errorf("%s, %v\nwant %s", out, err, want)
	}
}

func TestChainedRefuses(t *testing.T) {
	for _, in := range []string{"", "[]", "{", `{"plugins":[]}`, `{"name":"x"}`, `{"plugins":{}}`, `{"plugins":[1]}`, `{"plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, `{"plugins":[{"type":"a"}]`} {
		if out, err := Chained([]byte(in), entry); err == nil {
			t.Errorf("%q became %q", in, out)
		}
	}
}

func FuzzChained(f *testing.F) {
	for _, c := range conflists {
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, in string) {
		all, err := elements([]byte(in))
		for _, e := range all {
			if e.kind == Type {
				return
			}
		}
		if err != nil {
			return
		}
		out, err := Chained([]byte(in), entry)
		if err != nil {
			return
		}
		if bare, err := Unchained(out); err != nil || string(bare) != in {
			t.Errorf("%q came back as %q, %v", in, bare, err)
		}
	})
}

func keeper(t *testing.T) (*Keeper, string) {
	d := t.TempDir()
	write(t, filepath.Join(d, "plugin"), "binary")
	if err := os.Mkdir(filepath.Join(d, "net.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	return New(Options{ConfDir: filepath.Join(d, "net.d"), BinDir: filepath.Join(d, "bin"), Binary: filepath.Join(d, "plugin"), Entry: entry, Interval: time.Hour}), d
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestKeeperConflist(t *testing.T) {
	k, d := keeper(t)
	if err := k.Ensure(); !errors.Is(err, ErrNoConfig) {
		t.Errorf("without a configuration: %v", err)
	}
	first, second := filepath.Join(d, "net.d", "10-first.conflist"), filepath.Join(d, "net.d", "20-second.conflist")
	write(t, first, conflists["pretty"])
	write(t, second, conflists["compact"])
	if err := k.Ensure(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(read(t, first), Type) || strings.Contains(read(t, second), Type) {
		t.Error("not chained in the first file alone")
	}
	if info, _ := os.Stat(first); info.Mode().Perm() != 0o644 {
		t.Errorf("mode became %o", info.Mode().Perm())
	}
	if info, err := os.Stat(filepath.Join(d, "bin", Type)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("binary: %v, %v", info, err)
	}
	if err := k.Remove(); err != nil {
		t.Fatal(err)
	}
	if read(t, first) != conflists["pretty"] || read(t, second) != conflists["compact"] {
		t.Error("files aren't as before")
	}
	if _, err := os.Stat(filepath.Join(d, "bin", Type)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("binary: %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Join(d, "net.d")); len(entries) != 2 {
		t.Errorf("left in the directory: %v", entries)
	}
}

func TestKeeperSingleConf(t *testing.T) {
	k, d := keeper(t)
	conf := filepath.Join(d, "net.d", "05-flannel.conf")
	write(t, conf, `{"cniVersion":"0.4.0","name":"cbr0","type":"flannel"}`)
	if err := k.Ensure(); err != nil {
		t.Fatal(err)
	}
	names, _ := k.configs()
	if names[0] != wrapper {
		t.Errorf("order: %v", names)
	}
	b := read(t, filepath.Join(d, "net.d", wrapper))
	all, err := elements([]byte(b))
	if err != nil || len(all) != 2 || all[0].kind != "flannel" || all[1].kind != Type {
		t.Errorf("%s: %v", b, err)
	}
	// The CNI is replaced by one with a conflist: ours goes.
	os.Remove(conf)
	write(t, filepath.Join(d, "net.d", "10-new.conflist"), conflists["compact"])
	if err := k.Ensure(); err != nil {
		t.Fatal(err)
	}
	if names, _ := k.configs(); len(names) != 1 {
		t.Errorf("left: %v", names)
	}
	write(t, conf, `{"cniVersion":"0.4.0","name":"cbr0","type":"flannel"}`)
	if err := errors.Join(k.Ensure(), k.Remove()); err != nil {
		t.Fatal(err)
	}
	if names, _ := k.configs(); len(names) != 2 {
		t.Errorf("after removal: %v", names)
	}
}

func TestKeeperPutsItBack(t *testing.T) {
	k, d := keeper(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(d, "net.d", "10-x.conflist")
	for _, content := range []string{conflists["compact"], conflists["pretty"], conflists["compact"]} {
		write(t, filepath.Join(d, "new"), content)
		if err := os.Rename(filepath.Join(d, "new"), path); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Minute); !strings.Contains(read(t, path), Type); time.Sleep(2 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("not chained again")
			}
		}
	}
}
