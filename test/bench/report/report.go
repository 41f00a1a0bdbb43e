// Package report makes the tables of `make bench`. Each part is a package below
// test/bench, and each of its benchmarks has a section of docs/benchmarks.md that it
// alone writes.
package report

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/hack/envoy/dist"
)

var (
	// Rounds in which everything that is compared is measured once, in turn.
	Rounds = flag.Int("rounds", 10, "rounds of each measurement")
	// Duration of one measurement.
	Duration = flag.Duration("duration", time.Second, "duration of each measurement")
	write    = flag.Bool("write", false, "write the tables into docs/benchmarks.md")
)

// Table is one table of a section.
type Table struct {
	Title string
	// Text stands above the rows.
	Text   string
	Header []string
	Rows   [][]string
	// Plots of it, by names of files: docs/benchmarks/PART-NAME.svg.
	Plots map[string]Plot
}

// Publish prints a part's tables and, if that is asked for, puts them into its
// section of docs/benchmarks.md.
func Publish(t testing.TB, part string, tables ...Table) {
	t.Helper()
	text := machine() + "\n"
	for _, table := range tables {
		text += "\n" + table.markdown(part)
	}
	fmt.Printf("\n%s\n", text)
	if !*write {
		return
	}
	page := filepath.Join(root(t), "docs", "benchmarks.md")
	for _, table := range tables {
		for name, p := range table.Plots {
			file := filepath.Join(root(t), "docs", plotFile(part, name))
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, p.SVG(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	b2, err := replace(string(b), part, text)
	if err != nil {
		t.Fatalf("%s: %v", page, err)
	}
	if err := os.WriteFile(page, []byte(b2), 0o644); err != nil {
		t.Fatal(err)
	}
}

// replace puts text between the marks of a part.
func replace(page, part, text string) (string, error) {
	begin, end := "<!-- begin "+part+": written by make bench -->\n", "<!-- end "+part+" -->"
	before, rest, ok := strings.Cut(page, begin)
	if !ok {
		return "", fmt.Errorf("there is no line %q", strings.TrimSpace(begin))
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return "", fmt.Errorf("there is no %q behind %q", end, strings.TrimSpace(begin))
	}
	return before + begin + text + end + after, nil
}

// root is the repository's folder.
func root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatalf("the repository isn't found: %v", err)
	return ""
}

// machine says where and when this was measured.
func machine() string {
	var u unix.Utsname
	kernel := "unknown"
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	cpu := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("Measured on %s: %d CPUs (%s), Linux %s, Envoy %s, %s; %d rounds of %s.\n",
		time.Now().UTC().Format("2006-01-02"), runtime.NumCPU(), cpu, kernel, dist.Default, runtime.Version(), *Rounds, *Duration)
}

// plotFile is below docs.
func plotFile(part, name string) string { return "benchmarks/" + part + "-" + name + ".svg" }

func (t Table) markdown(part string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "### %s\n", t.Title)
	if t.Text != "" {
		fmt.Fprintf(&b, "%s\n", t.Text)
	}
	fmt.Fprintf(&b, "\n| %s |\n|%s\n", strings.Join(t.Header, " | "), strings.Repeat("---|", len(t.Header)))
	for _, r := range t.Rows {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(r, " | "))
	}
	for _, name := range slices.Sorted(maps.Keys(t.Plots)) {
		fmt.Fprintf(&b, "\n![%s](%s)\n", t.Plots[name].Caption(), plotFile(part, name))
	}
	return b.String()
}
