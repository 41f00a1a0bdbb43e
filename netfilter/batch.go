package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// socketBuffer holds the answers to a batch.
const socketBuffer = 4 << 20

// open returns a connection to the tables of a network namespace, 0 for the
// thread's own. It has no state and needn't be closed.
func open(netns int) (*nftables.Conn, error) {
	return nftables.New(nftables.WithNetNSFd(netns), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer))
	}))
}

// replaceRules gives chains new rules, all at once: no packet sees half of it. It
// is for what the library can't express.
func replaceRules(table *nftables.Table, chains []chain) error {
	family := byte(table.Family)
	message := func(kind int, flags netlink.HeaderFlags, family byte, resource uint16, data []byte) netlink.Message {
		header := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | flags}, Data: append(header, data...)}
	}
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	batch := []netlink.Message{message(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, unix.NFNL_SUBSYS_NFTABLES, nil)}
	for _, c := range chains {
		name := []netlink.Attribute{
			{Type: unix.NFTA_RULE_TABLE, Data: []byte(table.Name + "\x00")},
			{Type: unix.NFTA_RULE_CHAIN, Data: []byte(c.name + "\x00")},
		}
		data, err := netlink.MarshalAttributes(name)
		if err != nil {
			return err
		}
		batch = append(batch, message(subsystem|unix.NFT_MSG_DELRULE, netlink.Acknowledge, family, 0, data))
		for _, r := range c.rules {
			expressions, err := r.marshal(family)
			if err != nil {
				return fmt.Errorf("write a rule of chain %s: %w", c.name, err)
			}
			data, err := netlink.MarshalAttributes(append(name[:2:2], netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: expressions}))
			if err != nil {
				return err
			}
			batch = append(batch, message(subsystem|unix.NFT_MSG_NEWRULE, netlink.Acknowledge|netlink.Create|netlink.Append, family, 0, data))
		}
	}
	batch = append(batch, message(unix.NFNL_MSG_BATCH_END, 0, 0, unix.NFNL_SUBSYS_NFTABLES, nil))

	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer c.Close()
	if err := errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer)); err != nil {
		return fmt.Errorf("enlarge netlink's buffers: %w", err)
	}
	if _, err := c.SendMessages(batch); err != nil {
		return fmt.Errorf("send rules: %w", err)
	}
	for range len(batch) - 2 {
		if _, err := c.Receive(); err != nil {
			return fmt.Errorf("write rules: %w", err)
		}
	}
	return nil
}

// generation is a number that changes with every change to the nftables of a
// network namespace, 0 for the thread's own, but for those of the rules.
func generation(netns int) (uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return 0, fmt.Errorf("open netlink: %w", err)
	}
	defer c.Close()
	answer, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil || len(answer) != 1 || len(answer[0].Data) < 4 {
		return 0, fmt.Errorf("ask for the generation of nftables: %d answers, %w", len(answer), err)
	}
	attrs, err := netlink.NewAttributeDecoder(answer[0].Data[4:])
	if err != nil {
		return 0, fmt.Errorf("read the generation of nftables: %w", err)
	}
	attrs.ByteOrder = binary.BigEndian
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_GEN_ID {
			return attrs.Uint32(), nil
		}
	}
	return 0, fmt.Errorf("read the generation of nftables: there is none, %w", attrs.Err())
}
