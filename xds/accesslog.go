package xds

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// LogKey is in each line of a proxy's access log, a JSON object, and tells which
// listener wrote it: "inbound", "plain", "nodeplain", or "outbound" and "hbone"
// for connections that failed.
const LogKey = "bulkhead"

// inboundLog is a line for each connection from the mesh: who called whom. Lines
// are written when the connection ends.
var inboundLog = map[string]string{
	"time":           "%START_TIME%",
	"peer":           "%DOWNSTREAM_PEER_URI_SAN%",
	"peer_serial":    "%DOWNSTREAM_PEER_SERIAL%",
	"own":            "%DOWNSTREAM_LOCAL_URI_SAN%",
	"source":         "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
	"destination":    "%DOWNSTREAM_LOCAL_ADDRESS%",
	"authority":      "%REQ(:AUTHORITY)%",
	"code":           "%RESPONSE_CODE%",
	"details":        "%RESPONSE_CODE_DETAILS%",
	"flags":          "%RESPONSE_FLAGS%",
	"upstream":       "%UPSTREAM_HOST%",
	"bytes_received": "%BYTES_RECEIVED%",
	"bytes_sent":     "%BYTES_SENT%",
	"duration_ms":    "%DURATION%",
}

var tcpLog = map[string]string{
	"time":           "%START_TIME%",
	"chain":          "%FILTER_CHAIN_NAME%",
	"source":         "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
	"destination":    "%DOWNSTREAM_LOCAL_ADDRESS%",
	"flags":          "%RESPONSE_FLAGS%",
	"why":            "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
	"details":        "%CONNECTION_TERMINATION_DETAILS%",
	"cluster":        "%UPSTREAM_CLUSTER_RAW%",
	"upstream":       "%UPSTREAM_HOST%",
	"bytes_received": "%BYTES_RECEIVED%",
	"bytes_sent":     "%BYTES_SENT%",
	"duration_ms":    "%DURATION%",
}

func (p *packer) accessLog(listener string, format map[string]string) *accesslogv3.AccessLog {
	fields := map[string]*structpb.Value{LogKey: structpb.NewStringValue(listener)}
	for k, v := range format {
		fields[k] = structpb.NewStringValue(v)
	}
	return &accesslogv3.AccessLog{
		Name: "stdout",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: p.any(&streamv3.StdoutAccessLog{
			AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: &structpb.Struct{Fields: fields}},
			}},
		})},
	}
}

// logs are the access logs of one listener; none unless the proxy writes them.
func (p *packer) logs(enabled bool, listener string, format map[string]string) []*accesslogv3.AccessLog {
	if !enabled {
		return nil
	}
	return []*accesslogv3.AccessLog{p.accessLog(listener, format)}
}

// failureLogs tell of connections that failed, and of no others.
func (p *packer) failureLogs(enabled bool, listener string) []*accesslogv3.AccessLog {
	logs := p.logs(enabled, listener, tcpLog)
	for _, l := range logs {
		l.Filter = &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{
			ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{}, // any flag
		}}
	}
	return logs
}
