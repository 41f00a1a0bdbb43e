package report

import "testing"

func TestReplace(t *testing.T) {
	const page = "# A\n<!-- begin one: written by make bench -->\nold\n<!-- end one -->\ntext\n<!-- begin two: written by make bench -->\nkept\n<!-- end two -->\n"
	const want = "# A\n<!-- begin one: written by make bench -->\nnew\n<!-- end one -->\ntext\n<!-- begin two: written by make bench -->\nkept\n<!-- end two -->\n"
	got, err := replace(page, "one", "new\n")
	if err != nil || got != want {
		t.Errorf("got %q, %v", got, err)
	}
	for _, broken := range []string{"", "<!-- begin one: written by make bench -->\n"} {
		if got, err := replace(broken, "one", "new\n"); err == nil {
			t.Errorf("%q became %q", broken, got)
		}
	}
}

func TestSamples(t *testing.T) {
	s := Samples{30, 10, 20, 1000}
	if got, want := s.Spread(), "25.0 (10.0–1000)"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if s[0] != 30 {
		t.Error("the rounds are in another order now")
	}
	if got, want := s.Per(Samples{10, 10, 10, 10}).Median(), 2.5; got != want {
		t.Errorf("got %g, want %g", got, want)
	}
}
