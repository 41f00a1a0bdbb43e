package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

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

// openLong is open for reading sets that rules fill. The kernel makes the parts of its
// answer as long as the longest buffer that it was given, and begins with each at the set's
// beginning again, to go on where it was: in parts of the library's size, a page, a set
// takes eight times as long.
func openLong() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		raw, err := c.SyscallConn()
		if err != nil {
			return fmt.Errorf("reach the socket: %w", err)
		}
		ask, err := netlink.Message{
			Header: netlink.Header{Length: 20, Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
			Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
		}.MarshalBinary()
		if err != nil {
			return fmt.Errorf("write a question: %w", err)
		}
		// An answer of the kernel is there when it has got the question.
		answer := make([]byte, longest)
		if controlErr := raw.Control(func(fd uintptr) {
			if err = unix.Sendto(int(fd), ask, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err == nil {
				_, _, err = unix.Recvfrom(int(fd), answer, unix.MSG_DONTWAIT)
			}
		}); controlErr != nil {
			return fmt.Errorf("reach the socket: %w", controlErr)
		}
		if err != nil {
			return fmt.Errorf("ask with a long buffer: %w", err)
		}
		return errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer))
	}))
}

// longest is the longest part of an answer that the kernel makes.
const longest = 32768

// message is one of nftables' about a table.
func message(kind int, flags netlink.HeaderFlags, table *nftables.Table, data []byte) netlink.Message {
	header := []byte{byte(table.Family), unix.NFNETLINK_V0, 0, 0}
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
		Flags: netlink.Request | netlink.Acknowledge | flags}, Data: append(header, data...)}
}

// send does what messages say in a network namespace, 0 for the thread's own, all at
// once or not at all. It is for what the library can't express.
func send(netns int, messages []netlink.Message) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer c.Close()
	if err := errors.Join(c.SetReadBuffer(socketBuffer), c.SetWriteBuffer(socketBuffer)); err != nil {
		return fmt.Errorf("enlarge netlink's buffers: %w", err)
	}
	end := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data: binary.BigEndian.AppendUint16([]byte{0, unix.NFNETLINK_V0}, unix.NFNL_SUBSYS_NFTABLES)}
	}
	batch := slices.Concat([]netlink.Message{end(unix.NFNL_MSG_BATCH_BEGIN)}, messages, []netlink.Message{end(unix.NFNL_MSG_BATCH_END)})
	if _, err := c.SendMessages(batch); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	for range messages {
		if _, err := c.Receive(); err != nil {
			return err
		}
	}
	return nil
}

// replaceRules gives chains of the node new rules: no packet sees half of it.
func replaceRules(table *nftables.Table, chains []chain) error {
	var messages []netlink.Message
	for _, c := range chains {
		name := []netlink.Attribute{
			{Type: unix.NFTA_RULE_TABLE, Data: []byte(table.Name + "\x00")},
			{Type: unix.NFTA_RULE_CHAIN, Data: []byte(c.name + "\x00")},
		}
		data, err := netlink.MarshalAttributes(name)
		if err != nil {
			return err
		}
		messages = append(messages, message(unix.NFT_MSG_DELRULE, 0, table, data))
		for _, r := range c.rules {
			expressions, err := r.marshal(byte(table.Family))
			if err != nil {
				return fmt.Errorf("write a rule of chain %s: %w", c.name, err)
			}
			data, err := netlink.MarshalAttributes(append(name[:2:2], netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: expressions}))
			if err != nil {
				return err
			}
			messages = append(messages, message(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, table, data))
		}
	}
	if err := send(0, messages); err != nil {
		return fmt.Errorf("write rules: %w", err)
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
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of nftables: %w", err)
	}
	if len(answer) != 1 || len(answer[0].Data) < 4 {
		return 0, fmt.Errorf("ask for the generation of nftables: %d answers, want one", len(answer))
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
	if err := attrs.Err(); err != nil {
		return 0, fmt.Errorf("read the generation of nftables: %w", err)
	}
	return 0, errors.New("read the generation of nftables: there is none")
}
