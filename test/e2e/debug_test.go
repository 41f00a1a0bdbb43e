package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-mesh/bulkhead/identity"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// owners of a namespace look into its proxies, and no others.
const owners = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: owner, namespace: e2e-a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: owner, namespace: e2e-a}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: admin}
subjects: [{kind: ServiceAccount, name: owner, namespace: e2e-a}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: viewer, namespace: e2e-a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: viewer, namespace: e2e-a}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: viewer, namespace: e2e-a}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: scraper, namespace: e2e-a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-scraper}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: bulkhead-metrics}
subjects: [{kind: ServiceAccount, name: scraper, namespace: e2e-a}]
`

func TestOwnersLookIntoProxies(t *testing.T) {
	if err := e.Apply(t.Context(), owners); err != nil {
		t.Fatal(err)
	}
	node := e.nodes[0]
	name := identity.AgentServerName(node)
	token := func(account, audience string) string {
		args := []string{"create", "token", account, "-n", "e2e-a", "--duration", "10m"}
		if audience != "" {
			args = append(args, "--audience", audience)
		}
		out, err := e.Kubectl(t.Context(), "", args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	owner := token("owner", name)
	// Anybody may see what agents' certificates chain to.
	bundle, err := e.Kubectl(t.Context(), "", "get", "configmap", "-n", harness.SystemNamespace, "bulkhead-trust-bundle", "-o", "json",
		"--as=system:serviceaccount:e2e-a:owner", "--as-group=system:serviceaccounts", "--as-group=system:authenticated")
	if err != nil {
		t.Fatal(err)
	}
	var object struct{ Data map[string]string }
	if err := json.Unmarshal([]byte(bundle), &object); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(object.Data["ca.crt"])) {
		t.Fatalf("the bundle is %s", bundle)
	}
	agents := e.readyAgents(t)
	address, end, err := e.Forward(harness.SystemNamespace, agents[node].Name, 15022)
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name}}}
	// ask tries again what the agent or its API server has no time for.
	ask := func(method, token, path string) (code int, body string) {
		t.Helper()
		err := harness.Wait(t.Context(), patience, time.Second, method+" "+path, func(context.Context) error {
			r, err := newRequest(t, method, token, "https://"+address+path)
			if err == nil {
				code, body, err = answer(client, r)
			}
			if err == nil && (code == http.StatusServiceUnavailable || code == http.StatusTooManyRequests) {
				err = fmt.Errorf("%d %.200s", code, body)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return code, body
	}

	mustCall(t, e.pod(webA, 0), "", "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
	// RBAC takes a moment to reach the API server's cache, and an agent that has just
	// started to get its certificate.
	var code int
	var config string
	err = harness.Wait(t.Context(), patience, 200*time.Millisecond, "the owner's access", func(context.Context) error {
		r, err := newRequest(t, "GET", owner, "https://"+address+"/tenants/e2e-a/config")
		if err == nil {
			code, config, err = answer(client, r)
		}
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d %.200s", code, config)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid([]byte(config)) || !strings.Contains(config, fmt.Sprintf("spiffe://%s/ns/e2e-a/sa/", trustDomain)) {
		t.Fatalf("the owner's configuration: %d %.300s", code, config)
	}
	if strings.Contains(config, "PRIVATE KEY") {
		t.Error("the configuration holds a key")
	}
	if code, levels := ask("PUT", owner, "/tenants/e2e-a/loglevel?logger=upstream&level=info"); code != http.StatusOK || !strings.Contains(levels, "upstream: info") {
		t.Errorf("the owner sets a log level: %d %.200s", code, levels)
	}
	scraping := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: identity.MetricsServerName}}}
	for account, want := range map[string]int{"scraper": http.StatusOK, "owner": http.StatusForbidden} {
		account, want, token := account, want, token(account, identity.MetricsServerName)
		if err := harness.Wait(t.Context(), patience, 200*time.Millisecond, "metrics for the "+account, func(context.Context) error {
			r, err := newRequest(t, "GET", token, "https://"+address+"/metrics")
			if err != nil {
				return err
			}
			code, body, err := answer(scraping, r)
			if err == nil && (code != want || strings.Contains(body, `bulkhead_tenant_ready{namespace="e2e-b",tenant="e2e-b"} 1`) != (want == http.StatusOK)) {
				err = fmt.Errorf("%d %.200s", code, body)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	if code, heap := ask("GET", owner, "/tenants/e2e-a/heap"); code != http.StatusOK || heap == "" {
		t.Errorf("the owner's heap profile: %d, %d bytes", code, len(heap))
	}
	for _, c := range []struct {
		what, method, token, path string
		want                      int
	}{
		{"another's configuration", "GET", owner, "/tenants/e2e-b/config", http.StatusForbidden},
		{"another's log level", "PUT", owner, "/tenants/e2e-b/loglevel?level=trace", http.StatusForbidden},
		{"without a token", "GET", "", "/tenants/e2e-a/config", http.StatusUnauthorized},
		{"a token for another node", "GET", token("owner", identity.AgentServerName(e.nodes[1])), "/tenants/e2e-a/config", http.StatusUnauthorized},
		{"a token for the API server", "GET", token("owner", ""), "/tenants/e2e-a/config", http.StatusUnauthorized},
		{"who may only view", "GET", token("viewer", name), "/tenants/e2e-a/config", http.StatusForbidden},
		{"an application", "GET", token(webA.Name, name), "/tenants/e2e-a/config", http.StatusForbidden},
	} {
		if code, body := ask(c.method, c.token, c.path); code != c.want {
			t.Errorf("%s: %d %.200s, want %d", c.what, code, body, c.want)
		}
	}
	log := ""
	if err := harness.Wait(t.Context(), patience, 500*time.Millisecond, "the agent's log", func(ctx context.Context) (err error) {
		log, err = e.Kubectl(ctx, "", "logs", "-n", harness.SystemNamespace, agents[node].Name, "--since", "10m")
		for _, want := range []string{
			`"msg":"look into a proxy","user":"system:serviceaccount:e2e-a:owner"`,
			`"msg":"look into a proxy refused","user":"system:serviceaccount:e2e-a:owner"`,
		} {
			if err == nil && !strings.Contains(log, want) {
				err = fmt.Errorf("it lacks %s", want)
			}
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if strings.Contains(log, owner) {
		t.Error("the agent's log holds a token")
	}
}

func newRequest(t *testing.T, method, token, url string) (*http.Request, error) {
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err == nil && token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r, err
}

func answer(client *http.Client, r *http.Request) (int, string, error) {
	a, err := client.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer a.Body.Close()
	body, err := io.ReadAll(a.Body)
	return a.StatusCode, string(body), err
}
