package report

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Plot is a figure beside a table.
type Plot interface {
	// Caption stands in its place where it can't be shown.
	Caption() string
	// SVG of it.
	SVG() []byte
}

// Series is what one thing has, and the colour and the name it has in a plot.
type Series struct {
	Name string
	// Values are one of each group, or of each X.
	Values []Samples
}

// Bars compares series in groups: the medians, with lines from the lowest to the
// highest round.
type Bars struct {
	Title, Unit string
	// Log has the axis be logarithmic: what differs tenfold is to be seen beside what
	// doesn't.
	Log    bool
	Groups []string
	Series []Series
}

// Lines compares series that depend on a number.
type Lines struct {
	Title, XLabel, Unit string
	X                   []float64
	Series              []Series
}

// colours that people with any colour vision tell apart (Okabe and Ito's).
var colours = []string{"#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999"}

const (
	plotWidth   = 900
	labelWidth  = 250
	rightMargin = 40
	barHeight   = 11
	legendRow   = 18
	titleHeight = 34
)

// Caption is the title.
func (p Bars) Caption() string { return p.Title }

// SVG has horizontal bars, so that groups may have long names.
func (p Bars) SVG() []byte {
	a := newAxis(p.Series, p.Log, labelWidth, plotWidth-rightMargin)
	top := titleHeight + legendRow*len(p.Series) + 10
	groupHeight := barHeight*len(p.Series) + 12
	bottom := top + groupHeight*len(p.Groups)
	c := newCanvas(plotWidth, bottom+44, p.Title, p.Series)
	for _, tick := range a.ticks() {
		x := a.at(tick)
		c.line(x, float64(top), x, float64(bottom), "#dddddd", 1)
		c.text(x, float64(bottom+16), "middle", axisFigure(tick))
	}
	c.text((labelWidth+plotWidth-rightMargin)/2, float64(bottom+36), "middle", p.Unit)
	for g, group := range p.Groups {
		y := float64(top + g*groupHeight + 6)
		c.text(labelWidth-8, y+float64(barHeight*len(p.Series))/2+4, "end", group)
		for i, s := range p.Series {
			if g >= len(s.Values) || len(s.Values[g]) == 0 {
				continue
			}
			v := s.Values[g]
			at := y + float64(i*barHeight)
			c.rect(labelWidth, at, max(a.at(v.Median())-labelWidth, 1), barHeight-2, colours[i%len(colours)])
			middle := at + float64(barHeight-2)/2
			c.line(a.at(slices.Min(v)), middle, a.at(slices.Max(v)), middle, "#333333", 1.2)
		}
	}
	c.line(labelWidth, float64(top), labelWidth, float64(bottom), "#333333", 1)
	return c.end()
}

// Caption is the title.
func (p Lines) Caption() string { return p.Title }

// SVG has the medians joined by lines.
func (p Lines) SVG() []byte {
	const left, right, height = 80, plotWidth - rightMargin, 300
	top := titleHeight + legendRow*len(p.Series) + 10
	bottom := top + height
	c := newCanvas(plotWidth, bottom+50, p.Title, p.Series)
	y := newAxis(p.Series, false, float64(bottom), float64(top))
	x := axis{low: 0, high: slices.Max(p.X), from: left, to: right}
	for _, tick := range y.ticks() {
		c.line(left, y.at(tick), right, y.at(tick), "#dddddd", 1)
		c.text(left-8, y.at(tick)+4, "end", axisFigure(tick))
	}
	for _, v := range p.X {
		c.line(x.at(v), float64(bottom), x.at(v), float64(bottom+5), "#333333", 1)
		c.text(x.at(v), float64(bottom+20), "middle", axisFigure(v))
	}
	c.line(left, float64(bottom), right, float64(bottom), "#333333", 1)
	c.text((left+right)/2, float64(bottom+42), "middle", p.XLabel)
	c.text(left-70, float64(top-8), "start", p.Unit)
	for i, s := range p.Series {
		colour := colours[i%len(colours)]
		var points []string
		for k, v := range s.Values {
			if k >= len(p.X) || len(v) == 0 {
				continue
			}
			points = append(points, fmt.Sprintf("%.1f,%.1f", x.at(p.X[k]), y.at(v.Median())))
			c.line(x.at(p.X[k]), y.at(slices.Min(v)), x.at(p.X[k]), y.at(slices.Max(v)), colour, 1.2)
			fmt.Fprintf(&c.out, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", x.at(p.X[k]), y.at(v.Median()), colour)
		}
		fmt.Fprintf(&c.out, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colour)
	}
	return c.end()
}

// axis leads from values to places.
type axis struct {
	low, high, from, to float64
	log                 bool
}

// newAxis has room for all of them: from zero, or from a power of ten to another one.
func newAxis(series []Series, log bool, from, to float64) axis {
	low, high := math.Inf(1), 0.0
	for _, s := range series {
		for _, v := range s.Values {
			for _, f := range v {
				if f > 0 {
					low = min(low, f)
				}
				high = max(high, f)
			}
		}
	}
	if high == 0 {
		low, high = 1, 1
	}
	if log {
		low, high = math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))
		if low == high {
			high *= 10
		}
		return axis{low, high, from, to, true}
	}
	step := step(high)
	return axis{0, math.Ceil(high/step) * step, from, to, false}
}

// step is 1, 2 or 5 times a power of ten, of which 4 to 10 make the whole.
func step(high float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(high)))
	for _, n := range []float64{0.1, 0.2, 0.5} {
		if high/(n*power) <= 8 {
			return n * power
		}
	}
	return power
}

func (a axis) at(v float64) float64 {
	share := (v - a.low) / (a.high - a.low)
	if a.log {
		share = math.Log10(max(v, a.low)/a.low) / math.Log10(a.high/a.low)
	}
	return a.from + share*(a.to-a.from)
}

func (a axis) ticks() (all []float64) {
	if !a.log {
		s := step(a.high)
		for i := 0; float64(i)*s <= a.high*1.0001; i++ {
			all = append(all, float64(i)*s)
		}
		return all
	}
	for power := a.low; power <= a.high*1.0001; power *= 10 {
		for _, n := range []float64{1, 2, 5} {
			if n*power <= a.high*1.0001 {
				all = append(all, n*power)
			}
		}
	}
	return all
}

// axisFigure has no digits that say nothing.
func axisFigure(f float64) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.3f", f), "0"), ".")
}

// canvas is an SVG in the making.
type canvas struct{ out bytes.Buffer }

func newCanvas(width, height int, title string, series []Series) *canvas {
	c := &canvas{}
	fmt.Fprintf(&c.out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="sans-serif" font-size="12" fill="#222222">`+"\n", width, height, width, height)
	fmt.Fprintf(&c.out, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	fmt.Fprintf(&c.out, `<text x="12" y="22" font-size="15" font-weight="bold">%s</text>`+"\n", escaped(title))
	for i, s := range series {
		y := float64(titleHeight + i*legendRow)
		c.rect(14, y, 12, 12, colours[i%len(colours)])
		c.text(32, y+10, "start", s.Name)
	}
	return c
}

func (c *canvas) line(x1, y1, x2, y2 float64, colour string, width float64) {
	fmt.Fprintf(&c.out, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%.1f"/>`+"\n", x1, y1, x2, y2, colour, width)
}

func (c *canvas) rect(x, y, width, height float64, colour string) {
	fmt.Fprintf(&c.out, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`+"\n", x, y, width, height, colour)
}

func (c *canvas) text(x, y float64, anchor, s string) {
	fmt.Fprintf(&c.out, `<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`+"\n", x, y, anchor, escaped(s))
}

func (c *canvas) end() []byte {
	c.out.WriteString("</svg>\n")
	return c.out.Bytes()
}

func escaped(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}
