package netfilter

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Probe returns what the kernel lacks for the steering, each by name and with
// since when it exists, joined; nil if nothing. It needs root and changes nothing:
// what it writes it takes back in the same step.
func Probe() error {
	netdev := &nftables.Table{Name: TableName + "_probe", Family: nftables.TableFamilyNetdev}
	inet := &nftables.Table{Name: TableName + "_probe", Family: nftables.TableFamilyINet}
	hook := func(t *nftables.Table, at *nftables.ChainHook, device string, r rule) func(*nftables.Conn) error {
		return func(c *nftables.Conn) error {
			ch := c.AddChain(&nftables.Chain{Name: "c", Table: t, Type: nftables.ChainTypeFilter, Hooknum: at, Priority: nftables.ChainPriorityMangle, Device: device})
			if r != nil {
				c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: r})
			}
			return nil
		}
	}
	ingress := func(r rule) func(*nftables.Conn) error { return hook(netdev, nftables.ChainHookIngress, "lo", r) }
	prerouting := func(r rule) func(*nftables.Conn) error {
		return hook(inet, nftables.ChainHookPrerouting, "", join(meta(expr.MetaKeyNFPROTO, regTemp), equal(regTemp, unix.NFPROTO_IPV4),
			meta(expr.MetaKeyL4PROTO, regTemp), equal(regTemp, unix.IPPROTO_TCP), r))
	}
	dynamic := func(c *nftables.Conn) error {
		s := &nftables.Set{Table: netdev, Name: "s", KeyType: nftables.TypeIFIndex, Dynamic: true, HasTimeout: true, Counter: true, Size: 16}
		if err := c.AddSet(s, nil); err != nil {
			return err
		}
		return ingress(join(iif(regKey), remove(s.Name, regKey, 0)))(c)
	}
	var lacking []error
	for _, p := range []struct {
		name  string
		table *nftables.Table
		write func(*nftables.Conn) error
	}{
		{"nftables of devices (CONFIG_NF_TABLES_NETDEV, Linux 4.2)", netdev, ingress(nil)},
		{"nftables on the way out of a device (CONFIG_NETFILTER_EGRESS, Linux 5.16)", netdev, hook(netdev, nftables.ChainHookEgress, "lo", nil)},
		// The module of dup has fwd, too, which the library can't write.
		{"nftables that forward between devices (CONFIG_NFT_FWD_NETDEV and CONFIG_NFT_DUP_NETDEV, Linux 4.10)", netdev,
			ingress(join(immediate(regTemp, native(1)...), rule{&expr.Dup{RegDev: regTemp, IsRegDevSet: true}}))},
		{"nftables' sets that rules write, with counters (Linux 5.7)", netdev, dynamic},
		{"nftables of IPv4 and IPv6 together (CONFIG_NF_TABLES_INET, Linux 3.14)", inet, prerouting(nil)},
		{"nftables' transparent proxies (CONFIG_NFT_TPROXY, Linux 4.19)", inet, prerouting(join(immediate(regTemp, big16(1)...),
			rule{&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_INET, RegPort: regTemp}}))},
		{"nftables that look for sockets (CONFIG_NFT_SOCKET, Linux 5.10)", inet, prerouting(rule{&expr.Socket{Key: expr.SocketKeyWildcard, Register: regTemp}})},
		{"nftables that hash (CONFIG_NFT_HASH, Linux 4.10)", inet, prerouting(join(transport(0, 4, regKey),
			rule{&expr.Hash{SourceRegister: regKey, DestRegister: regTemp, Length: 4, Modulus: 100, Seed: hashSeed, Type: expr.HashTypeJenkins}}))},
	} {
		if err := try(p.table, p.write); err != nil {
			lacking = append(lacking, fmt.Errorf("kernel lacks %s: %w", p.name, err))
		}
	}
	if _, err := netlink.SocketDiagTCP(unix.AF_INET); err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		lacking = append(lacking, fmt.Errorf("kernel lacks the list of sockets (CONFIG_INET_DIAG, Linux 3.3): %w", err))
	}
	if err := steer.ProbeListeningSockets(); err != nil {
		lacking = append(lacking, fmt.Errorf("kernel lacks pidfd_getfd (Linux 5.6): %w", err))
	}
	return errors.Join(lacking...)
}

// try writes and takes back.
func try(t *nftables.Table, write func(*nftables.Conn) error) error {
	c, err := open(0)
	if err != nil {
		return err
	}
	c.AddTable(t)
	if err := write(c); err != nil {
		return err
	}
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		// One line: what depends on the first error fails as well.
		first, _, _ := strings.Cut(err.Error(), "\n")
		return errors.New(first)
	}
	return nil
}
