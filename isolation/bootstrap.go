package isolation

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strconv"

	"github.com/bulkhead-mesh/bulkhead/model"
)

// adminName is the abstract socket of Envoy's admin interface, in the tenant's
// network namespace, without the leading zero byte.
func adminName(generation int) string {
	return "bulkhead-admin-" + strconv.Itoa(generation)
}

type object = map[string]any

// bootstrap is Envoy's static configuration: where the rest comes from. The node
// id helps those who read logs; nobody trusts it.
func bootstrap(t model.Tenant, generation int, version string) ([]byte, error) {
	// Without a limit: live means that the first configuration is there.
	fromStream := object{"ads": object{}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
	pipe := func(path string) object { return object{"pipe": object{"path": path}} }
	http2 := object{"explicit_http_config": object{"http2_protocol_options": object{}}}
	const http2Name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	http2["@type"] = "type.googleapis.com/" + http2Name
	return json.Marshal(object{
		"node":  object{"id": fmt.Sprintf("%s/%d", t, generation), "cluster": t.String()},
		"admin": object{"address": pipe("@" + adminName(generation))},
		"dynamic_resources": object{
			"ads_config": object{
				"api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
				"grpc_services": []object{{"envoy_grpc": object{
					"cluster_name": "xds",
					// The other end is on this node: an agent that restarts is back in a second.
					"retry_policy": object{"retry_back_off": object{"base_interval": "0.1s", "max_interval": "1s"}},
				}}},
			},
			"cds_config": fromStream, "lds_config": fromStream,
		},
		"static_resources": object{"clusters": []object{{
			"name": "xds", "type": "STATIC", "connect_timeout": "1s",
			"typed_extension_protocol_options": object{http2Name: http2},
			"load_assignment": object{"cluster_name": "xds", "endpoints": []object{{"lb_endpoints": []object{{
				"endpoint": object{"address": pipe(rootXDS + "/xds.sock")},
			}}}}},
		}}},
		"bootstrap_extensions": []object{{
			"name": "envoy.bootstrap.internal_listener",
			"typed_config": object{
				"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
			},
		}},
		"layered_runtime": object{"layers": []object{{"name": "static", "static_layer": features(version)}}},
		// A cluster that was asked for and never used again costs half without its stats.
		"deferred_stat_options": object{"enable_deferred_creation_stats": true},
	})
}

// features are those of a version that are to be other than it has them. One that a
// version doesn't know it complains of at length.
func features(version string) object {
	f := object{}
	if !isBefore(version, 1, 40) {
		// A tunnel whose server answers and closes at once would end for its client in a
		// reset, before the answer.
		f["envoy.reloadable_features.enable_send_rst_on_user_space_socket"] = false
	}
	return f
}

// isBefore reports whether a version of Envoy is older than major.minor.
func isBefore(version string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(version, "%d.%d.", &a, &b); err != nil {
		return false
	}
	return a < major || a == major && b < minor
}

// MaxWorkers is the most threads of a process that serve connections: steering has
// room for so many sockets of a port.
const MaxWorkers = 4

// workers is how many a process gets. By default one for each CPU that the tenant may
// use, two at most: memory and connection pools are per worker.
func workers(wanted int, l Limits) int {
	switch {
	case wanted > 0:
		return wanted
	case l.CPUMillis > 0 && l.CPUMillis <= 1000:
		return 1
	}
	return min(2, runtime.NumCPU())
}

// arguments of Envoy.
func arguments(workers int) []string {
	return []string{
		"--config-path", rootBootstrap, "--disable-hot-restart",
		"--concurrency", strconv.Itoa(workers), "--log-level", "warning",
		// misc warns with 450 bytes per pod address at each listener update.
		"--component-log-level", "misc:error", "--file-flush-interval-msec", "1000",
	}
}
