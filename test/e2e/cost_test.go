package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/cost"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/harness"
)

// Who may view a namespace sees what its proxies took, with the command line, and
// not what others took.
func TestOwnersSeeTheirCosts(t *testing.T) {
	if err := e.Apply(t.Context(), owners); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cli := filepath.Join(dir, "bulkhead")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", cli, "../../cmd/bulkhead").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	token, err := e.Kubectl(t.Context(), "", "create", "token", "viewer", "-n", "e2e-a", "--duration", "10m")
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.NewDefaultClientConfigLoadingRules().Load()
	if err != nil {
		t.Fatal(err)
	}
	for name := range config.AuthInfos {
		config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: strings.TrimSpace(token)}
	}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
		t.Fatal(err)
	}
	run := func(ctx context.Context, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, cli, append([]string{"cost", "--kubeconfig", kubeconfig}, args...)...)
		out, err := cmd.Output()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return out, err
	}
	const calls, bytes = 20, 4 << 20
	rows := func(ctx context.Context) (r cost.Row, err error) {
		out, err := run(ctx, "-n", "e2e-a", "-o", "json")
		if err != nil {
			return r, err
		}
		var all []cost.Row
		if err := json.Unmarshal(out, &all); err != nil {
			return r, err
		}
		i := slices.IndexFunc(all, func(r cost.Row) bool { return r.Tenant == "e2e-a" })
		if i < 0 || slices.ContainsFunc(all, func(r cost.Row) bool { return r.Namespace != "e2e-a" }) {
			return r, fmt.Errorf("rows %s", out)
		}
		return all[i], nil
	}
	for range calls {
		mustCall(t, e.pod(webA, 0), "", "tcp", hostPort(e.pod(webB, 1).IPv4, app.GreetPort))
	}
	mustCall(t, e.pod(webA, 0), "", "bulk", fmt.Sprint("--up=", bytes), hostPort(e.pod(webB, 1).IPv4, app.BulkPort))
	// Agents tell once a minute, and so does the operator. What exactly is counted is
	// test/kernel's matter.
	err = harness.Wait(t.Context(), 2*patience, time.Second, "the calls on the bill", func(ctx context.Context) error {
		now, err := rows(ctx)
		if err == nil && (now.Connections < calls+1 || now.BytesSent < bytes || now.CPUSeconds == 0 || now.PrivateMebibytes < 1) {
			err = fmt.Errorf("it is %+v", now)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{{"-n", "e2e-b"}, {"-A"}} {
		if out, err := run(t.Context(), args...); err == nil || !strings.Contains(err.Error(), "forbidden") {
			t.Errorf("a viewer of e2e-a asks for %v: %s %v", args, out, err)
		}
	}
	out, err := run(t.Context(), "-n", "e2e-a", "--since", "1h")
	if err != nil || !strings.Contains(string(out), "NAMESPACE") {
		t.Errorf("the table: %s %v", out, err)
	}
	t.Logf("\n%s", out)
}
