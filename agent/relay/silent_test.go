package relay

import (
	"net"
	"testing"
	"time"
)

// A proxy that connects and says nothing holds up nobody who stops serving it: the agent
// does so between its tenants.
func TestSilentProxyHoldsNobodyUp(t *testing.T) {
	f := setUp(t, nil)
	key := Key{Tenant: teamA}
	c, err := net.Dial("unix", f.listen(key))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l := f.relay.endpoint(key).listener.(*peerListener)
	eventually(t, "the connection is accepted", func() bool { return l.conns.Load() == 1 })
	begin := time.Now()
	f.relay.Close(key)
	if took := time.Since(begin); took > connectTimeout/2 {
		t.Errorf("it took %s", took)
	}
	if n := l.conns.Load(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}
