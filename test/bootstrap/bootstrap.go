// Package bootstrap has the static configuration of an Envoy that a test runs without
// a bulkhead. Everything that changes what Envoy does is as in package isolation.
package bootstrap

// ADS is for an Envoy whose configuration comes from xds.sock and whose admin
// interface is admin.sock, both in its working directory.
const ADS = `
node: {id: test, cluster: test}
layered_runtime: {layers: [{name: static, static_layer: {envoy.reloadable_features.enable_send_rst_on_user_space_socket: false}}]}
admin: {address: {pipe: {path: admin.sock}}}
dynamic_resources:
  ads_config:
    api_type: DELTA_GRPC
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{envoy_grpc: {cluster_name: xds}}]
  cds_config: {ads: {}, resource_api_version: V3}
  lds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: xds.sock}}}}]}]}
bootstrap_extensions:
- name: envoy.bootstrap.internal_listener
  typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}
deferred_stat_options: {enable_deferred_creation_stats: true}
`
