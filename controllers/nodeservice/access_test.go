package nodeservice

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	nodev1alpha1 "github.com/bulkhead-mesh/bulkhead/api/node/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// tokens issues and reviews service account tokens as the API server does: it
// believes what it signed, for the audiences that it signed it for.
type tokens struct {
	t   *testing.T
	key *ecdsa.PrivateKey
}

// token is what is in one.
type token struct {
	Subject  string           `json:"sub"`
	Audience jwt.Audience     `json:"aud"`
	Expiry   *jwt.NumericDate `json:"exp"`
	Node     string           `json:"node,omitempty"`
}

func newTokens(t *testing.T) *tokens {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &tokens{t, key}
}

func (k *tokens) issue(c token) string {
	k.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: k.key}, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	text, err := jwt.Signed(signer).Claims(c).Serialize()
	if err != nil {
		k.t.Fatal(err)
	}
	return text
}

func (k *tokens) Create(_ context.Context, r *authenticationv1.TokenReview, _ metav1.CreateOptions) (*authenticationv1.TokenReview, error) {
	out := r.DeepCopy()
	parsed, err := jwt.ParseSigned(r.Spec.Token, []jose.SignatureAlgorithm{jose.ES256})
	var c token
	if err != nil || parsed.Claims(&k.key.PublicKey, &c) != nil || c.Expiry.Time().Before(time.Now()) {
		out.Status.Error = "invalid bearer token"
		return out, nil
	}
	for _, a := range r.Spec.Audiences {
		if c.Audience.Contains(a) {
			out.Status.Audiences = append(out.Status.Audiences, a)
		}
	}
	if len(out.Status.Audiences) == 0 {
		out.Status.Error = "token audiences are invalid"
		return out, nil
	}
	out.Status.Authenticated = true
	out.Status.User.Username = c.Subject
	if c.Node != "" {
		out.Status.User.Extra = map[string]authenticationv1.ExtraValue{nodeNameExtra: {c.Node}}
	}
	return out, nil
}

// operator is a service that is reached over a connection.
type operator struct {
	t       *testing.T
	world   *world
	tokens  *tokens
	service *Service
	client  nodev1alpha1.NodeServiceClient
	log     *bytes.Buffer
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	o := &operator{t: t, world: newWorld(t), tokens: newTokens(t), log: &bytes.Buffer{}}
	o.service = o.world.service(func(options *Options) {
		options.Callers = NewAuthenticator(AuthenticatorOptions{Reviews: o.tokens})
		options.Log = slog.New(slog.NewTextHandler(o.log, nil))
	})
	server := grpc.NewServer()
	o.service.Register(server)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(l)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	o.client = nodev1alpha1.NewNodeServiceClient(conn)
	return o
}

// agentOf is what the token of a node's agent says.
func agentOf(node string) token {
	return token{Subject: DefaultUsername, Audience: jwt.Audience{DefaultAudience}, Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour)), Node: node}
}

// sign asks for a certificate of the pod reviews-0 of node-1.
func (o *operator) sign(bearer string, want model.Identity) error {
	o.t.Helper()
	ctx := metadata.AppendToOutgoingContext(o.t.Context(), "authorization", "Bearer "+bearer)
	r, err := o.client.SignCertificate(ctx, &nodev1alpha1.SignCertificateRequest{
		Csr: csrFor(o.t, want), PodUid: "u1", PodNamespace: "team-a", PodName: "reviews-0"})
	if (err == nil) != (len(r.GetChain()) == 2) {
		o.t.Errorf("%d certificates with %v", len(r.GetChain()), err)
	}
	return err
}

// refused checks that a call was, and that log and metric say to whom and why.
func (o *operator) refused(err error, code codes.Code, node, identity, cause, says string) {
	o.t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), says) {
		o.t.Errorf("%v, want %v and %q", err, code, says)
	}
	var m dto.Metric
	if err := o.service.refusals.counter.WithLabelValues("SignCertificate", node, identity, cause).Write(&m); err != nil || m.GetCounter().GetValue() != 1 {
		o.t.Errorf("counted %v times for node %q, identity %q, cause %q", m.GetCounter().GetValue(), node, identity, cause)
	}
	if line := o.log.String(); !strings.Contains(line, "refused") || !strings.Contains(line, says) || !strings.Contains(line, node) || !strings.Contains(line, identity) {
		o.t.Errorf("log: %s", line)
	}
	if strings.Contains(o.log.String(), "eyJ") {
		o.t.Error("a token is in the log")
	}
}

func TestOwnPod(t *testing.T) {
	o := newOperator(t)
	if err := o.sign(o.tokens.issue(agentOf("node-1")), reviews); err != nil {
		t.Error(err)
	}
	if o.log.Len() > 0 {
		t.Errorf("log: %s", o.log)
	}
}

// A node that was taken over asks for a pod that runs on another.
func TestPodOfAnotherNode(t *testing.T) {
	o := newOperator(t)
	err := o.sign(o.tokens.issue(agentOf("node-2")), reviews)
	o.refused(err, codes.PermissionDenied, "node-2", reviews.String(), CauseOtherNode, "isn't on node node-2")
}

// A node has the pod, and asks for what the pod isn't.
func TestIdentityOfAnotherPod(t *testing.T) {
	o := newOperator(t)
	admin := reviews
	admin.ServiceAccount = "admin"
	err := o.sign(o.tokens.issue(agentOf("node-1")), admin)
	o.refused(err, codes.PermissionDenied, "node-1", reviews.String(), CauseOtherIdentity, admin.String())
}

func TestPodThatFinished(t *testing.T) {
	o := newOperator(t)
	o.world.pods["team-a/reviews-0"].Status.Phase = corev1.PodSucceeded
	err := o.sign(o.tokens.issue(agentOf("node-1")), reviews)
	o.refused(err, codes.PermissionDenied, "node-1", reviews.String(), CauseFinished, "has finished")
}

// A token that says the right things, signed by somebody else.
func TestForgedToken(t *testing.T) {
	o := newOperator(t)
	err := o.sign(newTokens(t).issue(agentOf("node-1")), reviews)
	o.refused(err, codes.Unauthenticated, "", "", "Unauthenticated", "isn't valid")

	// One that was changed after it was signed.
	text := o.tokens.issue(agentOf("node-2"))
	claims := strings.Split(o.tokens.issue(agentOf("node-1")), ".")[1]
	parts := strings.Split(text, ".")
	if err := o.sign(parts[0]+"."+claims+"."+parts[2], reviews); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a changed token: %v", err)
	}
}

// A token that the API server itself would take, which any pod may have.
func TestTokenOfAnotherAudience(t *testing.T) {
	o := newOperator(t)
	c := agentOf("node-1")
	c.Audience = jwt.Audience{"https://kubernetes.default.svc"}
	o.refused(o.sign(o.tokens.issue(c), reviews), codes.Unauthenticated, "", "", "Unauthenticated", "audience")
}

// A token of the agents' account that isn't bound to a node, as its owner can make
// with kubectl create token.
func TestTokenOfNoNode(t *testing.T) {
	o := newOperator(t)
	o.refused(o.sign(o.tokens.issue(agentOf("")), reviews), codes.Unauthenticated, "", "", "Unauthenticated", "doesn't name a node")
}

func TestTokenOfAnotherAccount(t *testing.T) {
	o := newOperator(t)
	c := agentOf("node-1")
	c.Subject = "system:serviceaccount:team-a:reviews"
	o.refused(o.sign(o.tokens.issue(c), reviews), codes.Unauthenticated, "", "", "Unauthenticated", "team-a:reviews")
}

func TestExpiredToken(t *testing.T) {
	o := newOperator(t)
	c := agentOf("node-1")
	c.Expiry = jwt.NewNumericDate(time.Now().Add(-time.Minute))
	o.refused(o.sign(o.tokens.issue(c), reviews), codes.Unauthenticated, "", "", "Unauthenticated", "isn't valid")
}

// What nodes can make a replica remember is bounded.
func TestRefusalSeries(t *testing.T) {
	r := newRefusals()
	for i := range refusalSeries + 100 {
		r.count("SignCertificate", "node", string(rune('a'+i%26))+strings.Repeat("x", i/26), CauseFinished)
	}
	var m dto.Metric
	if err := r.counter.WithLabelValues("SignCertificate", otherSeries, otherSeries, CauseFinished).Write(&m); err != nil || m.GetCounter().GetValue() != 100 {
		t.Errorf("%v counted together, %v", m.GetCounter().GetValue(), err)
	}
}

// An agent that is refused all the time doesn't fill the log, nor keep others' refusals
// out of it; what isn't said is counted.
func TestRefusalsAreLoggedAtAPace(t *testing.T) {
	o := newOperator(t)
	var seconds atomic.Int64
	o.service.now = func() time.Time { return time.Unix(1e9+seconds.Load(), 0) }
	asks := func(node string, times int) {
		t.Helper()
		bearer := o.tokens.issue(agentOf(node))
		for range times {
			if code := status.Code(o.sign(bearer, reviews)); code != codes.PermissionDenied {
				t.Fatalf("%s is told %v", node, code)
			}
		}
	}
	lines := func(node string) int { return strings.Count(o.log.String(), "node="+node) }
	asks("node-2", 5*refusalsAtOnce)
	asks("node-3", 1)
	if taken, other := lines("node-2"), lines("node-3"); taken != refusalsAtOnce || other != 1 {
		t.Errorf("%d lines of the agent that was taken over, %d of another", taken, other)
	}
	seconds.Store(3)
	asks("node-2", 2*refusalsAtOnce)
	if n := lines("node-2"); n != refusalsAtOnce+3*refusalsPerSecond {
		t.Errorf("%d lines 3 s later", n)
	}
	if unsaid := fmt.Sprintf("unsaid=%d\n", 4*refusalsAtOnce); !strings.Contains(o.log.String(), unsaid) {
		t.Errorf("the log lacks %s", unsaid)
	}
	var m dto.Metric
	if err := o.service.refusals.counter.WithLabelValues("SignCertificate", "node-2", reviews.String(), CauseOtherNode).Write(&m); err != nil || m.GetCounter().GetValue() != 7*refusalsAtOnce {
		t.Errorf("%v are counted, %v", m.GetCounter().GetValue(), err)
	}

	o.log.Reset()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+o.tokens.issue(agentOf("node-4")))
	long := strings.Repeat("x", 1<<20)
	_, err := o.client.AttachPod(ctx, &nodev1alpha1.AttachPodRequest{PodUid: long, PodNamespace: long, PodName: long})
	if status.Code(err) != codes.InvalidArgument || o.log.Len() == 0 || o.log.Len() > 1024 {
		t.Errorf("%v, in %d bytes of log", status.Code(err), o.log.Len())
	}

	for n := range 2 * refusalSeries {
		o.service.refusals.mayLog(fmt.Sprint(n), time.Unix(int64(n)*refusalsAtOnce, 0))
	}
	if n := len(o.service.refusals.lines); n > refusalSeries {
		t.Errorf("%d nodes are remembered", n)
	}
}
