// Package cost is `bulkhead cost`: what TenantProxies say of what was taken, over
// some time, in a table.
package cost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
)

// Options of Run.
type Options struct {
	// Since is for how long back, a duration of Go or a number of days such as 7d; ""
	// is since it is counted.
	Since string
	// Output is table, csv or json.
	Output string
}

// Row is what one tenant took.
type Row struct {
	Namespace string `json:"namespace"`
	Tenant    string `json:"tenant"`
	// From and To are the time that is told of.
	From time.Time `json:"from"`
	To   time.Time `json:"to"`
	// Estimated are CPU and memory of a proxy that namespaces share.
	Estimated  bool    `json:"estimated"`
	CPUSeconds float64 `json:"cpuSeconds"`
	// CPUShare of all rows, 0 to 1.
	CPUShare float64 `json:"cpuShare"`
	// PrivateMebibytes and PSSMebibytes are averages of the time.
	PrivateMebibytes float64 `json:"privateMebibytes"`
	PSSMebibytes     float64 `json:"pssMebibytes"`
	BytesSent        int64   `json:"bytesSent"`
	BytesReceived    int64   `json:"bytesReceived"`
	Connections      int64   `json:"connections"`
}

// Run writes what the tenants of a namespace took; "" is of all namespaces.
func Run(ctx context.Context, reader client.Reader, namespace string, o Options, w io.Writer) error {
	back, err := parseSince(o.Since)
	if err != nil {
		return err
	}
	write, ok := outputs[o.Output]
	if !ok {
		return fmt.Errorf("output %q: must be table, csv or json", o.Output)
	}
	var list v1alpha1.TenantProxyList
	if err := reader.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return fmt.Errorf("list TenantProxies: %w", err)
	}
	rows := Report(list.Items, back, time.Now())
	if len(rows) == 0 {
		return nothing(namespace, len(list.Items) > 0)
	}
	return write(w, rows)
}

// nothing says why there are no rows: of a tenant that there is, the first figures take
// a minute at its agent and another one at the operator.
func nothing(namespace string, tenants bool) error {
	switch {
	case tenants && namespace == "":
		return errors.New("nothing has been counted in any namespace yet; the first figures come within some two minutes of the first proxy's start")
	case tenants:
		return fmt.Errorf("nothing has been counted in namespace %s yet; the first figures come within some two minutes of its first proxy's start", namespace)
	case namespace == "":
		return errors.New("there are no TenantProxies: no namespace of the mesh has pods; see kubectl get meshtopologies")
	}
	return fmt.Errorf("there is no TenantProxy in namespace %s: it doesn't exist, isn't in the mesh or has no pods; choose another by -n, or all by -A", namespace)
}

// parseSince returns 0 for "".
func parseSince(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	var back time.Duration
	var err error
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		n, err = strconv.Atoi(days)
		back = time.Duration(n) * 24 * time.Hour
	} else {
		back, err = time.ParseDuration(s)
	}
	const most = 31 * 24 * time.Hour
	if err != nil || back <= 0 || back > most {
		return 0, fmt.Errorf("since %q: must be a time such as 6h or 7d, at most 31d", s)
	}
	return back, nil
}

// Report makes the rows, in the order of the proxies. back is as Options.Since; 0
// is since it is counted.
func Report(proxies []v1alpha1.TenantProxy, back time.Duration, now time.Time) []Row {
	var rows []Row
	total := 0.0
	for i := range proxies {
		p := &proxies[i]
		c := p.Status.Cost
		if c == nil {
			continue
		}
		from, taken := period(c, back, now)
		r := Row{Namespace: p.Namespace, Tenant: p.Status.Tenant, From: from.UTC(), To: c.At.UTC(), Estimated: c.Estimated,
			CPUSeconds: float64(taken.CPUMilliseconds) / 1000, BytesSent: taken.BytesSent, BytesReceived: taken.BytesReceived, Connections: taken.Connections}
		if seconds := r.To.Sub(r.From).Seconds(); seconds > 0 {
			r.PrivateMebibytes = float64(taken.PrivateMebibyteSeconds) / seconds
			r.PSSMebibytes = float64(taken.PSSMebibyteSeconds) / seconds
		}
		total += r.CPUSeconds
		rows = append(rows, r)
	}
	for i := range rows {
		if total > 0 {
			rows[i].CPUShare = rows[i].CPUSeconds / total
		}
	}
	return rows
}

// period sums up the hours, or beyond a day the days, that the time touches.
func period(c *v1alpha1.TenantCost, back time.Duration, now time.Time) (from time.Time, sum v1alpha1.Taken) {
	if back == 0 {
		return c.Since.Time, c.Total
	}
	periods, unit := c.Hours, time.Hour
	if back > 24*time.Hour {
		periods, unit = c.Days, 24*time.Hour
	}
	from = now.UTC().Add(-back).Truncate(unit)
	for _, p := range periods {
		if p.Start.Time.Before(from) {
			continue
		}
		sum.CPUMilliseconds += p.CPUMilliseconds
		sum.PrivateMebibyteSeconds += p.PrivateMebibyteSeconds
		sum.PSSMebibyteSeconds += p.PSSMebibyteSeconds
		sum.BytesSent += p.BytesSent
		sum.BytesReceived += p.BytesReceived
		sum.Connections += p.Connections
	}
	if from.Before(c.Since.Time) {
		from = c.Since.Time
	}
	return from, sum
}
