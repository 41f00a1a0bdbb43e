package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// TestWhoIsSignedFor asks an operator for certificates as agents do, with tokens of the
// API server's, and as those do who have taken over a node or a pod.
func TestWhoIsSignedFor(t *testing.T) {
	if err := e.WaitInstalled(t.Context(), patience); err != nil {
		t.Fatal(err)
	}
	operators, err := e.Pods(t.Context(), harness.SystemNamespace, "app.kubernetes.io/name=bulkhead-operator")
	if err != nil || len(operators) == 0 {
		t.Fatalf("%d operators, %v", len(operators), err)
	}
	address, end, err := e.Forward(harness.SystemNamespace, operators[0].Name, 15012)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end() })
	bundle, err := e.Kube.CoreV1().ConfigMaps(harness.SystemNamespace).Get(t.Context(), "bulkhead-trust-bundle", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(bundle.Data["ca.crt"]))
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: roots, ServerName: "bulkhead-operator.bulkhead-system.svc", MinVersion: tls.VersionTLS13})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	agents := e.readyAgents(t)
	token := func(namespace, account, audience string, boundTo *corev1.Pod) string {
		t.Helper()
		r := &authenticationv1.TokenRequest{}
		if audience != "" {
			r.Spec.Audiences = []string{audience}
		}
		if boundTo != nil {
			r.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: boundTo.Name, UID: boundTo.UID}
		}
		r, err := e.Kube.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, r, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Token
	}
	const audience = "bulkhead-operator"
	here, there := agents[e.nodes[0]], agents[e.nodes[1]]
	agent := token(harness.SystemNamespace, "bulkhead-agent", audience, &here)
	pod := e.pod(webA, 0)
	own := model.Identity{TrustDomain: trustDomain, Namespace: pod.Namespace, ServiceAccount: pod.Echo.Name}
	forged := strings.Split(agent, ".")
	forged[1] = strings.Split(token(harness.SystemNamespace, "bulkhead-agent", audience, &there), ".")[1]
	outside := model.Identity{TrustDomain: trustDomain, Namespace: webO.Namespace, ServiceAccount: webO.Name}
	for _, c := range []struct {
		what, token string
		pod         harness.Pod
		id          model.Identity
		code        codes.Code
	}{
		{"the node's agent, for its own pod", agent, pod, own, codes.OK},
		{"for another node's pod", agent, e.pod(webA, 1), own, codes.PermissionDenied},
		{"the other node's agent", token(harness.SystemNamespace, "bulkhead-agent", audience, &there), pod, own, codes.PermissionDenied},
		{"for what the pod isn't", agent, pod, model.Identity{TrustDomain: trustDomain, Namespace: pod.Namespace, ServiceAccount: jobA.Name}, codes.PermissionDenied},
		{"for another trust domain", agent, pod, model.Identity{TrustDomain: "other.example", Namespace: pod.Namespace, ServiceAccount: pod.Echo.Name}, codes.PermissionDenied},
		{"for a pod that isn't in the mesh", agent, e.pod(webO, 0), outside, codes.PermissionDenied},
		{"for a pod on the host's network", agent, harness.Pod{Pod: here}, model.Identity{TrustDomain: trustDomain, Namespace: harness.SystemNamespace, ServiceAccount: "bulkhead-agent"}, codes.PermissionDenied},
		{"a token for the API server", token(harness.SystemNamespace, "bulkhead-agent", "", &here), pod, own, codes.Unauthenticated},
		{"a token that is bound to no pod", token(harness.SystemNamespace, "bulkhead-agent", audience, nil), pod, own, codes.Unauthenticated},
		{"the pod's own token, for this audience", token(pod.Namespace, pod.Echo.Name, audience, &pod.Pod), pod, own, codes.Unauthenticated},
		{"a token that was changed", strings.Join(forged, "."), pod, own, codes.Unauthenticated},
		{"without a token", "", pod, own, codes.Unauthenticated},
	} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := identity.NewCSR(key, c.id)
		if err != nil {
			t.Fatal(err)
		}
		ctx := t.Context()
		if c.token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
		}
		var r *nodev1alpha1.SignCertificateResponse
		for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
			// An operator that can't say it yet asks to try again, as agents do.
			if r, err = nodev1alpha1.NewNodeServiceClient(conn).SignCertificate(ctx, &nodev1alpha1.SignCertificateRequest{
				Csr: csr, PodUid: string(c.pod.UID), PodNamespace: c.pod.Namespace, PodName: c.pod.Name}); status.Code(err) != codes.Unavailable || time.Now().After(end) {
				break
			}
		}
		if status.Code(err) != c.code || (len(r.GetChain()) > 0) != (c.code == codes.OK) {
			t.Errorf("%s: %d certificates, %v; want %s", c.what, len(r.GetChain()), err, c.code)
		}
	}
}
