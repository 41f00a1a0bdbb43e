package model

import (
	"errors"
	"strings"
	"testing"
)

func TestTenantRoundTrip(t *testing.T) {
	seen := map[string]Tenant{}
	for _, want := range []Tenant{
		{Scope: ScopeNode},
		NamespaceTenant("node"),
		NamespaceTenant("team-a"),
		{ScopeServiceAccount, "team-a", "reviews.v2"},
		{ScopePod, "team-a", "web-0"},
		{ScopePod, "team-a", "sa.x"},
	} {
		s := want.String()
		if other, ok := seen[s]; ok {
			t.Errorf("%+v and %+v are both %q", want, other, s)
		}
		seen[s] = want
		got, err := ParseTenant(s)
		if err != nil || got != want {
			t.Errorf("ParseTenant(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", ".", "..", "a/b", "A", "../x", "a.sa", "a.sa.", "a.xx.b", "-a", strings.Repeat("a", 64)} {
		if got, err := ParseTenant(s); !errors.Is(err, ErrTenant) {
			t.Errorf("ParseTenant(%q) = %+v, %v; want ErrTenant", s, got, err)
		}
	}
}

func TestTenantFileName(t *testing.T) {
	if got := NamespaceTenant("team-a").FileName(); got != "team-a" {
		t.Errorf("a short name became %q", got)
	}
	seen := map[string]Tenant{}
	for _, last := range []string{"c", "d"} {
		want := Tenant{Scope: ScopePod, Namespace: strings.Repeat("a", 63), Name: strings.Repeat("b", 252) + last}
		name := want.FileName()
		if len(name) > 197 || !strings.HasPrefix(want.String(), name[:180]) {
			t.Errorf("%q is the file of %q", name, want)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("%q and %q have one file", want, other)
		}
		seen[name] = want
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	want := Identity{"cluster.local", "team-a", "reviews.v2"}
	got, err := ParseIdentity(want.String())
	if err != nil || got != want {
		t.Errorf("ParseIdentity(%q) = %+v, %v", want, got, err)
	}
	if s := (Identity{}).String(); s != "" {
		t.Errorf("zero identity is %q", s)
	}
	for _, s := range []string{
		"", "spiffe://", "http://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/b/", "spiffe://cluster.local/ns/a/sa/",
		"spiffe://cluster.local:80/ns/a/sa/b", "spiffe://cluster.local/ns/a.b/sa/b", "spiffe://cluster.local/ns/a/sa/b?x",
		"spiffe://cluster.local/ns/a/sa/b%2f", "spiffe://Cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/../sa/b", "spiffe:///ns/a/sa/b",
	} {
		if got, err := ParseIdentity(s); !errors.Is(err, ErrIdentity) {
			t.Errorf("ParseIdentity(%q) = %+v, %v; want ErrIdentity", s, got, err)
		}
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://cluster.local/ns/a/sa/b")
	f.Fuzz(func(t *testing.T, s string) {
		if i, err := ParseIdentity(s); err == nil && i.String() != s {
			t.Errorf("ParseIdentity(%q).String() = %q", s, i)
		}
	})
}
