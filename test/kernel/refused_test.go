package kernel

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/api/v1alpha1"
	"github.com/bulkhead-mesh/bulkhead/model"
	"github.com/bulkhead-mesh/bulkhead/test/capture"
	"github.com/bulkhead-mesh/bulkhead/test/echo/app"
	"github.com/bulkhead-mesh/bulkhead/test/lab"
	"github.com/bulkhead-mesh/bulkhead/xds"
)

// refusal is something that the kernel's steering drops.
type refusal struct {
	name   string
	tenant string
	// reason is the counter of the tenant that tells of it.
	reason string
	try    func(t *testing.T, family int)
}

// What pods and hostile proxies may not do reaches nobody, and is counted.
func TestRefusedAndCounted(t *testing.T) { eachRedirection(t, testRefusedAndCounted) }

func testRefusedAndCounted(t *testing.T, l *lab.Lab) {
	a, b := l.Node1.Proxy("team-a"), l.Node1.Proxy("team-b")
	unknown := lab.Addresses("10.77.1.99", "fd77:1::99")
	var refusals []refusal
	// A connection from an address that isn't the sender's.
	spoof := func(name, tenant, reason string, from *lab.Namespace, as, to lab.Pair) {
		refusals = append(refusals, refusal{name, tenant, reason, func(t *testing.T, family int) {
			if err := connectAs(t, from, as.Of(family), lab.At(to.Of(family), app.GreetPort)); err == nil {
				t.Error("connected")
			}
		}})
	}
	spoof("pod as a pod of its tenant", "team-a", "spoofed", l.A1.Namespace, l.A2.Pair, l.Outside.Pair)
	spoof("pod as another tenant's pod", "team-b", "spoofed", l.B1.Namespace, l.A1.Pair, l.Outside.Pair)
	spoof("pod as nobody", "team-a", "spoofed", l.A1.Namespace, unknown, l.A2.Pair)
	spoof("pod as nobody to its node", "team-a", "spoofed", l.A1.Namespace, unknown, l.Node1.Pair)
	for _, to := range []*lab.Host{l.Outside, l.B1, l.B2, l.Node1.Host} {
		spoof("proxy as nobody to "+to.Name, "team-a", "foreign", a, unknown, to.Pair)
		spoof("proxy as another tenant's pod to "+to.Name, "team-a", "foreign", a, l.B2.Pair, to.Pair)
	}
	// The address from which nodes' connections are delivered to own pods.
	for _, to := range []*lab.Host{l.Outside, l.A1, l.B2, l.Node1.Host} {
		spoof("proxy from the deliver address to "+to.Name, "team-b", "deliver", b, lab.Addresses("169.254.96.1", "fd69:8::1"), to.Pair)
	}
	refusals = append(refusals, refusal{"TCP fragment", "team-a", "fragment", func(t *testing.T, family int) {
		sendFragment(t, l.A1.Namespace, l.A1.Of(family), l.Outside.Of(family))
	}})
	refusals = append(refusals, refusal{"pod as nobody, behind options or extension headers", "team-a", "spoofed", func(t *testing.T, family int) {
		sendBehindHeaders(t, l.A1.Namespace, unknown.Of(family), l.Outside.Of(family))
	}}, refusal{"TCP under a second VLAN tag", "team-a", "malformed", func(t *testing.T, family int) {
		sendTagged(t, l.A1.Namespace, family)
	}})
	if l.Node1.Redirection == v1alpha1.RedirectionEBPF {
		// Where there are rules for TPROXY, the kernel puts packets together before they
		// leave the tenant's namespace.
		refusals = append(refusals, refusal{"proxy's TCP fragment", "team-a", "fragment", func(t *testing.T, family int) {
			sendFragment(t, a, l.A1.Of(family), l.Outside.Of(family))
		}})
	}
	eachFamily(t, func(t *testing.T, family int) {
		for _, r := range refusals {
			t.Run(r.name, func(t *testing.T) {
				before := l.Node1.Tenant(r.tenant).Drops[r.reason]
				lab.Eventually(t, "the count of "+r.reason, func() error {
					r.try(t, family) // on a busy machine its time may be over before it has begun
					if drops := l.Node1.Tenant(r.tenant).Drops; drops[r.reason] <= before {
						return fmt.Errorf("%d as before: %v", before, drops)
					}
					return nil
				})
			})
		}
	})
}

// connectAs begins a connection from any address.
func connectAs(t *testing.T, n *lab.Namespace, from netip.Addr, to netip.AddrPort) (err error) {
	t.Helper()
	n.Do(t, func() {
		d := net.Dialer{Timeout: 50 * time.Millisecond, LocalAddr: net.TCPAddrFromAddrPort(lab.At(from, 0)), Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			})
		}}
		var c net.Conn
		if c, err = d.Dial("tcp", to.String()); err == nil {
			c.Close()
		}
	})
	return err
}

// sendFragment sends the first fragment of a TCP packet.
func sendFragment(t *testing.T, n *lab.Namespace, from, to netip.Addr) {
	t.Helper()
	ip := []byte{0x45, 6: 0x20, 19: 0}
	if to.Is6() {
		ip = []byte{unix.IPPROTO_TCP, 3: 1, 7: 0}
	}
	sendSYN(t, n, from, to, unix.IPPROTO_FRAGMENT, ip, 4)
}

// sendBehindHeaders sends a SYN behind IPv4's options, or two headers of IPv6.
func sendBehindHeaders(t *testing.T, n *lab.Namespace, from, to netip.Addr) {
	t.Helper()
	ip := []byte{0x46, 20: 1, 21: 1, 22: 1, 23: 1} // padded
	if to.Is6() {
		ip = []byte{unix.IPPROTO_DSTOPTS, 2: 1, 3: 4, 8: unix.IPPROTO_TCP, 10: 1, 11: 4, 15: 0} // PadN
	}
	sendSYN(t, n, from, to, unix.IPPROTO_HOPOPTS, ip, 0)
}

// sendSYN sends a TCP header and some bytes behind IPv4's header, of which the rest is
// filled in, or behind IPv6's and headers of which first is the kind of the first.
func sendSYN(t *testing.T, n *lab.Namespace, from, to netip.Addr, first byte, headers []byte, bytes int) {
	t.Helper()
	tcp := make([]byte, 20+bytes)
	binary.BigEndian.PutUint16(tcp, 40000)
	binary.BigEndian.PutUint16(tcp[2:], app.GreetPort)
	tcp[12], tcp[13] = 5<<4, 2
	family, packet := unix.AF_INET, headers
	var address unix.Sockaddr
	if to.Is4() {
		address = &unix.SockaddrInet4{Addr: to.As4()}
		packet[8], packet[9] = 64, unix.IPPROTO_TCP
		copy(packet[12:], from.AsSlice())
		copy(packet[16:], to.AsSlice())
	} else {
		family, address = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.As16()}
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, first, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(headers)+len(tcp)))
		copy(ip[8:], from.AsSlice())
		copy(ip[24:], to.AsSlice())
		packet = append(ip, headers...)
	}
	n.Do(t, func() {
		fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
		lab.Check(t, err)
		defer unix.Close(fd)
		lab.Check(t, unix.Sendto(fd, append(packet, tcp...), 0, address))
	})
}

// sendTagged sends a frame with two tags, of which the kernel takes off one.
func sendTagged(t *testing.T, n *lab.Namespace, family int) {
	t.Helper()
	etherType := map[int]uint16{4: unix.ETH_P_IP, 6: unix.ETH_P_IPV6}[family]
	frame := append(bytes.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 0, 1)
	for _, v := range []uint16{unix.ETH_P_8021Q, 5, unix.ETH_P_8021Q, 6, etherType} {
		frame = binary.BigEndian.AppendUint16(frame, v)
	}
	frame = append(frame, make([]byte, 60)...)
	n.Do(t, func() {
		eth0, err := net.InterfaceByName("eth0")
		lab.Check(t, err)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		lab.Check(t, err)
		defer unix.Close(fd)
		lab.Check(t, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Index}))
	})
}

// A tunnel leads to the pod that it was made to, and nowhere else.
func TestForeignAuthority(t *testing.T) { eachRedirection(t, testForeignAuthority) }

func testForeignAuthority(t *testing.T, l *lab.Lab) {
	own := certificate(t, l, l.B2.Identity)
	stranger := certificate(t, l, model.Identity{TrustDomain: lab.TrustDomain, Namespace: "team-b", ServiceAccount: "db"})
	stranger.Certificate = stranger.Certificate[:1] // without what signed it
	var refused []string
	eachFamily(t, func(t *testing.T, family int) {
		a1, a2 := l.A1.Of(family), l.A2.Of(family)
		for _, c := range []struct {
			name        string
			certificate *tls.Certificate
			authority   string
			want        int // 0: no connection
		}{
			{"its own", own, lab.At(a1, app.GreetPort).String(), 200},
			{"another pod of the tenant", own, lab.At(a2, app.GreetPort).String(), 403},
			{"another tenant's pod", own, lab.At(l.B1.Of(family), app.GreetPort).String(), 403},
			{"outside", own, lab.At(l.Outside.Of(family), app.GreetPort).String(), 403},
			{"loopback", own, fmt.Sprintf("127.0.0.1:%d", app.GreetPort), 403},
			{"a name", own, "localhost:8082", 403},
			{"its own, without a certificate", nil, lab.At(a1, app.GreetPort).String(), 0},
			{"its own, with half a chain", stranger, lab.At(a1, app.GreetPort).String(), 0},
		} {
			t.Run(c.name, func(t *testing.T) {
				got, greeting, err := tunnel(t, l.Outside, c.certificate, lab.At(a1, xds.PortInbound), c.authority)
				if application := strings.Contains(greeting, `"pod":"a1"`); got != c.want || application != (c.want == 200) || strings.Contains(greeting, `"pod":`) != application {
					t.Errorf("got %d, %q, %v; want %d", got, greeting, err, c.want)
				}
				if c.want == 403 {
					refused = append(refused, c.authority)
				}
			})
		}
	})
	for _, authority := range refused {
		lab.Eventually(t, "a line of the proxy's log", func() error {
			for _, line := range l.Node1.AccessLog("team-a") {
				if line["authority"] == authority && line["code"] == "403" && line["peer"] == l.B2.Identity.String() {
					return nil
				}
			}
			return fmt.Errorf("none names %s", authority)
		})
	}
}

// certificate is what a pod with that identity has.
func certificate(t *testing.T, l *lab.Lab, id model.Identity) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	lab.Check(t, err)
	u, err := url.Parse(id.String())
	lab.Check(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}}, key)
	lab.Check(t, err)
	chain, err := l.Authority.Sign(csr, id, time.Hour, time.Now())
	lab.Check(t, err)
	return &tls.Certificate{Certificate: chain, PrivateKey: key}
}

// tunnel asks a pod's end of tunnels for an authority, and reads what the
// application there says first.
func tunnel(t *testing.T, h *lab.Host, certificate *tls.Certificate, to netip.AddrPort, authority string) (code int, greeting string, err error) {
	t.Helper()
	config := &tls.Config{NextProtos: []string{"h2"}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if certificate != nil {
		config.Certificates = []tls.Certificate{*certificate}
	}
	c := tls.Client(dial(t, h, to.String()), config)
	if err := c.Handshake(); err != nil {
		return 0, "", err
	}
	client, err := (&http2.Transport{}).NewClientConn(c)
	if err != nil {
		return 0, "", err
	}
	body, w := io.Pipe()
	defer w.Close()
	r, err := client.RoundTrip(&http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Body: body})
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		b, err := io.ReadAll(r.Body)
		return r.StatusCode, string(b), err
	}
	b := make([]byte, 512)
	n, err := r.Body.Read(b)
	return r.StatusCode, string(b[:n]), err
}

// Without a proxy nothing passes, not even what connections that were there before
// go on to send.
func TestClosedWithoutProxy(t *testing.T) { eachRedirection(t, testClosedWithoutProxy) }

func testClosedWithoutProxy(t *testing.T, l *lab.Lab) {
	const marker = "bulkhead-in-the-clear"
	flows := []flow{
		{name: "other node", from: l.A1, to: l.B2},
		{name: "same node", from: l.A1, to: l.B1},
		{name: "to outside", from: l.A1, to: l.Outside},
		{name: "from outside", from: l.Outside, to: l.A1},
		{name: "from the other node", from: l.B2, to: l.A1},
	}
	// Connections in both families, which send all the time from now on.
	var held []*net.TCPConn
	for _, f := range flows {
		for _, family := range []int{4, 6} {
			c := dial(t, f.from, f.address(family, app.GreetPort).String())
			_, err := c.Read(make([]byte, 1)) // of the greeting: it is there as a whole
			lab.Check(t, err)
			held = append(held, c)
		}
	}
	pid := l.Node1.Running("team-a").PID
	l.Node1.Kill() // or it would start the proxy again
	lab.Check(t, unix.Kill(pid, unix.SIGKILL))
	lab.Eventually(t, "the proxy's end", func() error {
		if files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil && len(files) > 0 {
			return fmt.Errorf("it has %d files open", len(files))
		}
		return nil
	})

	reports := captureAt(t, l, marker, func() {
		// What isn't the mesh's is in the clear: the capture sees it.
		if r := l.Node1.Call(t, "tcp", "--data", marker, lab.At(l.Outside.V4, app.GreetPort).String()); !r.OK {
			t.Errorf("%+v", r.Failure)
		}
		for _, c := range held {
			c.SetDeadline(time.Now().Add(30 * time.Second)) // silence is no error here
			for {
				if _, err := c.Write([]byte(marker + "\n")); err != nil {
					break // reset
				}
				if _, err := c.Read(make([]byte, 4096)); err != nil {
					break
				}
			}
		}
		for _, f := range flows {
			for _, family := range []int{4, 6} {
				r := f.from.Call(t, "tcp", "--data", marker, "--timeout=1s", f.address(family, app.GreetPort).String())
				if r.OK {
					t.Errorf("%s, IPv%d: connected", f.name, family)
				}
			}
		}
	})
	control := 0
	for where, r := range reports {
		if r.Dropped > 0 || r.Full {
			t.Errorf("the capture at %s isn't complete: %+v", where.Name, r)
		}
		for _, c := range r.Flows {
			tunnel := c.FromPort == xds.PortInbound || c.ToPort == xds.PortInbound
			switch {
			case c.From == l.Node1.V4:
				control += c.Marked
			case c.To == l.Node1.V4:
			case tunnel && c.Marked == 0:
			// What a host sends is in the clear up to where it is refused.
			case where == l.A1 && l.A1.Has(c.From):
			case where != l.A1 && l.Outside.Has(c.From):
			default:
				t.Errorf("at %s: %d bytes from %s:%d to %s:%d, %d packets of them with the marker", where.Name, c.Bytes, c.From, c.FromPort, c.To, c.ToPort, c.Marked)
			}
		}
	}
	if control == 0 {
		t.Error("the captures saw nothing at all")
	}
	// The kernel counts what it refused; the agent that comes back tells.
	l.Node1.Start()
	l.Node1.WaitReady()
	if n := l.Node1.Tenant("team-a").Drops["refused"]; n == 0 {
		t.Error("no refused connection was counted")
	}
	for _, f := range flows {
		f.check(t, 4)
		f.check(t, 6)
	}
}

// captureAt looks at the interfaces of five hosts while f runs.
func captureAt(t *testing.T, l *lab.Lab, marker string, f func()) map[*lab.Host]capture.Report {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type outcome struct {
		report capture.Report
		err    error
	}
	outcomes, reports := map[*lab.Host]chan outcome{}, map[*lab.Host]capture.Report{}
	for _, h := range []*lab.Host{l.Node1.Host, l.Node2.Host, l.Outside, l.A1, l.B1} {
		ready, done := make(chan struct{}), make(chan outcome, 1)
		outcomes[h] = done
		lab.Enter(t, h.Path).Go(func() {
			r, err := capture.Run(ctx, capture.Options{Address: h.V4, Marker: marker}, func() { close(ready) })
			done <- outcome{r, err}
		})
		select {
		case <-ready:
		case o := <-done:
			t.Fatal(o.err)
		}
	}
	f()
	cancel()
	for h, done := range outcomes {
		o := <-done
		lab.Check(t, o.err)
		reports[h] = o.report
	}
	return reports
}
