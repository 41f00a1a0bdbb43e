package report

import (
	"fmt"
	"math"
	"slices"
)

// Samples are what the rounds measured of one thing.
type Samples []float64

// Median of them; NaN of none.
func (s Samples) Median() float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	s = slices.Sorted(slices.Values(s))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// Per divides round by round, so that what slows a whole round down doesn't count.
func (s Samples) Per(o Samples) (out Samples) {
	for i := range min(len(s), len(o)) {
		out = append(out, s[i]/o[i])
	}
	return out
}

// Spread is the median with the lowest and the highest.
func (s Samples) Spread() string {
	return fmt.Sprintf("%s (%s–%s)", s, figure(slices.Min(s)), figure(slices.Max(s)))
}

// String is the median, and empty without a sample.
func (s Samples) String() string {
	if len(s) == 0 {
		return ""
	}
	return figure(s.Median())
}

// figure has three digits that count.
func figure(f float64) string {
	switch {
	case f >= 100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}
