package netfilter

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/mdlayher/netlink"
	routes "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// groupNftables is NFNLGRP_NFTABLES: what is told of changes to tables.
const groupNftables = 7

// watch calls gone whenever somebody has removed a table of the node's, as a
// firewall that is loaded again does with all of them. It ends when the connection
// that it returns is closed.
func watch(gone func()) (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := errors.Join(c.SetReadBuffer(socketBuffer), c.JoinGroup(groupNftables)); err != nil {
		return nil, errors.Join(fmt.Errorf("watch nftables: %w", err), c.Close())
	}
	go func() {
		for {
			messages, err := c.Receive()
			if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADF) {
				return
			}
			if err != nil {
				gone() // what was lost may have been that
				continue
			}
			for _, m := range messages {
				if m.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_DELTABLE && isOurs(m) {
					gone()
				}
			}
		}
	}()
	return c, nil
}

func isOurs(m netlink.Message) bool {
	if len(m.Data) < 4 {
		return false
	}
	attrs, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return false
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_TABLE_NAME {
			return attrs.String() == TableName
		}
	}
	return false
}

// watchNames calls renamed whenever an interface has another name than before, until
// done is closed.
func watchNames(renamed func(), done <-chan struct{}, log *slog.Logger) error {
	updates := make(chan routes.LinkUpdate, 64)
	err := routes.LinkSubscribeWithOptions(updates, done, routes.LinkSubscribeOptions{ListExisting: true, ReceiveBufferSize: socketBuffer,
		ErrorCallback: func(err error) {
			select {
			case <-done:
			default:
				log.Error("interfaces' names aren't watched any more", "error", err)
			}
		}})
	if err != nil {
		return fmt.Errorf("watch interfaces: %w", err)
	}
	go func() {
		names := map[int32]string{}
		for u := range updates {
			name := u.Attrs().Name
			if u.Header.Type == unix.RTM_DELLINK {
				delete(names, u.Index)
				continue
			}
			if had, ok := names[u.Index]; ok && had != name {
				renamed()
			}
			names[u.Index] = name
		}
	}()
	return nil
}
