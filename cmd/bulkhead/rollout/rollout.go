// Package rollout is `bulkhead rollout`: where upgrades of proxies are, and the words
// that hold them, let them go on or take them back.
package rollout

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/duration"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/live"
	"github.com/bulkhead-mesh/bulkhead/cmd/bulkhead/rollout/figures"
)

// ErrNone is returned if there is no rollout to tell of.
var ErrNone = errors.New("there is no ProxyRollout")

// all are the rollouts, the oldest first.
func all(ctx context.Context, c client.Reader) ([]v1alpha1.ProxyRollout, error) {
	var list v1alpha1.ProxyRolloutList
	if err := c.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list ProxyRollouts: %w", err)
	}
	slices.SortFunc(list.Items, func(a, b v1alpha1.ProxyRollout) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	return list.Items, nil
}

// find returns the rollout of a name; for "" the one that is at work, or else the
// newest.
func find(ctx context.Context, c client.Reader, name string) (*v1alpha1.ProxyRollout, error) {
	list, err := all(ctx, c)
	if err != nil {
		return nil, err
	}
	if name != "" {
		i := slices.IndexFunc(list, func(r v1alpha1.ProxyRollout) bool { return r.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("%w of the name %s", ErrNone, name)
		}
		return &list[i], nil
	}
	if len(list) == 0 {
		return nil, ErrNone
	}
	for i := range list {
		if isAtWork(list[i].Status.Phase) {
			return &list[i], nil
		}
	}
	return &list[len(list)-1], nil
}

func isAtWork(p v1alpha1.RolloutPhase) bool {
	switch p {
	case "", v1alpha1.RolloutPending, v1alpha1.RolloutSucceeded, v1alpha1.RolloutRolledBack, v1alpha1.RolloutAborted:
		return false
	}
	return true
}

func isDone(p v1alpha1.RolloutPhase) bool {
	return p != "" && p != v1alpha1.RolloutPending && !isAtWork(p)
}

// Status writes how a rollout is, and each tenant of namespace in it; "" is all of
// them.
func Status(ctx context.Context, c client.Reader, name, namespace string, w io.Writer) error {
	r, err := find(ctx, c, name)
	if err != nil {
		return err
	}
	return writeStatus(ctx, c, r, namespace, w)
}

// Watch writes how a rollout is, as Status does, whenever that has changed, until the
// rollout is done or ctx is, also over times in which the API server can't be asked, of
// which it tells problems. Without a name it stays with the one that it finds first.
// What can't be seen at all, and a rollout that is deleted, are errors.
func Watch(ctx context.Context, c client.Reader, name, namespace string, w, problems io.Writer) error {
	return watch(ctx, c, name, namespace, live.Pace{}, w, problems)
}

func watch(ctx context.Context, c client.Reader, name, namespace string, p live.Pace, w, problems io.Writer) error {
	return live.Follow(ctx, func(ctx context.Context) ([]byte, bool, error) {
		r, err := find(ctx, c, name)
		if err != nil {
			return nil, false, err
		}
		name = r.Name
		var b bytes.Buffer
		err = writeStatus(ctx, c, r, namespace, &b)
		return b.Bytes(), isDone(r.Status.Phase), err
	}, p, func(err error) bool { return errors.Is(err, ErrNone) }, w, problems)
}

func writeStatus(ctx context.Context, c client.Reader, r *v1alpha1.ProxyRollout, namespace string, w io.Writer) error {
	s := r.Status
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "Rollout:\t%s\n", r.Name)
	fmt.Fprintf(t, "Envoy:\t%s\n", cmp.Or(s.Version, r.Spec.Target.Version))
	fmt.Fprintf(t, "Phase:\t%s\n", cmp.Or(string(s.Phase), "not seen by the operator yet"))
	if s.Step > 0 && !isDone(s.Phase) && s.StoppedAt == nil { // else it says nothing of what is so now
		fmt.Fprintf(t, "Step:\t%d of %d, %d %% of new connections, reached by tenants: %d of %d\n", s.Step, len(r.Spec.Steps), s.Weight, s.ReachedTenants, s.Tenants)
	}
	if s.StartedAt != nil {
		fmt.Fprintf(t, "Since:\t%s\n", s.StartedAt.UTC().Format(time.RFC3339))
	}
	if s.FinishedAt != nil {
		fmt.Fprintf(t, "Until:\t%s\n", s.FinishedAt.UTC().Format(time.RFC3339))
	}
	if v := s.Verdict; v != nil {
		where := ""
		if v.Tenant != "" {
			where = " (" + v.Tenant + " on " + v.Node + ")"
		}
		fmt.Fprintf(t, "Verdict:\t%s%s: %s\n", v.Reason, where, v.Message)
	}
	for _, h := range s.HeldBack {
		fmt.Fprintf(t, "Left behind:\t%s, %s on %s: %s\n", h.Tenant, h.Reason, h.Node, h.Message)
	}
	fmt.Fprintf(t, "Now:\t%s\n", cmp.Or(s.Message, "nothing has been decided; is the operator running?"))
	if err := t.Flush(); err != nil {
		return err
	}
	var proxies v1alpha1.TenantProxyList
	if err := c.List(ctx, &proxies, client.InNamespace(namespace)); err != nil {
		return fmt.Errorf("list TenantProxies: %w", err)
	}
	rows := 0
	for _, p := range proxies.Items {
		u := p.Status.Upgrade
		if u == nil || u.Rollout != r.Name {
			continue
		}
		if rows++; rows == 1 {
			fmt.Fprintln(t, "\nNAMESPACE\tTENANT\tFROM\tTO\tWEIGHT\tVERDICT")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d %%\t%s\n", p.Namespace, cmp.Or(p.Status.Tenant, p.Name), u.From, u.To, u.Weight, u.Verdict)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return figures.Write(ctx, c, r, namespace, w)
}

// History writes a line for each rollout, the newest first.
func History(ctx context.Context, c client.Reader, now time.Time, w io.Writer) error {
	list, err := all(ctx, c)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return ErrNone
	}
	slices.Reverse(list)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tENVOY\tPHASE\tAGE\tTOOK\tVERDICT")
	for _, r := range list {
		s := r.Status
		took, verdict := "-", "-"
		if s.StartedAt != nil && s.FinishedAt != nil {
			took = duration.HumanDuration(s.FinishedAt.Sub(s.StartedAt.Time))
		}
		if s.Verdict != nil {
			verdict = s.Verdict.Reason
			if s.Verdict.Tenant != "" {
				verdict += " (" + s.Verdict.Tenant + " on " + s.Verdict.Node + ")"
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, cmp.Or(s.Version, r.Spec.Target.Version), cmp.Or(string(s.Phase), "-"),
			duration.HumanDuration(now.Sub(r.CreationTimestamp.Time)), took, verdict)
	}
	return t.Flush()
}

// Pause holds a rollout where it is, and lets it go on.
func Pause(ctx context.Context, c client.Client, name string, paused bool, w io.Writer) error {
	word := "paused: what it has begun stays, verdicts still take it back"
	if !paused {
		word = "goes on"
	}
	return change(ctx, c, name, map[string]any{"paused": paused}, word, w)
}

// Abort takes a rollout back, for good.
func Abort(ctx context.Context, c client.Client, name string, w io.Writer) error {
	return change(ctx, c, name, map[string]any{"abort": true}, "is taken back: new connections go to the version before", w)
}

// Approve lets a rollout leave the step that it waits at.
func Approve(ctx context.Context, c client.Client, name string, w io.Writer) error {
	r, err := find(ctx, c, name)
	if err != nil {
		return err
	}
	// Steps may have changed since the operator looked at them.
	step := int(r.Status.Step)
	// One that waits and was never reached has nobody to try it.
	if r.Status.Phase != v1alpha1.RolloutWaiting || step < 1 || step > len(r.Spec.Steps) || !r.Spec.Steps[step-1].Approval && r.Status.ReachedAt != nil || r.Spec.ApprovedSteps >= r.Status.Step {
		return fmt.Errorf("ProxyRollout %s doesn't wait for approval: %s", r.Name, cmp.Or(r.Status.Message, "nothing has been decided; is the operator running?"))
	}
	return change(ctx, c, r.Name, map[string]any{"approvedSteps": r.Status.Step}, fmt.Sprintf("may leave step %d", r.Status.Step), w)
}

// change patches a rollout that isn't done.
func change(ctx context.Context, c client.Client, name string, spec map[string]any, word string, w io.Writer) error {
	r, err := find(ctx, c, name)
	if err != nil {
		return err
	}
	if isDone(r.Status.Phase) {
		return fmt.Errorf("ProxyRollout %s is done (%s); to bring another version, also the one before, create another", r.Name, r.Status.Phase)
	}
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		return err
	}
	if err := c.Patch(ctx, r, client.RawPatch(types.MergePatchType, patch)); err != nil {
		return fmt.Errorf("change ProxyRollout %s: %w", r.Name, err)
	}
	_, err = fmt.Fprintf(w, "ProxyRollout %s %s\n", r.Name, word)
	return err
}
