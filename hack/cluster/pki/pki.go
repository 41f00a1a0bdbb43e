// Package pki makes the certificates and keys of a throw-away Kubernetes
// cluster and keeps them in one directory.
//
// The directory belongs to one process at a time. A process that is killed
// leaves whole files only; the next one makes again what does not fit
// together.
package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	lifetime = 365 * 24 * time.Hour
	// renewBefore leaves a cluster that is started with old certificates time
	// to be used.
	renewBefore = 30 * 24 * time.Hour
	// skew is how far the clock of a reader may be behind.
	skew = time.Hour
)

// CA is the authority of one cluster: it signs for servers and for clients.
// Its methods may be called from several goroutines, but not for one name at
// the same time.
type CA struct {
	dir  string
	now  func() time.Time
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// Request is what a certificate says. At least one of Server and Client must
// be set.
type Request struct {
	CommonName    string   // for a client, the user name in Kubernetes
	Organizations []string // for a client, the groups in Kubernetes
	DNSNames      []string
	IPs           []net.IP
	Server        bool
	Client        bool
}

// New loads the authority that is kept in dir, or makes one: an ECDSA P-256
// key in ca.key (mode 0600) and a certificate for one year in ca.crt. It makes
// a new one too if that in dir is broken or ends within 30 days; certificates
// of the old one then no longer fit, see Issue. dir is made if need be.
func New(dir string) (*CA, error) {
	return newCA(dir, time.Now)
}

func newCA(dir string, now func() time.Time) (*CA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of the cluster CA: %w", err)
	}
	c := &CA{dir: dir, now: now}
	ok, err := c.load()
	if err != nil {
		return nil, fmt.Errorf("load the cluster CA: %w", err)
	}
	if ok {
		return c, nil
	}
	if err := c.create(); err != nil {
		return nil, fmt.Errorf("make the cluster CA: %w", err)
	}
	return c, nil
}

// CertPath is the file of the authority's certificate.
func (c *CA) CertPath() string { return filepath.Join(c.dir, "ca.crt") }

// KeyPath is the file of the authority's private key, for the controller
// manager, which signs for kubelets.
func (c *CA) KeyPath() string { return filepath.Join(c.dir, "ca.key") }

// CertPEM is the authority's certificate. The caller must not change it.
func (c *CA) CertPEM() []byte { return c.pem }

// load tells whether dir has a whole and lasting authority.
func (c *CA) load() (bool, error) {
	cert, key, data, err := readPair(c.CertPath(), c.KeyPath())
	if err != nil || cert == nil {
		return false, err
	}
	if !cert.IsCA || !c.lasts(cert) {
		return false, nil
	}
	c.cert, c.key, c.pem = cert, key, data
	return true, nil
}

func (c *CA) create() error {
	key, keyPEM, err := newKey()
	if err != nil {
		return err
	}
	template, err := c.template("bulkhead-cluster-ca")
	if err != nil {
		return err
	}
	// Two authorities must differ in name too, or a verifier that knows both
	// picks by chance.
	template.Subject.SerialNumber = template.SerialNumber.Text(16)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := writePair(c.CertPath(), certPEM, c.KeyPath(), keyPEM); err != nil {
		return err
	}
	c.cert, c.key, c.pem = cert, key, certPEM
	return nil
}

// Issue returns the files of a certificate that says what req does and of its
// private key (mode 0600): <name>.crt and <name>.key. It keeps those that are
// there if they fit: signed by this authority, with the same contents, and
// lasting 30 days more.
func (c *CA) Issue(name string, req Request) (cert, key string, err error) {
	if name == "" || name == "ca" || name == "sa" || strings.HasPrefix(name, ".") || strings.ContainsRune(name, filepath.Separator) {
		return "", "", fmt.Errorf("issue a certificate: %q cannot name its file", name)
	}
	if !req.Server && !req.Client {
		return "", "", fmt.Errorf("issue the certificate %s: it is neither for a server nor for a client", name)
	}
	certPath, keyPath := filepath.Join(c.dir, name+".crt"), filepath.Join(c.dir, name+".key")
	old, _, _, err := readPair(certPath, keyPath)
	if err != nil {
		return "", "", fmt.Errorf("read the certificate %s: %w", name, err)
	}
	if old != nil && c.fits(old, req) {
		return certPath, keyPath, nil
	}
	if err := c.issue(certPath, keyPath, req); err != nil {
		return "", "", fmt.Errorf("issue the certificate %s: %w", name, err)
	}
	return certPath, keyPath, nil
}

func (c *CA) issue(certPath, keyPath string, req Request) error {
	key, keyPEM, err := newKey()
	if err != nil {
		return err
	}
	template, err := c.template(req.CommonName)
	if err != nil {
		return err
	}
	template.Subject.Organization = req.Organizations
	template.DNSNames, template.IPAddresses = req.DNSNames, req.IPs
	template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageDigitalSignature, req.usages()
	// Nothing outlives what signs it.
	if template.NotAfter.After(c.cert.NotAfter) {
		template.NotAfter = c.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		return err
	}
	return writePair(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), keyPath, keyPEM)
}

func (c *CA) template(commonName string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := c.now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(lifetime),
	}, nil
}

func (req Request) usages() []x509.ExtKeyUsage {
	var u []x509.ExtKeyUsage
	if req.Server {
		u = append(u, x509.ExtKeyUsageServerAuth)
	}
	if req.Client {
		u = append(u, x509.ExtKeyUsageClientAuth)
	}
	return u
}

// lasts tells whether now is in the lifetime of cert and its end not near.
func (c *CA) lasts(cert *x509.Certificate) bool {
	now := c.now()
	return !now.Before(cert.NotBefore) && cert.NotAfter.Sub(now) > renewBefore
}

func (c *CA) fits(cert *x509.Certificate, req Request) bool {
	sorted := func(s []string) []string { return slices.Sorted(slices.Values(s)) }
	ips := func(l []net.IP) []string {
		var s []string
		for _, ip := range l {
			s = append(s, ip.String())
		}
		return sorted(s)
	}
	return cert.CheckSignatureFrom(c.cert) == nil && c.lasts(cert) &&
		cert.Subject.CommonName == req.CommonName &&
		slices.Equal(sorted(cert.Subject.Organization), sorted(req.Organizations)) &&
		slices.Equal(sorted(cert.DNSNames), sorted(req.DNSNames)) &&
		slices.Equal(ips(cert.IPAddresses), ips(req.IPs)) &&
		slices.Equal(cert.ExtKeyUsage, req.usages())
}

// ServiceAccountKey returns the files of the key pair that the tokens of
// service accounts are signed with, sa.key (mode 0600) and sa.pub in dir, and
// makes what is missing or broken. A new key makes all tokens worthless.
func ServiceAccountKey(dir string) (privPath, pubPath string, err error) {
	privPath, pubPath = filepath.Join(dir, "sa.key"), filepath.Join(dir, "sa.pub")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", fmt.Errorf("make the directory of the service account key: %w", err)
	}
	key, err := readKey(privPath)
	if err != nil {
		return "", "", fmt.Errorf("read the service account key: %w", err)
	}
	if key == nil {
		made, keyPEM, err := newKey()
		if err != nil {
			return "", "", fmt.Errorf("make the service account key: %w", err)
		}
		if err := write(privPath, keyPEM, 0o600); err != nil {
			return "", "", fmt.Errorf("keep the service account key: %w", err)
		}
		key = made
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", "", fmt.Errorf("encode the public service account key: %w", err)
	}
	pub := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	if old, err := os.ReadFile(pubPath); err == nil && bytes.Equal(old, pub) {
		return privPath, pubPath, nil
	}
	if err := write(pubPath, pub, 0o644); err != nil {
		return "", "", fmt.Errorf("keep the public service account key: %w", err)
	}
	return privPath, pubPath, nil
}

func newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// readKey returns nil if there is no key or a broken one. A key that others
// may read counts as broken: it is not known who has it.
func readKey(path string) (crypto.Signer, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil
	}
	return ec, nil
}

// readPair returns a nil certificate if there is no whole pair.
func readPair(certPath, keyPath string) (*x509.Certificate, crypto.Signer, []byte, error) {
	key, err := readKey(keyPath)
	if err != nil || key == nil {
		return nil, nil, nil, err
	}
	data, err := os.ReadFile(certPath)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil, nil
	}
	if err != nil {
		return nil, nil, nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, nil, nil, nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, nil, nil
	}
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(key.Public()) {
		return nil, nil, nil, nil
	}
	return cert, key, data, nil
}

func writePair(certPath string, cert []byte, keyPath string, key []byte) error {
	if err := write(keyPath, key, 0o600); err != nil {
		return err
	}
	return write(certPath, cert, 0o644)
}

// write replaces a file in one step.
func write(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".tmp"
	// What a killed process left may have another mode.
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
