package controllers

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// recorder implements events.EventRecorder.
type recorder func(about *corev1.ObjectReference, by runtime.Object, kind, reason, action, note string)

func (r recorder) Eventf(about, by runtime.Object, kind, reason, action, note string, args ...any) {
	r(about.(*corev1.ObjectReference), by, kind, reason, action, fmt.Sprintf(note, args...))
}

// The API server takes notes of 1,024 bytes, not characters, and refuses longer ones:
// their event would never be.
func TestNotesOfEvents(t *testing.T) {
	const most = 1024
	var told string
	tell := newTeller(recorder(func(_ *corev1.ObjectReference, by runtime.Object, _, _, _, note string) {
		if told = note; by != nil {
			t.Errorf("it is by %v", by)
		}
	}))
	secret := &corev1.ObjectReference{Kind: "Secret", Name: "s"}
	for what, tc := range map[string]struct{ note, begins string }{
		"short":         {"100% of it: %s", "100% of it: %s"},
		"wide":          {"refused: " + strings.Repeat("ä", 1000), "refused: ää"},
		"wider":         {strings.Repeat("€", 1000) + "; see there", "€€"},
		"of four bytes": {strings.Repeat("🚧", 1000), "🚧🚧"},
	} {
		tell(secret, nil, corev1.EventTypeWarning, "Reason", "Act", tc.note)
		if len(told) > most || !utf8.ValidString(told) || !strings.HasPrefix(told, tc.begins) || len(tc.note) > most && len(told) < most*9/10 {
			t.Errorf("%s: %d bytes: %q", what, len(told), told)
		}
	}
}
