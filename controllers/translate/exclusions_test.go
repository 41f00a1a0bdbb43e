package translate

import (
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

func TestParseExclusions(t *testing.T) {
	out := func(port int32, cidr string) v1alpha1.Exclusion {
		return v1alpha1.Exclusion{Direction: v1alpha1.DirectionOutbound, Port: port, CIDR: cidr}
	}
	in := func(port int32, cidr string) v1alpha1.Exclusion {
		return v1alpha1.Exclusion{Direction: v1alpha1.DirectionInbound, Port: port, CIDR: cidr}
	}
	for _, test := range []struct {
		outbound, inbound string
		want              []v1alpha1.Exclusion
		wrong             string
	}{
		{outbound: "5432", want: []v1alpha1.Exclusion{out(5432, "")}},
		{outbound: " 5432 ,10.0.0.0/8, 192.0.2.0/24:443,2001:db8::/32 , 2001:DB8::/32:443", want: []v1alpha1.Exclusion{out(5432, ""), out(0, "10.0.0.0/8"), out(443, "192.0.2.0/24"), out(0, "2001:db8::/32"), out(443, "2001:db8::/32")}},
		{outbound: "1", inbound: "0.0.0.0/0,9090", want: []v1alpha1.Exclusion{out(1, ""), in(0, "0.0.0.0/0"), in(9090, "")}},
		{outbound: "15008", want: []v1alpha1.Exclusion{out(15008, "")}},
		{inbound: "15008", wrong: "port 15008 is the mesh's own"},
		{inbound: "10.0.0.0/8:15008", wrong: "port 15008"},
		{outbound: "1,2,3,4,5,6,7", inbound: "8", want: []v1alpha1.Exclusion{out(1, ""), out(2, ""), out(3, ""), out(4, ""), out(5, ""), out(6, ""), out(7, ""), in(8, "")}},
		{outbound: "1,2,3,4,5,6,7,8", inbound: "9", wrong: "exclude-inbound, entry 1 (\"9\"): more than 8"},
		{outbound: "1,2,3,4,5,6,7,8,9,10,11,12", wrong: "more than 8"},
		{outbound: "", wrong: "entry 1"},
		{outbound: "1,", wrong: "entry 2"},
		{outbound: "0", wrong: "1 to 65535"},
		{outbound: "65536", wrong: "1 to 65535"},
		{outbound: "-1", wrong: "1 to 65535"},
		{outbound: "http", wrong: "PORT, CIDR or CIDR:PORT"},
		{outbound: "10.0.0.1", wrong: "PORT, CIDR or CIDR:PORT"},
		{outbound: "10.0.0.1/8", wrong: "no bit set"},
		{outbound: "10.0.0.0/33", wrong: "network"},
		{outbound: "10.0.0.0/8:", wrong: "missing"},
		{outbound: "::ffff:10.0.0.0/104", wrong: "network"},
		{outbound: "fe80::%eth0/64", wrong: "network"},
		{outbound: "80", inbound: "x", wrong: "exclude-inbound"},
	} {
		annotations := map[string]string{v1alpha1.AnnotationExcludeOutbound: test.outbound}
		if test.inbound != "" {
			annotations[v1alpha1.AnnotationExcludeInbound] = test.inbound
		}
		if test.outbound == "" && test.inbound != "" {
			delete(annotations, v1alpha1.AnnotationExcludeOutbound)
		}
		got, err := parseExclusions(annotations)
		if !slices.Equal(got, test.want) {
			t.Errorf("%q, %q: %+v, want %+v", test.outbound, test.inbound, got, test.want)
		}
		if (err == nil) != (test.wrong == "") || err != nil && !strings.Contains(err.Error(), test.wrong) {
			t.Errorf("%q, %q: error %v, want %q", test.outbound, test.inbound, err, test.wrong)
		}
	}
	if got, err := parseExclusions(nil); err != nil || got != nil {
		t.Errorf("without annotations: %v, %v", got, err)
	}
}

func FuzzParseExclusions(f *testing.F) {
	f.Add("5432, 10.0.0.0/8, 2001:db8::/32:443")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseExclusions(map[string]string{v1alpha1.AnnotationExcludeInbound: s})
		if err != nil && got != nil || len(got) > v1alpha1.MaxPodExclusions {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
		for _, e := range got {
			if e.Port == 0 && e.CIDR == "" || e.Port == tunnelPort {
				t.Errorf("%q: %+v", s, e)
			}
		}
	})
}
