package app

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// WorkloadResult is what the command workload prints.
type WorkloadResult struct {
	OK bool `json:"ok"`
	// ID and Serial are of the X.509-SVID.
	ID      string    `json:"id,omitempty"`
	Serial  string    `json:"serial,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
	// Root is the serial number of the one that it chains to, of the Roots that are
	// trusted.
	Root  string `json:"root,omitempty"`
	Roots int    `json:"roots,omitempty"`
	// Token is the JWT-SVID, Subject whose it is.
	Token   string `json:"token,omitempty"`
	Subject string `json:"subject,omitempty"`
	Failure string `json:"failure,omitempty"`
}

// workload fetches the pod's SVIDs from the SPIFFE Workload API and verifies them.
func (c *command) workload() error {
	audience := c.flags.String("audience", "echo", "audience of the JWT-SVID")
	timeout := c.flags.Duration("timeout", 10*time.Second, "for all of it")
	if _, err := c.parse(""); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.ctx, *timeout)
	defer cancel()
	r, err := fetchSVIDs(ctx, *audience)
	if err != nil {
		r.Failure = err.Error()
	}
	r.OK = err == nil
	return c.finish(r.OK, r)
}

func serial(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

func fetchSVIDs(ctx context.Context, audience string) (r WorkloadResult, err error) {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return r, err
	}
	defer client.Close()
	x, err := client.FetchX509Context(ctx)
	if err != nil {
		return r, fmt.Errorf("fetch X.509-SVID: %w", err)
	}
	svid := x.DefaultSVID()
	_, chains, err := x509svid.Verify(svid.Certificates, x.Bundles)
	if err != nil {
		return r, fmt.Errorf("verify X.509-SVID: %w", err)
	}
	bundle, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return r, fmt.Errorf("verify X.509-SVID: %w", err)
	}
	r.ID, r.Serial, r.Expires = svid.ID.String(), serial(svid.Certificates[0]), svid.Certificates[0].NotAfter
	r.Root, r.Roots = serial(chains[0][len(chains[0])-1]), len(bundle.X509Authorities())
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return r, fmt.Errorf("fetch JWT-SVID: %w", err)
	}
	r.Token = token.Marshal()
	bundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return r, fmt.Errorf("fetch JWT bundles: %w", err)
	}
	verified, err := jwtsvid.ParseAndValidate(r.Token, bundles, []string{audience})
	if err != nil {
		return r, fmt.Errorf("verify JWT-SVID: %w", err)
	}
	r.Subject = verified.ID.String()
	if _, err := client.ValidateJWTSVID(ctx, r.Token, audience); err != nil {
		return r, fmt.Errorf("have JWT-SVID validated: %w", err)
	}
	return r, nil
}
