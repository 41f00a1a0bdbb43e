package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	internalupstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawbufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	filterstatemapperv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3"
	staticnamev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/static_name/v3"
	ondemandsecretv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	typematcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const tlsSocket = "envoy.transport_sockets.tls"

// noIdentity is where an identity should have been set and wasn't: no secret and
// no certificate has this name, so the connection fails.
const noIdentity = "none"

func (p *packer) socket(name string, m proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: name, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: p.any(m)}}
}

func (p *packer) rawSocket() *corev3.TransportSocket {
	return p.socket("envoy.transport_sockets.raw_buffer", &rawbufferv3.RawBuffer{})
}

// certificateOf asks for a certificate when a connection first needs it.
func (p *packer) certificateOf(mapper *corev3.TypedExtensionConfig) *corev3.TypedExtensionConfig {
	return p.ext("envoy.tls.certificate_selectors.on_demand_secret", &ondemandsecretv3.Config{ConfigSource: ads(), CertificateMapper: mapper})
}

// commonTLS is TLS 1.3 (Envoy's clients would stop at 1.2) with one certificate.
func commonTLS(selector *corev3.TypedExtensionConfig) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		AlpnProtocols: []string{"h2"},
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		CustomTlsCertificateSelector: selector,
	}
}

func rootCA() *tlsv3.SdsSecretConfig { return &tlsv3.SdsSecretConfig{Name: RootCA, SdsConfig: ads()} }

// upstreamTLS presents the certificate that the connection's filter state names
// and wants the server to have one of the given SPIFFE IDs. Without any, the
// connection's filter state says which (see hboneListener).
func (p *packer) upstreamTLS(servers ...string) *corev3.TransportSocket {
	c := commonTLS(p.certificateOf(p.ext("envoy.tls.upstream_certificate_mappers.filter_state_override",
		&filterstatemapperv3.Config{DefaultValue: noIdentity})))
	if len(servers) == 0 {
		c.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: rootCA()}
		return p.socket(tlsSocket, &tlsv3.UpstreamTlsContext{CommonTlsContext: c})
	}
	validation := &tlsv3.CertificateValidationContext{}
	for _, s := range servers {
		validation.MatchTypedSubjectAltNames = append(validation.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{
			SanType: tlsv3.SubjectAltNameMatcher_URI,
			Matcher: &typematcherv3.StringMatcher{MatchPattern: &typematcherv3.StringMatcher_Exact{Exact: s}},
		})
	}
	c.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{
		CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext: validation, ValidationContextSdsSecretConfig: rootCA(),
		},
	}
	return p.socket(tlsSocket, &tlsv3.UpstreamTlsContext{CommonTlsContext: c})
}

// downstreamTLS serves as id and wants a client certificate of the mesh. The
// selector doesn't work with session resumption.
func (p *packer) downstreamTLS(id string) *corev3.TransportSocket {
	c := commonTLS(p.certificateOf(p.ext("envoy.tls.certificate_mappers.static_name", &staticnamev3.StaticName{Name: id})))
	c.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: rootCA()}
	return p.socket(tlsSocket, &tlsv3.DownstreamTlsContext{
		CommonTlsContext:                 c,
		RequireClientCertificate:         wrapperspb.Bool(true),
		SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
		DisableStatefulSessionResumption: true,
	})
}

// Metadata of an endpoint behind an internal listener.
const (
	metadataDestination = "envoy.filters.listener.original_dst" // {local: "ip:port"}, the address that it stands for
	metadataBulkhead    = "bulkhead"                            // {san: SPIFFE ID that the server must have}
	metadataMatch       = "envoy.transport_socket_match"
)

// internalSocket leads into an internal listener and passes on what it must know
// of the endpoint.
func (p *packer) internalSocket() *corev3.TransportSocket {
	t := &internalupstreamv3.InternalUpstreamTransport{TransportSocket: p.rawSocket()}
	for _, name := range []string{metadataDestination, metadataBulkhead} {
		t.PassthroughMetadata = append(t.PassthroughMetadata, &internalupstreamv3.InternalUpstreamTransport_MetadataValueSource{
			Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}},
			Name: name,
		})
	}
	return p.socket("envoy.transport_sockets.internal_upstream", t)
}
