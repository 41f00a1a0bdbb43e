package translate

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Reasons of events about a pod's exclusions.
const (
	ReasonExclusionsInvalid = "ExclusionsInvalid"
	ReasonExclusionsDenied  = "ExclusionsDenied"
)

// tunnelPort can't be excluded: it is the mesh's.
const tunnelPort = 15008

// parseExclusions reads a pod's annotations: all of them, or none with an error
// for people.
func parseExclusions(annotations map[string]string) ([]v1alpha1.Exclusion, error) {
	var out []v1alpha1.Exclusion
	for _, a := range []struct {
		name      string
		direction v1alpha1.Direction
	}{{v1alpha1.AnnotationExcludeOutbound, v1alpha1.DirectionOutbound}, {v1alpha1.AnnotationExcludeInbound, v1alpha1.DirectionInbound}} {
		value, ok := annotations[a.name]
		if !ok {
			continue
		}
		for i, s := range strings.SplitN(value, ",", v1alpha1.MaxPodExclusions+2) {
			e, err := parseExclusion(a.direction, strings.TrimSpace(s))
			if err == nil && len(out) == v1alpha1.MaxPodExclusions {
				err = fmt.Errorf("more than %d", v1alpha1.MaxPodExclusions)
			}
			if err != nil {
				return nil, fmt.Errorf("annotation %s, entry %d (%.64q): %w", a.name, i+1, s, err)
			}
			out = append(out, e)
		}
	}
	return out, nil
}

// parseExclusion reads PORT, CIDR or CIDR:PORT.
func parseExclusion(d v1alpha1.Direction, s string) (v1alpha1.Exclusion, error) {
	e := v1alpha1.Exclusion{Direction: d}
	port := s
	if slash := strings.IndexByte(s, '/'); slash >= 0 {
		// Only behind the length of the prefix is a colon no part of IPv6.
		e.CIDR, port = s, ""
		if colon := strings.IndexByte(s[slash:], ':'); colon >= 0 {
			e.CIDR, port = s[:slash+colon], s[slash+colon+1:]
			if port == "" {
				return e, errors.New("the port behind the colon is missing")
			}
		}
		p, err := netip.ParsePrefix(e.CIDR)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return e, errors.New("want a network such as 10.0.0.0/8 or 2001:db8::/32, with no bit set behind its prefix")
		}
		e.CIDR = p.String()
	}
	if port == "" && e.CIDR != "" {
		return e, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return e, errors.New("want PORT, CIDR or CIDR:PORT, with a port from 1 to 65535")
	}
	if d == v1alpha1.DirectionInbound && n == tunnelPort {
		return e, fmt.Errorf("port %d is the mesh's own and can't be excluded", tunnelPort)
	}
	e.Port = int32(n)
	return e, nil
}
