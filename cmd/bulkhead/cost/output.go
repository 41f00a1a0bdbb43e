package cost

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

var outputs = map[string]func(io.Writer, []Row) error{"table": table, "csv": commas, "json": object}

func table(w io.Writer, rows []Row) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "NAMESPACE\tTENANT\tCPU\tCPU%\tPRIVATE\tPSS\tSENT\tRECEIVED\tCONNECTIONS\tFROM")
	for _, r := range rows {
		mark := ""
		if r.Estimated {
			mark = "~"
		}
		fmt.Fprintf(t, "%s\t%s\t%s%s\t%s%.1f\t%s%.1fMi\t%s%.1fMi\t%s\t%s\t%d\t%s\n", r.Namespace, r.Tenant,
			mark, (time.Duration(r.CPUSeconds*1000) * time.Millisecond).Round(100*time.Millisecond), mark, 100*r.CPUShare, mark, r.PrivateMebibytes, mark, r.PSSMebibytes,
			size(r.BytesSent), size(r.BytesReceived), r.Connections, r.From.Format("2006-01-02 15:04Z"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, r := range rows {
		if r.isEmpty() {
			if _, err := fmt.Fprintf(w, "tenant %s of namespace %s: counting began at %s; nothing yet, figures come about once a minute\n", r.Tenant, r.Namespace, r.From.Format("15:04:05Z")); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(rows, func(r Row) bool { return r.Estimated }) {
		_, err := fmt.Fprintln(w, "~ estimated: the namespace shares its proxies with others, by bytes and connections")
		return err
	}
	return nil
}

// isEmpty reports whether it tells of no time at all.
func (r Row) isEmpty() bool {
	return r.To.Equal(r.From) && r.CPUSeconds == 0 && r.BytesSent == 0 && r.BytesReceived == 0 && r.Connections == 0
}

// size is a number of bytes for people.
func size(bytes int64) string {
	v, unit := float64(bytes), 0
	for v >= 1024 && unit < 5 {
		v /= 1024
		unit++
	}
	if unit == 0 {
		return strconv.FormatInt(bytes, 10)
	}
	return fmt.Sprintf("%.1f%ci", v, " KMGTP"[unit])
}

func commas(w io.Writer, rows []Row) error {
	c := csv.NewWriter(w)
	c.Write([]string{"namespace", "tenant", "from", "to", "estimated", "cpu_seconds", "cpu_share", "private_mebibytes", "pss_mebibytes", "bytes_sent", "bytes_received", "connections"})
	float := func(f float64) string { return strconv.FormatFloat(f, 'f', 3, 64) }
	for _, r := range rows {
		c.Write([]string{r.Namespace, r.Tenant, r.From.Format(time.RFC3339), r.To.Format(time.RFC3339), strconv.FormatBool(r.Estimated),
			float(r.CPUSeconds), float(r.CPUShare), float(r.PrivateMebibytes), float(r.PSSMebibytes),
			strconv.FormatInt(r.BytesSent, 10), strconv.FormatInt(r.BytesReceived, 10), strconv.FormatInt(r.Connections, 10)})
	}
	c.Flush()
	return c.Error()
}

func object(w io.Writer, rows []Row) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(rows)
}
