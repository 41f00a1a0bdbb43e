package report

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
)

var plots = map[string]Plot{
	"bars": Bars{Title: `p99 < "2 ms" & more`, Unit: "ms", Log: true, Groups: []string{"nothing", "a flood"},
		Series: []Series{{"one each", []Samples{{1, 2, 3}, {4}}}, {"shared", []Samples{{1}, nil}}}},
	"lines": Lines{Title: "memory", XLabel: "tenants", Unit: "MiB", X: []float64{1, 10, 30},
		Series: []Series{{"private", []Samples{{14}, {140}, {420, 430}}}}},
}

// What is drawn is XML, is inside of the picture, and has the words.
func TestPlots(t *testing.T) {
	for name, p := range plots {
		svg := string(p.SVG())
		d := xml.NewDecoder(strings.NewReader(svg))
		shapes := 0
		for {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			e, ok := token.(xml.StartElement)
			if !ok {
				continue
			}
			if e.Name.Local == "rect" || e.Name.Local == "circle" {
				shapes++
			}
			for _, a := range e.Attr {
				if strings.Contains(a.Value, "NaN") || strings.Contains(a.Value, "Inf") || a.Name.Local != "font-size" && strings.HasPrefix(a.Value, "-") {
					t.Errorf("%s: %s has %s=%q", name, e.Name.Local, a.Name.Local, a.Value)
				}
			}
		}
		// The background, two keys and three bars; or one key and three points.
		if want := map[string]int{"bars": 6, "lines": 5}[name]; shapes != want {
			t.Errorf("%s has %d shapes, want %d", name, shapes, want)
		}
		for _, want := range []string{escaped(p.Caption()), ">shared<", ">a flood<", ">tenants<", ">private<"} {
			if (name == "bars") == (want == ">tenants<" || want == ">private<") && want != escaped(p.Caption()) {
				continue
			}
			if !strings.Contains(svg, want) {
				t.Errorf("%s lacks %s", name, want)
			}
		}
	}
}

func TestAxis(t *testing.T) {
	near := func(got, want float64) bool { return math.Abs(got-want) < 1e-6 }
	log := newAxis([]Series{{Values: []Samples{{0.3, 40}}}}, true, 100, 400)
	for value, want := range map[float64]float64{0.1: 100, 1: 200, 10: 300, 100: 400, 0: 100} {
		if got := log.at(value); !near(got, want) {
			t.Errorf("%g is at %g, want %g", value, got, want)
		}
	}
	linear := newAxis([]Series{{Values: []Samples{{0.3, 37}}}}, false, 0, 400)
	if got := linear.at(20); !near(got, 200) || !near(linear.high, 40) {
		t.Errorf("20 is at %g of 400, up to %g", got, linear.high)
	}
	if ticks := linear.ticks(); len(ticks) != 9 || !near(ticks[1], 5) {
		t.Errorf("ticks %v", ticks)
	}
}
