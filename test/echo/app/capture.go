package app

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/bulkhead-mesh/bulkhead/test/capture"
)

// capture counts what passes one of the node's interfaces, until a line comes on
// standard input. It prints {"event":"capturing"} when nothing is missed any
// more, and a capture.Report at its end.
func (c *command) capture() error {
	var opts capture.Options
	addr := c.flags.String("address", "", "an address of the interface")
	duration := c.flags.Duration("duration", time.Minute, fmt.Sprintf("at most, and at most %v", DurationLimit))
	c.flags.StringVar(&opts.Marker, "marker", "", "a string to look for in payloads")
	c.flags.IntVar(&opts.MaxPackets, "packets", 200_000, "end after so many")
	if _, err := c.parse(""); err != nil {
		return err
	}
	var err error
	if opts.Address, err = netip.ParseAddr(*addr); err != nil {
		return fmt.Errorf("%w: address: %w", ErrUsage, err)
	}
	if *duration <= 0 || *duration > DurationLimit || opts.MaxPackets < 1 || opts.MaxPackets > 10_000_000 {
		return fmt.Errorf("%w: duration or packets out of range", ErrUsage)
	}
	ctx, cancel := context.WithTimeout(c.ctx, *duration)
	defer cancel()
	go c.endOfInput(cancel)
	report, err := capture.Run(ctx, opts, func() {
		// A reader that is gone shows when the report can't be printed.
		_ = writeLine(c.out, Event{Event: "capturing", At: time.Now()})
	})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return c.finish(true, report)
}
