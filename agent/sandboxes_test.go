package agent

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestSandboxes(t *testing.T) {
	dir := t.TempDir()
	s, err := openSandboxes(dir, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	old := sandboxRecord{ContainerID: "c1", UID: "u1", Namespace: "n", Name: "p", Ifindex: 4, Ifname: "veth1", MTU: 1500,
		IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}
	newer := old
	newer.ContainerID, newer.Ifindex = "c2", 5
	for _, r := range []sandboxRecord{old, newer} {
		if err := s.put(r); err != nil {
			t.Fatal(err)
		}
	}
	// DEL of the old sandbox comes after ADD of the new one.
	s.dropContainers(func(id string) bool { return id == "c1" })
	if got, ok := s.get("u1"); !ok || !reflect.DeepEqual(got, newer) {
		t.Errorf("after DEL of the old sandbox the pod's is %+v, %v", got, ok)
	}
	if uid := s.at(netip.MustParseAddr("10.0.0.1")); uid != "u1" {
		t.Errorf("its address is pod %q's", uid)
	}
	if uid := s.at(netip.MustParseAddr("10.0.0.2")); uid != "" {
		t.Errorf("an address that nobody has is pod %q's", uid)
	}
	// An address that two have, one of which is going, is told to be nobody's.
	if err := s.put(sandboxRecord{UID: "u9", IPs: old.IPs}); err != nil {
		t.Fatal(err)
	}
	if uid := s.at(netip.MustParseAddr("10.0.0.1")); uid != "" {
		t.Errorf("an address that two have is pod %q's", uid)
	}
	s.drop("u9")
	// The next agent knows it, and throws away what was half-written.
	if err := os.WriteFile(filepath.Join(dir, "u2.json"), []byte(`{"uid":"u`), 0o600); err != nil {
		t.Fatal(err)
	}
	next, err := openSandboxes(dir, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := next.get("u1"); !ok || !reflect.DeepEqual(got, newer) {
		t.Errorf("after a restart the sandbox is %+v, %v", got, ok)
	}
	if uids := next.uids(); len(uids) != 1 {
		t.Errorf("after a restart there are %v", uids)
	}
	next.dropContainers(func(id string) bool { return id == "c2" })
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	for _, uid := range []string{"", "../x", "a/b"} {
		if err := s.put(sandboxRecord{UID: uid}); err == nil {
			t.Errorf("UID %q was taken", uid)
		}
	}
}

func TestMembership(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cni", "membership.json")
	m := &membership{file: file}
	if _, known := m.has("a"); known {
		t.Error("known before anything was said")
	}
	if err := m.set([]byte(`{"trustDomain":"cluster.local","namespaces":["a"]}`)); err != nil {
		t.Fatal(err)
	}
	if err := m.set([]byte(`nonsense`)); err == nil {
		t.Error("nonsense was taken")
	}
	next := &membership{file: file}
	if err := next.load(); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*membership{m, next} {
		if member, known := m.has("a"); !member || !known {
			t.Errorf("a: %v, %v", member, known)
		}
		if member, _ := m.has("b"); member {
			t.Error("b is a member")
		}
	}
}
