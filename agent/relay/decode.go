package relay

import (
	"fmt"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	// maxMessage holds 130,000 of the longest names and the versions of maxNames: as many
	// as pods may have made an Envoy ask for, which it repeats when it comes back.
	maxMessage = 8 << 20
	// maxMessageNames are in one message, more than there is room for of real ones. Of the
	// shortest there is room for millions, which take fifty times as much once they are
	// read.
	maxMessageNames = 1 << 19
	// maxNode is several times what an Envoy says of itself, and maxError of what it
	// cuts its complaints to.
	maxNode  = 256 << 10
	maxError = 64 << 10
)

// requestCodec reads what a proxy says, as long as it takes no more memory than an
// Envoy's requests do: a few bytes can stand for an object each.
type requestCodec struct{ encoding.CodecV2 }

// Unmarshal implements encoding.CodecV2.
func (c requestCodec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*discovery.DeltaDiscoveryRequest)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	if err := checkSizes(buf.ReadOnlyData()); err != nil {
		return err
	}
	return proto.Unmarshal(buf.ReadOnlyData(), r)
}

// checkSizes looks at a request before it is read.
func checkSizes(b []byte) error {
	names, versions, node, failure := 0, 0, 0, 0
	for len(b) > 0 {
		field, _, n := protowire.ConsumeField(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		switch field {
		case 1:
			node += n
		case 3, 4: // subscribe, unsubscribe
			names++
		case 5: // initial versions, which take more than names do
			versions++
		case 7:
			failure += n
		case 8, 9:
			return fmt.Errorf("%w: resource locators", errRefused)
		}
		switch {
		case names > maxMessageNames:
			return fmt.Errorf("%w: more than %d names in one message", errRefused, maxMessageNames)
		case versions > maxHeld:
			return fmt.Errorf("%w: more than %d initial versions", errRefused, maxHeld)
		case node > maxNode:
			return fmt.Errorf("%w: a node of more than %d bytes", errRefused, maxNode)
		case failure > maxError:
			return fmt.Errorf("%w: an error of more than %d bytes", errRefused, maxError)
		}
	}
	return nil
}
