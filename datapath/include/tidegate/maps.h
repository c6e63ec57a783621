/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps, each declared once. A pinned map's name carries the version of
 * its layout: change a struct, raise the number. Sizes are defaults; the
 * loader may set others before load. */
#ifndef TIDEGATE_MAPS_H
#define TIDEGATE_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <tidegate/types.h>

/* Inner maps name sizes, not types: Linux 6.1 links only inner maps that have
 * BTF exactly if the declared one has, and the loader's are made without. Their
 * structs, and every enum, are kept in BTF by this. */

struct tg_anchors {
	struct tg_node_key node_key;
	struct tg_endpoint endpoint;
	struct tg_rule_key rule_key;
	struct tg_rule rule;
	struct tg_prefix prefix;
	struct tg_ct_key ct_key;
	struct tg_ct ct;
	struct tg_half_open half_open;
	struct tg_half_open_set half_open_set;
	struct tg_event event;
	struct tg_flow_event flow_event;
	struct tg_limit limit;
	struct tg_trace trace;
	enum tg_trace_point trace_point;
	enum tg_trace_how trace_how;
	enum tg_limit_size limit_size;
	enum tg_node_kind node_kind;
	enum tg_peer_kind peer_kind;
	enum tg_peer_word peer_word;
	enum tg_lane lane;
	enum tg_entity entity;
	enum tg_limits limits;
	enum tg_policy_flags policy_flags;
	enum tg_action action;
	enum tg_rule_flags rule_flags;
	enum tg_event_flags event_flags;
	enum tg_identity identity;
	enum tg_ipcache_flags ipcache_flags;
	enum tg_backend_state backend_state;
	enum tg_frontend_flags frontend_flags;
	enum tg_frontend_base frontend_base;
	enum tg_slot_header slot_header;
	enum tg_affinity_word affinity_word;
	enum tg_nat_word nat_word;
	enum tg_process_word process_word;
	enum tg_nat_flags nat_flags;
	enum tg_ct_flags ct_flags;
	enum tg_ct_word ct_word;
	enum tg_half_open_size half_open_size;
	enum tg_rule_special rule_special;
	enum tg_direction direction;
	enum tg_reason reason;
	enum tg_flow_kind flow_kind;
};
struct tg_anchors *tg_anchors_unused;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_control);
	__uint(max_entries, 1);
} control_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_HASH);
		__uint(key_size, sizeof(struct tg_node_key));
		__uint(value_size, sizeof(struct tg_endpoint));
		__uint(max_entries, 1);
	});
} node_v2 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, TG_MAX_RULE_SETS);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_HASH);
		__uint(key_size, sizeof(struct tg_rule_key));
		__uint(value_size, sizeof(struct tg_rule));
		__uint(max_entries, 1);
	});
} rule_sets_v2 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, TG_MAX_RULE_SETS);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);
		__uint(map_flags, BPF_F_NO_PREALLOC);
		__uint(key_size, sizeof(struct tg_prefix));
		__uint(value_size, sizeof(__u32));
		__uint(max_entries, 1);
	});
} cidrs_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_addr);
	__type(value, struct tg_ipcache);
	__uint(max_entries, 262144);
} ipcache_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_prefix);
	__type(value, __u32); /* identity */
	__uint(max_entries, 16384);
} ipcache_lpm_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_frontend_key);
	__type(value, struct tg_frontend);
	__uint(max_entries, 65536);
} frontends_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32); /* backend id */
	__uint(max_entries, 524288);
} slots_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_backend);
	__uint(max_entries, 65536);
} backends_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_range);
	__type(value, __u32); /* 1 */
	__uint(max_entries, 65536);
} source_ranges_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_affinity_key);
	__type(value, __u64); /* enum tg_affinity_word */
	__uint(max_entries, 16384);
} affinity_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_frontend_key);
	__type(value, struct tg_service_count);
	__uint(max_entries, 65536); /* as many as frontends */
} service_counts_v1 SEC(".maps");

/* As whom a node sends on what is not for its own pods: IPv4, IPv6. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_node_addr);
	__uint(max_entries, 2);
} node_source_v1 SEC(".maps");

/* Every address of the node itself. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_addr);
	__type(value, struct tg_node_addr);
	__uint(max_entries, 1024);
} node_addrs_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_nat_key);
	__type(value, struct tg_nat);
	__uint(max_entries, 65536);
} nat_v1 SEC(".maps");

/* Where to pods' packets go with an address of the node (1) or their own (0). Empty:
 * nothing is masqueraded. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tg_prefix);
	__type(value, __u32);
	__uint(max_entries, 4096);
} masquerade_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_ct_key);
	__type(value, struct tg_ct);
	__uint(max_entries, 131072);
} ct_v2 SEC(".maps");

/* The client's side of translated flows that had one answer: whose the errors about it are.
 * Not in the table above, which floods must not fill: from the client's second packet on it
 * is there. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_ct_key);
	__type(value, struct tg_ct);
	__uint(max_entries, 1024);
} answered_v1 SEC(".maps");

/* A share forgets a flow for one of the same set only: finding the oldest of
 * four costs a new flow far less than an LRU_HASH's lists do. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, TG_MAX_ENDPOINTS);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(map_flags, BPF_F_INNER_MAP);
		__uint(key_size, sizeof(__u32));
		__uint(value_size, sizeof(struct tg_half_open_set));
		__uint(max_entries, TG_HALF_OPEN_SETS);
	});
} half_open_v2 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_frag_key);
	__type(value, struct tg_frag);
	__uint(max_entries, 4096);
} frags_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tg_sock_key);
	__type(value, struct tg_sock);
	__uint(max_entries, 16384);
} socks_v1 SEC(".maps");

/* A socket that connects pays for a place in it: an update of an LRU_HASH costs
 * ten times as much as a word and a line of an ARRAY. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_stream);
	__uint(max_entries, TG_MAX_STREAMS);
} streams_v1 SEC(".maps");

/* A place is needed until the flow's start is read, which takes a moment. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_process);
	__uint(max_entries, TG_MAX_PROCESSES);
} processes_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_counter);
	__uint(max_entries, TG_REASON_MAX * 2);
} metrics_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_limit_set);
	__uint(max_entries, TG_LIMIT_SETS);
} limits_v1 SEC(".maps");

/* By set * TG_LIMIT_WAYS + way. In the kernel, so that it lives as long as what it
 * counts, whoever reads. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_limit_said);
	__uint(max_entries, TG_LIMIT_SETS * TG_LIMIT_WAYS);
} limits_said_v1 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_trace_filter);
	__uint(max_entries, 1);
} trace_filter_v1 SEC(".maps");

/* Apart from all else: of these there may be as many as packets. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 17);
} traces_v1 SEC(".maps");

/* Apart from the denials, so that neither crowds out the other. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} flows_v1 SEC(".maps");

#endif
