package netfilter

import (
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-mesh/bulkhead/steer"
)

// Probe returns one error that names what the kernel lacks for the steering, and since
// which version there is each; nil if it lacks nothing. It needs root and changes
// nothing: what it writes it takes back in the same step.
func Probe() error { return steer.Lacking(features()) }

func features() []steer.Feature {
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
	dynamic := func(counted bool, with func(set string) rule) func(*nftables.Conn) error {
		return func(c *nftables.Conn) error {
			s := &nftables.Set{Table: netdev, Name: "s", KeyType: nftables.TypeIFIndex, Dynamic: true, HasTimeout: true, Counter: counted, Size: 16}
			if err := c.AddSet(s, nil); err != nil {
				return err
			}
			return ingress(join(iif(regKey), with(s.Name)))(c)
		}
	}
	ranges := func(c *nftables.Conn) error {
		s := &nftables.Set{Table: netdev, Name: "s", Interval: true, Concatenation: true, Size: 16,
			KeyType: nftables.MustConcatSetType(nftables.TypeIFIndex, nftables.TypeIPAddr)}
		return c.AddSet(s, nil)
	}
	return []steer.Feature{
		{Name: "nftables of devices (CONFIG_NF_TABLES_NETDEV)", Since: "4.2", Probe: try(netdev, ingress(nil))},
		{Name: "nftables on the way out of a device (CONFIG_NETFILTER_EGRESS)", Since: "5.16", Probe: try(netdev, hook(netdev, nftables.ChainHookEgress, "lo", nil))},
		// The module of dup has fwd, too, which the library can't write.
		{Name: "nftables that forward between devices (CONFIG_NFT_FWD_NETDEV and CONFIG_NFT_DUP_NETDEV)", Since: "4.10", Probe: try(netdev,
			ingress(join(immediate(regTemp, native(1)...), rule{&expr.Dup{RegDev: regTemp, IsRegDevSet: true}})))},
		{Name: "nftables of devices that refuse (CONFIG_NFT_REJECT_NETDEV)", Since: "5.11", Probe: try(netdev, ingress(refuseTCP()))},
		{Name: "nftables' sets that rules write, with counters", Since: "5.7", Probe: try(netdev,
			dynamic(true, func(set string) rule { return remove(set, regKey, 0) }))},
		{Name: "nftables that hold a pace (CONFIG_NFT_LIMIT)", Since: "4.3", Probe: try(netdev,
			dynamic(false, func(set string) rule { return keepsPace(set, 1) }))},
		{Name: "nftables' sets of ranges with several parts", Since: "5.6", Probe: try(netdev, ranges)},
		{Name: "nftables of IPv4 and IPv6 together (CONFIG_NF_TABLES_INET)", Since: "3.14", Probe: try(inet, prerouting(nil))},
		{Name: "nftables' transparent proxies (CONFIG_NFT_TPROXY)", Since: "4.19", Probe: try(inet, prerouting(join(immediate(regTemp, big16(1)...),
			rule{&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_INET, RegPort: regTemp}})))},
		{Name: "nftables that look for sockets (CONFIG_NFT_SOCKET)", Since: "5.10", Probe: try(inet, prerouting(rule{&expr.Socket{Key: expr.SocketKeyWildcard, Register: regTemp}}))},
		{Name: "nftables that hash (CONFIG_NFT_HASH)", Since: "4.10", Probe: try(inet, prerouting(join(transport(0, 4, regKey),
			rule{&expr.Hash{SourceRegister: regKey, DestRegister: regTemp, Length: 4, Modulus: 100, Seed: 1, Type: expr.HashTypeJenkins}})))},
		{Name: "nftables that log to netlink (CONFIG_NFT_LOG and CONFIG_NETFILTER_NETLINK_LOG)", Since: "4.2", Probe: try(netdev, ingress(logged(prefixAnswered)))},
		{Name: "news of sockets that end (CONFIG_INET_DIAG)", Since: "4.5", Probe: probeEnded},
		{Name: "the list of sockets (CONFIG_INET_DIAG)", Since: "3.3", Probe: func() error {
			_, err := netlink.SocketDiagTCP(unix.AF_INET)
			if errors.Is(err, netlink.ErrDumpInterrupted) {
				return nil
			}
			return err
		}},
		{Name: "pidfd_getfd", Since: "5.6", Probe: steer.ProbeListeningSockets},
	}
}

// try writes and takes back.
func try(t *nftables.Table, write func(*nftables.Conn) error) func() error {
	return func() error {
		c, err := open(0)
		if err != nil {
			return err
		}
		c.AddTable(t)
		if err := write(c); err != nil {
			return err
		}
		c.DelTable(t)
		return c.Flush() // of its lines the first counts: what depends on it fails as well
	}
}
