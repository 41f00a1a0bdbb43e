package load

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A connection of HTTP/2 has one request under way, as the others have. Frames are
// written as they are: what a client library does besides isn't what is measured.

// message is a gRPC message of three bytes.
var message = []byte("\x00\x00\x00\x00\x03ok\n")

type field struct{ name, value string }

// block encodes headers so that no table is needed to read them.
func block(fields ...field) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSizeLimit(0)
	e.SetMaxDynamicTableSize(0)
	for _, f := range fields {
		e.WriteField(hpack.HeaderField{Name: f.name, Value: f.value})
	}
	return b.Bytes()
}

// credit is what a connection of either end may send before it must hear again; it is
// given once for a whole run.
const credit = 1 << 30

// conn2 is one end of a connection.
type conn2 struct {
	*http2.Framer
	w *bufio.Writer
}

func newConn2(c net.Conn) conn2 {
	w := bufio.NewWriter(c)
	f := http2.NewFramer(w, bufio.NewReader(c))
	f.SetReuseFrames()
	return conn2{f, w}
}

func (c conn2) greet() error {
	return errors.Join(c.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}), c.WriteWindowUpdate(0, credit), c.w.Flush())
}

// control answers what isn't about a stream.
func (c conn2) control(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			return errors.Join(c.WriteSettingsAck(), c.w.Flush())
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			return errors.Join(c.WritePing(true, f.Data), c.w.Flush())
		}
	case *http2.GoAwayFrame:
		return fmt.Errorf("the peer says GOAWAY: %s", f.ErrCode)
	case *http2.RSTStreamFrame:
		return fmt.Errorf("a stream is reset: %s", f.ErrCode)
	}
	return nil
}

// requests2 makes requests over HTTP/2.
func requests2(o Options) (r Result, err error) {
	before, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	var mu sync.Mutex
	var samples []uint32
	var errs []error
	var wg sync.WaitGroup
	began := time.Now()
	for range o.Connections {
		wg.Go(func() {
			s, err := stream2(o, began.Add(o.Duration))
			mu.Lock()
			defer mu.Unlock()
			samples = append(samples, s...)
			if err != nil {
				errs = append(errs, fmt.Errorf("request %d of a connection: %w", len(s)+1, err))
			}
		})
	}
	wg.Wait()
	r.Duration = time.Since(began)
	if err := errors.Join(errs...); err != nil {
		return r, err
	}
	after, err := readCPU(o.Processes)
	if err != nil {
		return r, err
	}
	r.CPU = after.minus(before)
	r.count(samples)
	return r, nil
}

// stream2 makes one request after the other on a connection.
func stream2(o Options, end time.Time) (samples []uint32, err error) {
	raw, err := net.DialTimeout("tcp", o.To.String(), patience)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	c := newConn2(raw)
	if _, err := c.w.WriteString(http2.ClientPreface); err != nil {
		return nil, err
	}
	if err := c.greet(); err != nil {
		return nil, err
	}
	asked := block(field{":method", "GET"}, field{":scheme", "http"}, field{":path", "/"}, field{":authority", "server"}, field{"user-agent", "bench"})
	want := "ok\n"
	if o.Protocol == GRPC {
		asked = block(field{":method", "POST"}, field{":scheme", "http"}, field{":path", "/bench.Echo/Call"}, field{":authority", "server"},
			field{"content-type", "application/grpc"}, field{"te", "trailers"}, field{"user-agent", "bench"})
		want = string(message)
	}
	var status, grpcStatus string
	c.ReadMetaHeaders = hpack.NewDecoder(0, nil)
	for id := uint32(1); time.Now().Before(end); id += 2 {
		now := time.Now()
		raw.SetDeadline(now.Add(patience))
		err = c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: asked, EndHeaders: true, EndStream: o.Protocol != GRPC})
		if o.Protocol == GRPC {
			err = errors.Join(err, c.WriteData(id, true, message))
		}
		if err = errors.Join(err, c.w.Flush()); err != nil {
			return samples, err
		}
		status, grpcStatus = "", ""
		body := ""
		for ended := false; !ended; {
			f, err := c.ReadFrame()
			if err != nil {
				return samples, err
			}
			switch f := f.(type) {
			case *http2.MetaHeadersFrame:
				for _, h := range f.Fields {
					switch h.Name {
					case ":status":
						status = h.Value
					case "grpc-status":
						grpcStatus = h.Value
					}
				}
				ended = f.StreamEnded()
			case *http2.DataFrame:
				body += string(f.Data())
				ended = f.StreamEnded()
			default:
				if err := c.control(f); err != nil {
					return samples, err
				}
			}
		}
		if status != "200" || body != want || o.Protocol == GRPC && grpcStatus != "0" {
			return samples, fmt.Errorf("the answer is %s %q, gRPC's status %q", status, body, grpcStatus)
		}
		samples = append(samples, uint32(min(time.Since(now), patience)))
	}
	return samples, nil
}

// serve2 begins to answer requests over HTTP/2.
func serve2() error {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", fmt.Sprintf(":%d", HTTP2Port))
	if err != nil {
		return fmt.Errorf("listen on port %d: %w", HTTP2Port, err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer2(c)
		}
	}()
	return nil
}

// answer2 answers on one connection, until the client is wrong or gone.
func answer2(raw net.Conn) {
	defer raw.Close()
	preface := make([]byte, len(http2.ClientPreface))
	c := newConn2(raw)
	r := bufio.NewReader(raw)
	if _, err := io.ReadFull(r, preface); err != nil || string(preface) != http2.ClientPreface {
		return
	}
	c.Framer = http2.NewFramer(c.w, r)
	c.SetReuseFrames()
	// Headers are read in order to know gRPC's; their table grows as the client likes.
	c.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if errors.Join(c.WriteSettings(), c.WriteWindowUpdate(0, credit), c.w.Flush()) != nil {
		return
	}
	plain := block(field{":status", "200"}, field{"content-length", "3"})
	grpc := block(field{":status", "200"}, field{"content-type", "application/grpc"})
	trailers := block(field{"grpc-status", "0"})
	isGRPC := map[uint32]bool{}
	for {
		f, err := c.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			for _, h := range f.Fields {
				if h.Name == "content-type" && h.Value == "application/grpc" {
					isGRPC[f.StreamID] = true
				}
			}
			if f.StreamEnded() {
				err = errors.Join(c.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: plain, EndHeaders: true}),
					c.WriteData(f.StreamID, true, []byte("ok\n")), c.w.Flush())
			}
		case *http2.DataFrame:
			if !f.StreamEnded() {
				break
			}
			if !isGRPC[f.StreamID] {
				return
			}
			delete(isGRPC, f.StreamID)
			err = errors.Join(c.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: grpc, EndHeaders: true}),
				c.WriteData(f.StreamID, false, message),
				c.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: trailers, EndHeaders: true, EndStream: true}), c.w.Flush())
		default:
			err = c.control(f)
		}
		if err != nil {
			return
		}
	}
}
