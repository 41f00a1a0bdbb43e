package kernel

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/agent"
	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
)

// takeGroup takes the group of nfnetlink_log that tells of connections, in a network
// namespace, as another program may.
func takeGroup(t *testing.T, n *lab.Namespace) (release func()) {
	t.Helper()
	const group, configure, command, bind = 45520, 1, 1, 1
	var c *netlink.Conn
	n.Do(t, func() {
		var err error
		c, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
		lab.Check(t, err)
		attribute, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: command, Data: []byte{bind}}})
		lab.Check(t, err)
		_, err = c.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_SUBSYS_ULOG<<8 | configure, Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, group), attribute...),
		})
		lab.Check(t, err)
	})
	return func() { lab.Check(t, c.Close()) }
}

// Another program has the group of nfnetlink_log: who wants to watch is told so, and
// connections go on. In a tenant's namespace alone, the other tenants are told of.
func TestEventGroupIsTaken(t *testing.T) {
	l := lab.NewWith(t, lab.Options{Redirection: v1alpha1.RedirectionNetfilter})
	n := l.Node1
	passes := func() {
		t.Helper()
		for _, f := range flows(l) {
			f.check(t, 4)
			f.check(t, 6)
		}
	}
	release := takeGroup(t, n.Namespace)
	o := agent.Options{RunDir: filepath.Join(n.Dir, "run")}
	ctx, cancel := context.WithTimeout(t.Context(), lab.Patience)
	defer cancel()
	err := agent.Control(ctx, o.ControlSocket(), http.MethodGet, "/events", url.Values{}, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "take group 45520 of nfnetlink_log, which another process has") {
		t.Errorf("who watches is told %v", err)
	}
	passes()
	before := n.Tenant("team-a").Drops["spoofed"]
	if err := connectAs(t, l.A1.Namespace, l.A2.V4, lab.At(l.Outside.V4, app.GreetPort)); err == nil {
		t.Error("connected from another pod's address")
	}
	lab.Eventually(t, "the count of a spoofed packet", func() error {
		if now := n.Tenant("team-a").Drops["spoofed"]; now <= before {
			return fmt.Errorf("%d as before", now)
		}
		return nil
	})
	release()

	release = takeGroup(t, n.Proxy("team-a"))
	log, stop := watchEvents(t, l) // it sees one of team-b's
	passes()
	log.await(t, "of the other tenant", func(e agent.ConnectionEvent) bool {
		return e.Event == "closed" && e.Way == "delivered" && e.PodUID == "b1"
	})
	if log.has(func(e agent.ConnectionEvent) bool { return e.Tenant == "team-a" && e.Way == "outbound" }) {
		t.Error("a tenant is told of whose group another process has")
	}
	const metric = `bulkhead_tenant_events_lost_total{namespace="team-a",tenant="team-a"} `
	// Once nothing comes between the two.
	lab.Eventually(t, "lost events", func() error {
		lost, metrics := n.Tenant("team-a").EventsLost, n.Metrics(t)
		if lost == 0 || !strings.Contains(metrics, metric+fmt.Sprint(lost)+"\n") {
			return fmt.Errorf("%d are lost, and the metrics say\n%s", lost, metrics)
		}
		return nil
	})
	if text := n.AgentLog(t); !strings.Contains(text, "A tenant's connection events aren't read") {
		t.Errorf("the agent's log doesn't tell of it: %s", text)
	}
	stop()
	release()
	log, _ = watchEvents(t, l)
	flow{from: l.A1, to: l.Outside}.check(t, 4)
	log.await(t, "of the tenant", func(e agent.ConnectionEvent) bool {
		return e.Event == "closed" && e.Way == "outbound" && e.PodUID == "a1"
	})
}
