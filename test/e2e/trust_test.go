package e2e

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

const issuerName = "bulkhead-issuer"

// rootChange is the change from the mesh's own root to one of a Secret. A new root is
// published for two minutes before anything is signed under it, so it begins before
// the tests, goes on under them and is looked at by TestIssuer.
type rootChange struct {
	issuer *corev1.Secret // as cert-manager writes it
	// load is nil if TestIssuer, which counts what it loses, doesn't run.
	load chan loadEnd
	// ended is closed when there is no load any more.
	ended chan struct{}
}

// loadEnded returns when the load, if there is one, is over. Tests that end proxies of
// its tenant wait for it, for TestIssuer would count what they lose.
func (c *rootChange) loadEnded(t *testing.T) {
	t.Helper()
	if c.load == nil {
		return
	}
	t.Log("waiting until the load under the change of roots is over, three minutes after the tests began")
	select {
	case <-c.ended:
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

type loadEnd struct {
	result app.RunResult
	err    error
}

// changeRoots names an issuer, and has one pod call another from before the change to
// after it if TestIssuer runs. A cluster on which tests ran before has the issuer already.
func (e *env) changeRoots(ctx context.Context) (*rootChange, error) {
	c := &rootChange{}
	secrets := e.Kube.CoreV1().Secrets(harness.SystemNamespace)
	var err error
	if c.issuer, err = secrets.Get(ctx, issuerName, metav1.GetOptions{}); apierrors.IsNotFound(err) {
		made, err := newIssuerSecret(time.Now().AddDate(1, 0, 0)) // clusters are kept
		if err != nil {
			return nil, err
		}
		if c.issuer, err = secrets.Create(ctx, made, metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	if mayRun("TestIssuer") {
		if err := e.loadRoots(ctx, c); err != nil {
			return nil, err
		}
	}
	_, err = e.Kubectl(ctx, "", "patch", "meshtopology", "e2e", "--type=merge", "--patch", `{"spec":{"identity":{"issuerSecret":"`+issuerName+`"}}}`)
	return c, err
}

// loadRoots begins the load.
func (e *env) loadRoots(ctx context.Context, c *rootChange) error {
	c.load, c.ended = make(chan loadEnd, 1), make(chan struct{})
	started := make(chan struct{})
	go func() {
		defer close(c.ended)
		// Not in e2e-b, whose proxies TestBrokenBuilds breaks meanwhile.
		r, err := e.Load(ctx, e.pod(webA, 1), started, "load", "--protocol", "tcp", "--connections", "10", "--rate", "20",
			"--new-connection-ratio", "0.5", "--duration", "170s", "--timeout", "20s", hostPort(e.pod(webA, 0).IPv4, app.GreetPort))
		c.load <- loadEnd{r, err}
	}()
	select {
	case <-started:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mayRun reports whether go test -run asks for a test; a pattern that is split otherwise
// than here may ask for any.
func mayRun(test string) bool {
	pattern, subtests, _ := strings.Cut(flag.Lookup("test.run").Value.String(), "/")
	asked, err := regexp.MatchString(pattern, test)
	return asked || err != nil || strings.Contains(subtests, "|")
}

// newIssuerSecret is an intermediate of somebody else's root: RSA, as cert-manager
// makes them by default.
func newIssuerSecret(end time.Time) (*corev1.Secret, error) {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	root, err := signAuthority("Example Corporation root", nil, rootKey.Public(), rootKey, end.Add(24*time.Hour))
	if err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	intermediate, err := signAuthority("Example Corporation mesh", root, key.Public(), rootKey, end)
	if err != nil {
		return nil, err
	}
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: issuerName}, Type: corev1.SecretTypeTLS, Data: map[string][]byte{
		"tls.crt": encode("CERTIFICATE", intermediate.Raw), "ca.crt": encode("CERTIFICATE", root.Raw),
		"tls.key": encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key)),
	}}, nil
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func signAuthority(name string, parent *x509.Certificate, key crypto.PublicKey, by crypto.Signer, end time.Time) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: end,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// TestIssuer looks at the change of roots that has gone on under the other tests, and
// at issuers that can't be used.
func TestIssuer(t *testing.T) {
	block, _ := pem.Decode(e.roots.issuer.Data["ca.crt"])
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	identityReady(t, 2*patience, "", "ChangingRoots", "Ready") // nothing is wrong
	if err := harness.Wait(t.Context(), 2*patience, time.Second, "the new root to sign", func(ctx context.Context) error {
		message, err := e.Kubectl(ctx, "", "get", "meshtopology", "e2e", "-o", `jsonpath={.status.conditions[?(@.type=="IdentityReady")].message}`)
		if err != nil {
			return err
		}
		for _, says := range []string{"under the new root since", "Secret " + harness.SystemNamespace + "/" + issuerName} {
			if strings.Contains(message, says) {
				return nil
			}
		}
		return fmt.Errorf("IdentityReady says %q", message)
	}); err != nil {
		t.Fatal(err)
	}
	published, err := e.Kube.CoreV1().ConfigMaps(harness.SystemNamespace).Get(t.Context(), "bulkhead-trust-bundle", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(published.Data["ca.crt"], string(e.roots.issuer.Data["ca.crt"])) {
		t.Errorf("the issuer's root isn't published: %s", published.Data["ca.crt"])
	}
	issued := func(name string) harness.Pod {
		t.Helper()
		pod, r := newIdentity(t, name)
		if want := root.SerialNumber.Text(16); r.Root != want {
			t.Errorf("%s: it chains to the root %s, not to %s", name, r.Root, want)
		}
		if n := strings.Count(published.Data["ca.crt"], "BEGIN CERTIFICATE"); r.Roots != n {
			t.Errorf("%s: it trusts %d roots, %d are published", name, r.Roots, n)
		}
		// Those whom it talks to were signed for under the old root.
		peer := e.pod(webB, 1)
		mustCall(t, pod, pod.IPv4, "tcp", hostPort(peer.IPv4, app.GreetPort))
		mustCall(t, peer, peer.IPv4, "tcp", hostPort(pod.IPv4, app.GreetPort))
		return pod
	}
	issued("under-the-new-root")

	other, err := newIssuerSecret(time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	expired, err := newIssuerSecret(time.Now().Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	authority := secret(t, "bulkhead-ca").Data["intermediate.crt"]
	for _, bad := range []struct {
		name, says string
		change     map[string][]byte
	}{
		{"of another key", "tls.key isn't the key", map[string][]byte{"tls.key": other.Data["tls.key"]}},
		{"expired", "ended at", expired.Data},
	} {
		restore := spoil(t, issuerName, bad.change)
		took := identityReady(t, patience, bad.says, "InvalidIssuer")
		told(t, issuerName, "InvalidIssuer", bad.says)
		if bad.name == "expired" {
			issued("though-it-expired")
		}
		restore()
		back := identityReady(t, patience, "", "ChangingRoots", "Ready")
		t.Logf("an issuer %s: told after %s, and that it is mended after %s", bad.name, took, back)
	}
	if now := secret(t, "bulkhead-ca").Data["intermediate.crt"]; string(now) != string(authority) {
		t.Error("what signs has changed")
	}
	if load := <-e.roots.load; load.err != nil || load.result.Failures.Total > 0 || load.result.Exchanges < 170*20/2 {
		t.Errorf("while roots changed: %v, %d exchanges, %d failures, first %+v", load.err, load.result.Exchanges, load.result.Failures.Total, load.result.Failures.First)
	}
}
