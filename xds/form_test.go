package xds

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-mesh/bulkhead/model"
)

func forms() (all []Form) {
	for f := OldestForm; f <= NewestForm; f++ {
		all = append(all, f)
	}
	return all
}

// inForm are listeners of every kind in a form, by the name of their record.
func inForm(t *testing.T, f Form) map[string][]proto.Message {
	t.Helper()
	vip4, vip6 := netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("[fd00:96::10]:80")
	quiet := testProxy
	quiet.AccessLog, quiet.Workloads = false, quiet.Workloads[:1]
	reject := quiet
	reject.RejectOutside = true
	account := identityPath(quiet.Workloads[0].Identity)
	chains := map[string][]httpChain{account: {{vip4, true}, {netip.MustParseAddrPort("10.96.0.11:80"), false}, {vip6, true}}}
	out := map[string][]proto.Message{}
	add := func(name string, ms []proto.Message, err error) {
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[name] = ms
	}
	all := func(name string, p model.Proxy, first int) {
		ms, err := messages(listenersOf(f, testNetwork, p))
		add(name, ms[:min(first, len(ms))], err)
	}
	one := func(name string, m proto.Message, err error) { add(name, []proto.Message{m}, err) }
	all("listeners", testProxy, len(listenerNames))
	all("listeners-one-pod", quiet, len(listenerNames))
	all("listeners-no-pods", model.Proxy{Node: "node-1", Tenant: testProxy.Tenant}, len(listenerNames))
	all("listeners-reject", reject, 1)
	l, err := outboundWith(f, testNetwork, quiet, chains)
	one("listeners-http", l, err)
	l, err = httpListenerOf(f, vip4)
	one("http-listener", l, err)
	l, err = mirrorListener(f)
	one("http-mirror", l, err)
	return out
}

// What a form is doesn't change, or an operator's upgrade would end connections in all
// proxies. -update puts a new form on record and touches none that is there.
func TestFormsStay(t *testing.T) {
	recorded := map[string]bool{}
	for _, f := range forms() {
		for name, ms := range inForm(t, f) {
			file := filepath.Join("testdata", fmt.Sprintf("form-%d", f), name+".yaml")
			recorded[file] = true
			got := yamlOf(t, ms)
			want, err := os.ReadFile(file)
			if *update && errors.Is(err, fs.ErrNotExist) {
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				want, err = got, os.WriteFile(file, got, 0o644)
			}
			if err != nil {
				t.Fatalf("form %d isn't on record: go test ./xds -run TestFormsStay -update: %v", f, err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s differs: each process that has form %d would drain these chains and end what lasts in them.\n"+
					"Leave the form as it is, and make the change in a new one: NewestForm+1, and p.form >= that in what packs it (decision 57).\n"+
					"Only if no operator has ever run with form %d, remove its records and put it on record anew.\n%s", file, f, f, got)
			}
		}
	}
	files, err := filepath.Glob("testdata/form-*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !recorded[file] {
			t.Errorf("%s is on record, and nothing makes it any more: who has it gets what is nearest, and drains the chains that differ", file)
		}
	}
}

// A form leads to clusters and listeners that processes have still.
func TestFormsLeadSomewhere(t *testing.T) {
	cs, err := StaticClusters()
	if err != nil {
		t.Fatal(err)
	}
	// "never" is in the place of a name that the connection brings, and to the others
	// nothing is to lead.
	known := []string{"never", clusterNone, noIdentity}
	for _, c := range cs {
		known = append(known, c.Name)
	}
	leads := regexp.MustCompile(`(?m)^ *(?:- )?cluster: ([^'\s]\S*)$`)
	for _, f := range forms() {
		found := 0
		for name, ms := range inForm(t, f) {
			for _, m := range leads.FindAllSubmatch(yamlOf(t, ms), -1) {
				found++
				if to := string(m[1]); !slices.Contains(known, to) {
					t.Errorf("form %d: %s leads to cluster %q, which processes don't have", f, name, to)
				}
			}
		}
		if found < 10 {
			t.Errorf("form %d: %d clusters are named: the test looks at the wrong thing", f, found)
		}
		ls, err := listenersOf(f, testNetwork, testProxy)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, l := range ls {
			names = append(names, l.Name)
		}
		if !slices.Equal(names, listenerNames) {
			t.Errorf("form %d has the listeners %q; want %q", f, names, listenerNames)
		}
	}
}

func TestFormOf(t *testing.T) {
	hash := strings.Repeat("fe0", 8)
	for version, want := range map[string]Form{
		hash: 1, hash + ".2-AAAAAA--------": 1, "2-" + hash: 2, "2-" + hash + ".2-AAAAA-": 2,
		"1-" + hash: 1, "3-" + hash: 3, "4-" + hash: 3, "999999999999999999999-" + hash: 1,
		"0-" + hash: 1, "-5-" + hash: 1, "-" + hash: 1, "": 1, "x-" + hash: 1, "2": 1,
	} {
		if got := formOf(version, 3); got != want {
			t.Errorf("%q is of form %d; want %d", version, got, want)
		}
	}
}
