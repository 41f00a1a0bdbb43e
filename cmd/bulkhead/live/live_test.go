package live

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// Each field of a Pace has its default for itself.
func TestPaceDefaults(t *testing.T) {
	const every, most, patience = time.Second, 30 * time.Second, 15 * time.Second
	for _, tc := range []struct{ given, want Pace }{
		{Pace{}, Pace{every, most, patience}},
		{Pace{Every: time.Minute}, Pace{time.Minute, most, patience}},
		{Pace{Most: time.Minute}, Pace{every, time.Minute, patience}},
		{Pace{Patience: time.Minute}, Pace{every, most, time.Minute}},
		{Pace{1, 2, 3}, Pace{1, 2, 3}},
	} {
		if got := tc.given.orDefault(); got != tc.want {
			t.Errorf("%+v becomes %+v, want %+v", tc.given, got, tc.want)
		}
	}
}

// A view that says only how often it looks has time to look, and waits longer each time
// that it looks in vain.
func TestFollowWithEveryAlone(t *testing.T) {
	looks := 0
	look := func(ctx context.Context) ([]byte, bool, error) {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		switch looks++; looks {
		case 1:
			return []byte("first\n"), false, nil
		case 2, 3, 4:
			return nil, false, errors.New("away")
		}
		return []byte("last\n"), true, nil
	}
	var seen, problems bytes.Buffer
	err := Follow(t.Context(), look, Pace{Every: time.Millisecond}, func(error) bool { return false }, &seen, &problems)
	if err != nil || seen.String() != "first\n\nlast\n" {
		t.Errorf("%v: %q", err, &seen)
	}
	for _, says := range []string{"again in 1ms", "again in 2ms", "again in 4ms", "answers again"} {
		if !strings.Contains(problems.String(), says) {
			t.Errorf("%q doesn't say %q", &problems, says)
		}
	}
}
