package debug

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/bulkhead-mesh/bulkhead/identity"
)

const (
	signTime = 30 * time.Second
	// At an agent's start the operator isn't reached yet, or has no authority.
	firstRetry = 500 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// certificate is the server's own. Its key is in memory alone.
type certificate struct {
	sign    func(ctx context.Context, csr []byte) ([][]byte, error)
	roots   func() *x509.CertPool
	name    string
	renewed chan struct{}
	current atomic.Pointer[tls.Certificate]
}

func (c *certificate) get() (*tls.Certificate, error) {
	if have := c.current.Load(); have != nil {
		return have, nil
	}
	return nil, errors.New("there is no certificate yet")
}

// keep has a new one signed at half of the life of the one before, and when the
// roots have changed, until ctx ends.
func (c *certificate) keep(ctx context.Context, log *slog.Logger) {
	retry, told := firstRetry, false
	for {
		wait := retry
		retry = min(2*retry, lastRetry)
		made, err := c.make(ctx)
		if err == nil {
			c.current.Store(made)
			wait = max(lastRetry, time.Until(made.Leaf.NotAfter)/2)
			retry, told = firstRetry, false
		} else if ctx.Err() == nil && !told {
			// The operator may come later; nothing else waits for this.
			log.Warn("the certificate for owners who look into proxies isn't signed", "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
			return
		case <-c.renewed:
			retry = firstRetry
		case <-time.After(wait):
		}
	}
}

func (c *certificate) make(ctx context.Context) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, signTime)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := identity.NewServerCSR(key)
	if err != nil {
		return nil, err
	}
	chain, err := c.sign(ctx, csr)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, errors.New("the operator sent no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	between := x509.NewCertPool()
	for _, der := range chain[1:] {
		if ca, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(ca)
		}
	}
	// One that owners won't trust: the operator has a new authority, and the trust
	// bundle isn't here yet, or the other way round.
	roots := c.roots()
	if roots == nil {
		return nil, errors.New("there is no trust bundle yet")
	}
	if _, err := leaf.Verify(x509.VerifyOptions{DNSName: c.name, Roots: roots, Intermediates: between}); err != nil {
		return nil, err
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, errors.New("the operator sent a certificate for another key")
	}
	return &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}, nil
}
