package workloadapi

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
	"github.com/bulkhead-mesh/bulkhead/identity"
)

// spiffePackage is the client of PyPI that is tried.
const spiffePackage = "spiffe==0.3.2"

// pythonPackages returns a folder with the client, which is fetched once.
func pythonPackages(t *testing.T) string {
	t.Helper()
	cache := must[string](t)(dist.CacheDir())
	dir := filepath.Join(cache, "python", spiffePackage)
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	check(t, os.MkdirAll(filepath.Dir(dir), 0o755))
	fresh := must[string](t)(os.MkdirTemp(filepath.Dir(dir), "new-"))
	defer os.RemoveAll(fresh)
	pip := exec.CommandContext(t.Context(), "python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action", "ignore", "--target", fresh, spiffePackage)
	if out, err := pip.CombinedOutput(); err != nil {
		t.Fatalf("fetch %s: %v: %s", spiffePackage, err, out)
	}
	if err := os.Rename(fresh, dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return dir
}

func TestPythonClient(t *testing.T) {
	n := newNode(t, web1, db)
	packages := pythonPackages(t)
	type line struct {
		ID, Subject, Valid, WrongAudience, Error, Serial string
		Roots                                            int
	}
	start := func(where place) *process {
		script := must[string](t)(filepath.Abs("testdata/client.py"))
		return n.exec(where, exec.Command("python3", script, "60"), "PYTHONPATH="+packages, "PYTHONDONTWRITEBYTECODE=1")
	}
	p := start(inPod(web1))
	got, want := next[line](p), web1.Identity.String()
	if got.ID != want || got.Subject != want || got.Valid != want || got.Roots != 1 || got.WrongAudience == "" || got.Error != "" {
		t.Errorf("it got %+v", got)
	}
	first := until(p, "an update", func(l line) bool { return l.Serial != "" })
	other := must[*identity.Authority](t)(identity.NewAuthority(trustDomain, time.Now()))
	n.operator.change(func() { n.operator.x509 = other })
	check(t, n.store.SetBundle(trustDomain, other.Roots()))
	until(p, "another certificate", func(l line) bool { return l.Serial != "" && l.Serial != first.Serial })
	n.stop()
	n.start(n.root())
	until(p, "an update after another agent has started", func(l line) bool { return l.Serial != "" })
	if refused := next[line](start(place{})); refused.Error == "" || refused.ID != "" {
		t.Errorf("a process of the node got %+v", refused)
	}
}
