package app

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
)

// ErrUsage is returned by Main for a call that makes no sense; nothing was done.
var ErrUsage = errors.New("wrong usage")

// errFailed is returned for a client whose printed result isn't OK.
var errFailed = errors.New("failed: see the result's failure")

const commands = "serve, get, grpc, tcp, bulk, hold, load, capture, node, kill, workload"

// Main runs one command. Results go to out as JSON, everything else to messages.
func Main(ctx context.Context, args []string, in io.Reader, out, messages io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("%w: give a command: %s", ErrUsage, commands)
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(messages)
	c := command{ctx: ctx, flags: flags, args: args[1:], in: in, out: out, messages: messages}
	switch args[0] {
	case "serve":
		return c.serve()
	case "get":
		return c.get()
	case "grpc", "tcp":
		return c.call(args[0])
	case "bulk":
		return c.bulk()
	case "hold":
		return c.run("tcp", hold)
	case "load":
		return c.run("http", load)
	case "capture":
		return c.capture()
	case "node":
		return c.node()
	case "kill":
		return c.kill()
	case "workload":
		return c.workload()
	}
	return fmt.Errorf("%w: unknown command %q; there are %s", ErrUsage, args[0], commands)
}

type command struct {
	ctx           context.Context
	flags         *flag.FlagSet
	args          []string
	in            io.Reader
	out, messages io.Writer
}

// parse returns the single argument that is left after the flags.
func (c *command) parse(what string) (string, error) {
	if err := c.flags.Parse(c.args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return "", err
		}
		return "", fmt.Errorf("%w: %w", ErrUsage, err)
	}
	if what == "" && c.flags.NArg() == 0 {
		return "", nil
	}
	if what == "" || c.flags.NArg() != 1 {
		return "", fmt.Errorf("%w: %s takes one %s after its flags, got %q", ErrUsage, c.flags.Name(), what, c.flags.Args())
	}
	return c.flags.Arg(0), nil
}

func (c *command) finish(ok bool, result any) error {
	if err := writeLine(c.out, result); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	if !ok {
		return errFailed
	}
	return nil
}

func (c *command) serve() error {
	var opts ServerOptions
	c.flags.StringVar(&opts.HTTP, "http", fmt.Sprintf(":%d", HTTPPort), "address for HTTP/1.1 and h2c, empty for none")
	c.flags.StringVar(&opts.GRPC, "grpc", fmt.Sprintf(":%d", GRPCPort), "address for gRPC, empty for none")
	c.flags.StringVar(&opts.Greet, "tcp", fmt.Sprintf(":%d", GreetPort), "address for the protocol in which the server speaks first, empty for none")
	c.flags.StringVar(&opts.Bulk, "bulk", fmt.Sprintf(":%d", BulkPort), "address for bulk transfers, empty for none")
	c.flags.DurationVar(&opts.Grace, "grace", 5*time.Second, "how long requests may take to end when the server is stopped")
	if _, err := c.parse(""); err != nil {
		return err
	}
	opts.Log = slog.New(slog.NewJSONHandler(c.messages, nil))
	return Serve(c.ctx, opts)
}

func (c *command) get() error {
	opts := getOptions{header: http.Header{}}
	c.flags.StringVar(&opts.method, "method", "", "request method (default GET, or POST with data)")
	c.flags.StringVar(&opts.data, "data", "", "request body")
	c.flags.StringVar(&opts.protocol, "protocol", "http", "http or h2c")
	c.flags.DurationVar(&opts.timeout, "timeout", 10*time.Second, "for everything together")
	c.flags.Func("header", "request header, NAME: VALUE; may be repeated", func(text string) error {
		name, value, ok := strings.Cut(text, ":")
		if !ok {
			return errors.New("want NAME: VALUE")
		}
		opts.header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
		return nil
	})
	target, err := c.parse("URL")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(target, "http://") {
		return fmt.Errorf("%w: URL %q does not begin with http://", ErrUsage, target)
	}
	if opts.protocol != "http" && opts.protocol != "h2c" {
		return fmt.Errorf("%w: protocol %q is neither http nor h2c", ErrUsage, opts.protocol)
	}
	if opts.method == "" {
		opts.method = http.MethodGet
		if opts.data != "" {
			opts.method = http.MethodPost
		}
	}
	r := get(c.ctx, target, opts)
	return c.finish(r.OK, r)
}

func (c *command) call(protocol string) error {
	data := c.flags.String("data", "hello", "what to send")
	timeout := c.flags.Duration("timeout", 10*time.Second, "for connecting, and again for the exchange")
	addr, err := c.parse("HOST:PORT")
	if err != nil {
		return err
	}
	if strings.Contains(*data, "\n") {
		return fmt.Errorf("%w: data must be one line", ErrUsage)
	}
	r := call(c.ctx, protocol, addr, *data, *timeout)
	return c.finish(r.OK, r)
}

func (c *command) bulk() error {
	up := c.flags.Int64("up", 0, "bytes to send")
	down := c.flags.Int64("down", 0, "bytes to get")
	timeout := c.flags.Duration("timeout", 2*time.Minute, "for everything together")
	addr, err := c.parse("HOST:PORT")
	if err != nil {
		return err
	}
	if *up < 0 || *down < 0 || *up > BulkLimit || *down > BulkLimit || *up+*down == 0 {
		return fmt.Errorf("%w: up and down must be from 0 to %d bytes, one of them not 0", ErrUsage, int64(BulkLimit))
	}
	r := bulk(c.ctx, addr, *up, *down, *timeout)
	return c.finish(r.OK, r)
}

func (c *command) run(protocol string, do func(context.Context, string, runOptions, func(Event)) *RunResult) error {
	var opts runOptions
	c.flags.StringVar(&opts.protocol, "protocol", protocol, "one of "+strings.Join(protocols, ", "))
	c.flags.IntVar(&opts.connections, "connections", 16, fmt.Sprintf("at most %d", ConnectionLimit))
	c.flags.DurationVar(&opts.duration, "duration", 10*time.Second, fmt.Sprintf("at most %v", DurationLimit))
	c.flags.DurationVar(&opts.timeout, "timeout", 10*time.Second, "for connecting and for each exchange")
	c.flags.StringVar(&opts.data, "data", "bulkhead", "what every payload begins with")
	if c.flags.Name() == "hold" {
		c.flags.DurationVar(&opts.interval, "interval", time.Second, "time between exchanges on a connection")
	} else {
		opts.interval = time.Second
		c.flags.Float64Var(&opts.rate, "rate", 0, "exchanges a second over all connections, 0 for no limit")
		c.flags.BoolVar(&opts.reconnect, "reconnect", false, "make a kept connection that the server closed again, as HTTP clients do, and don't count that as a failure")
		c.flags.Float64Var(&opts.newConnections, "new-connection-ratio", 0, "share of exchanges that get a new connection, 0 to 1")
	}
	untilStdin := c.flags.Bool("until-stdin", false, "end as soon as standard input has a line or ends, the duration at the latest")
	addr, err := c.parse("HOST:PORT")
	if err != nil {
		return err
	}
	if err := opts.validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrUsage, err)
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	if *untilStdin {
		go c.endOfInput(cancel)
	}
	result := do(ctx, addr, opts, func(e Event) {
		// A reader that is gone shows when the result can't be printed.
		_ = writeLine(c.out, e)
	})
	return c.finish(result.OK, result)
}

// endOfInput calls end at the first byte of the input, at its end, and if it can't be
// read.
func (c *command) endOfInput(end func()) {
	_, _ = c.in.Read(make([]byte, 1))
	end()
}

func (o runOptions) validate() error {
	switch {
	case !slices.Contains(protocols, o.protocol):
		return fmt.Errorf("protocol %q is none of %s", o.protocol, strings.Join(protocols, ", "))
	case o.connections < 1 || o.connections > ConnectionLimit:
		return fmt.Errorf("connections %d is not from 1 to %d", o.connections, ConnectionLimit)
	case o.duration <= 0 || o.duration > DurationLimit:
		return fmt.Errorf("duration %v is not from 0 to %v", o.duration, DurationLimit)
	case o.timeout <= 0:
		return fmt.Errorf("timeout %v is not more than 0", o.timeout)
	case o.interval < time.Millisecond:
		return fmt.Errorf("interval %v is less than 1ms", o.interval)
	case o.rate < 0 || o.newConnections < 0 || o.newConnections > 1:
		return fmt.Errorf("rate %v or new-connection-ratio %v out of range", o.rate, o.newConnections)
	case strings.Contains(o.data, "\n"):
		return errors.New("data must be one line")
	}
	return nil
}
