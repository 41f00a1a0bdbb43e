// Package figures shows what a rollout is judged by.
package figures

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/controllers/translate"
	"github.com/bulkhead-mesh/bulkhead/model"
)

// Write writes how the new version and the one beside it fare, a line for each
// tenant of namespace, or of all. Who may not read NodeProxies is told nothing.
func Write(ctx context.Context, c client.Reader, r *v1alpha1.ProxyRollout, namespace string, w io.Writer) error {
	var nodes v1alpha1.NodeProxyList
	switch err := c.List(ctx, &nodes); {
	case apierrors.IsForbidden(err):
		return nil
	case err != nil:
		return fmt.Errorf("list NodeProxies: %w", err)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	of := func(bad, all int64) string { return fmt.Sprintf("%d of %d", bad, all) }
	rows := 0
	for _, f := range translate.CompareFigures(r, nodes.Items) {
		tenant, err := model.ParseTenant(f.Tenant)
		if err != nil || namespace != "" && tenant.Namespace != namespace {
			continue
		}
		if rows++; rows == 1 {
			fmt.Fprintln(t, "\nFAILED, OLD | NEW\tUNANSWERED\tRESET\tUPSTREAM\tHANDSHAKES\tTUNNELLED\tHTTP 5XX\tCPU MS\tMEMORY")
		}
		o, n := &f.Old, &f.New
		columns := []string{f.Tenant}
		for _, both := range [][2]string{
			{of(o.Unanswered, o.Connections), of(n.Unanswered, n.Connections)},
			{of(o.Resets, o.Connections), of(n.Resets, n.Connections)},
			{of(o.UpstreamFailures, o.Upstreams), of(n.UpstreamFailures, n.Upstreams)},
			{of(o.HandshakeFailures, o.Handshakes+o.HandshakeFailures), of(n.HandshakeFailures, n.Handshakes+n.HandshakeFailures)},
			{of(o.TunnelErrors, o.Tunnelled), of(n.TunnelErrors, n.Tunnelled)},
			{of(o.ServerErrors, o.Requests), of(n.ServerErrors, n.Requests)},
			{fmt.Sprint(o.CPUMilliseconds), fmt.Sprint(n.CPUMilliseconds)},
			{fmt.Sprintf("%d MiB", o.PrivateBytes>>20), fmt.Sprintf("%d MiB", n.PrivateBytes>>20)},
		} {
			columns = append(columns, both[0]+" | "+both[1])
		}
		fmt.Fprintln(t, strings.Join(columns, "\t"))
	}
	return t.Flush()
}
