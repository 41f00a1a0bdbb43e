package load

import (
	"fmt"
	"net"
	"net/netip"
	"time"
)

// FlowPort of ServeFlow.
const FlowPort = 9109

// ServeFlow sends to each connection as much as it takes, without end. It returns
// when it can't listen.
func ServeFlow(ready func()) error {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", FlowPort))
	if err != nil {
		return err
	}
	defer l.Close()
	ready()
	flow := make([]byte, 64<<10)
	for {
		c, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer c.Close()
			for {
				if _, err := c.Write(flow); err != nil {
					return
				}
			}
		}()
	}
}

// HoldUnread opens connections to a ServeFlow, a hundred a second, and reads nothing
// of them, so that all buffers on the way fill. It returns after the duration.
func HoldUnread(to netip.AddrPort, connections int, duration time.Duration) {
	end := time.Now().Add(duration)
	var held []net.Conn
	for time.Now().Before(end) {
		if len(held) < connections {
			if c, err := net.DialTimeout("tcp", to.String(), time.Second); err == nil {
				held = append(held, c)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, c := range held {
		c.Close()
	}
}
