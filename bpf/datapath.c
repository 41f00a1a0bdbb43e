//go:build ignore
// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0

// The way of a mesh pod's TCP: between the pod's veth and the network namespace
// of its tenant (from_pod, to_pod, from_tenant), and in there to the right
// listener of the right Envoy (steer).
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "maps.h"
#include "packet.h"
#include "events.h"
#include "admit.h"
#include "direct.h"
#include "flows.h"
#include "opened.h"
#include "watch.h"
#include "tcx.h"
#include "steer.h"
#include "observe.h"

// The helpers want a licence that the kernel calls compatible with its own.
char program_license[] SEC("license") = "GPL";
