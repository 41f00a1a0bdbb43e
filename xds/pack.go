package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// packer wraps messages for Envoy's extension points. Validation doesn't look
// into an Any, so each message is validated when it is packed; errors are kept
// until the whole resource is done.
type packer struct {
	errs []error
	// form of the listeners that are packed.
	form Form
}

func (p *packer) err() error { return errors.Join(p.errs...) }

func (p *packer) any(m proto.Message) *anypb.Any {
	a, err := pack(m)
	if err != nil {
		p.errs = append(p.errs, err)
	}
	return a
}

func (p *packer) ext(name string, m proto.Message) *corev3.TypedExtensionConfig {
	return &corev3.TypedExtensionConfig{Name: name, TypedConfig: p.any(m)}
}

func pack(m proto.Message) (*anypb.Any, error) {
	if err := validate(m); err != nil {
		return nil, err
	}
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return a, nil
}

func validate(m proto.Message) error {
	v, ok := m.(interface{ ValidateAll() error })
	if !ok {
		return nil
	}
	if err := v.ValidateAll(); err != nil {
		return fmt.Errorf("validate %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return nil
}

// resource is what goes to proxies, encoded once for all of them. Immutable.
type resource struct {
	typeURL string
	wire    *discoveryv3.Resource
	source  Source
	// unknown is the resource of an address that nobody has.
	unknown bool
	// needs are what a proxy must have acknowledged before it gets this.
	needs []resourceKey
	// seq orders the contents that a name had; see proxyState.
	seq uint64
}

func (r *resource) name() string    { return r.wire.Name }
func (r *resource) version() string { return r.wire.Version }

// encode validates m and makes a resource whose version is a hash of its content.
func encode(name string, source Source, m proto.Message) (*resource, error) {
	a, err := pack(m)
	if err != nil {
		return nil, &ObjectError{source, err}
	}
	sum := sha256.Sum256(a.Value)
	return &resource{typeURL: a.TypeUrl, source: source, wire: &discoveryv3.Resource{
		Name: name, Version: hex.EncodeToString(sum[:12]), Resource: a,
	}}, nil
}
