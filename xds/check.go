package xds

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// The model comes from many writers: what is checked here is what resources rely
// on, in the terms of the object that is wrong.

func checkIdentity(i model.Identity) error {
	if i.IsZero() {
		return nil
	}
	if got, err := model.ParseIdentity(i.String()); err != nil {
		return fmt.Errorf("check identity: %w", err)
	} else if got != i {
		return fmt.Errorf("check identity: %q reads as another", i)
	}
	return nil
}

func checkWorkload(w model.Workload) error {
	if w.UID == "" {
		return errors.New("it has no UID")
	}
	for _, a := range w.IPs {
		if !validAddr(a) {
			return fmt.Errorf("%q isn't a pod's address", a)
		}
	}
	return checkIdentity(w.Identity)
}

func checkService(s model.Service) error {
	var errs []error
	if s.Name == "" || s.Namespace == "" {
		errs = append(errs, errors.New("it has no name or namespace"))
	}
	for _, v := range s.VIPs {
		if !validAddr(v) {
			errs = append(errs, fmt.Errorf("%q isn't a service's address", v))
		}
	}
	seen := map[uint16]bool{}
	for _, p := range s.Ports {
		if p.Port == 0 || seen[p.Port] {
			errs = append(errs, fmt.Errorf("port %d (%q) is zero or there twice", p.Port, p.Name))
		}
		seen[p.Port] = true
		for _, e := range p.Endpoints {
			if !validAddr(e.Addr.Addr()) || e.Addr.Port() == 0 {
				errs = append(errs, fmt.Errorf("%q isn't an endpoint of port %d", e.Addr, p.Port))
			}
			if err := checkIdentity(e.Identity); err != nil {
				errs = append(errs, fmt.Errorf("endpoint %s of port %d: %w", e.Addr, p.Port, err))
			}
		}
	}
	return errors.Join(errs...)
}

func checkNetwork(n model.Network) error {
	if err := checkIdentity(model.Identity{TrustDomain: n.TrustDomain, Namespace: "a", ServiceAccount: "a"}); err != nil {
		return fmt.Errorf("trust domain %q: %w", n.TrustDomain, err)
	}
	for _, list := range [][]netip.Prefix{n.PodCIDRs, n.ServiceCIDRs} {
		for _, p := range list {
			if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
				return fmt.Errorf("%q isn't an address range", p)
			}
		}
	}
	return nil
}
