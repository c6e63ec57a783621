/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* One run of a program over one packet: what it knows. How it ends: `end.h`. */
#ifndef TIDEGATE_RUN_H
#define TIDEGATE_RUN_H

#include <tidegate/conntrack.h>
#include <tidegate/limit.h>
#include <tidegate/nat.h>
#include <tidegate/policy.h>
#include <tidegate/special.h>

/* A copy loaded with dry_run writes no map and no event, and answers in
 * skb->cb and skb->mark: 1 judges as if the flow were new, 2 asks conntrack. */
const volatile __u8 dry_run = 0;

/* A socket's question for the frontend that it was translated from, and the
 * answer: `addr` and `port`, of the backend first. */
struct tg_asked {
	struct tg_sock_key key;
	struct tg_addr addr;
	__be16 port;
	__u8 protocol;
};

/* What a run works on. Beside the program's stack, which is too small for it;
 * one a CPU is enough, because programs of tc and XDP run with bottom halves off. */
struct tg_scratch {
	struct tg_packet p;
	struct tg_ct_key key;
	__u32 src_is_a;
	__u64 epoch;
	__u64 proof;
	__u32 set; /* in a share */
	__u32 now;
	__u32 how;   /* enum tg_trace_how */
	__u32 host;  /* generated on this node, towards the pod */
	__u32 from_pod;
	__u64 node;  /* where this run's node table lies */
	__u32 src_identity;
	__u32 dst_identity;
	struct tg_verdict egress;
	struct tg_verdict ingress;
	struct tg_forward forward;
	struct tg_ipcache peer; /* who has `t.dst` of p, with `asked_peer` */
	__u32 asked_peer;
	struct tg_target nat; /* frontend asked for; side unused */
	__u32 backend;
	__u32 flags;       /* TG_CT_NAT, TG_CT_HAIRPIN of the flow being made */
	struct tg_ct made; /* the entry being made */
	struct tg_question question;
	struct tg_choice choice;
	struct tg_tuple turned; /* the tuple as the flow began, of a reply */
	struct tg_ct_key client_key;
	struct tg_tuple client;
	struct tg_target inner; /* in errors */
	struct tg_target outer;
	struct tg_client asks;  /* of a service */
	__u32 refused;          /* nobody serves it: its sender is told */
	__u32 uplink;           /* the interface it came in by, of TG_CT_UPLINK */
	__u32 steered;          /* enum tg_service_answer of `tg_steer`; 0: it had nothing to do */
	struct tg_nat_key nat_key;
	struct tg_nat_key nat_twin;
	struct tg_nat nat_made;
	struct tg_nat nat_found;
	struct tg_nat nat_other;
	struct tg_asked asked;
	struct tg_frontend_key counted;
	struct tg_denial_kind kind;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct tg_scratch);
	__uint(max_entries, 1);
} scratch SEC(".maps");

/* For functions that are verified on their own: they are given no pointer to it. */
tg_inline struct tg_scratch *tg_work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

struct tg_run {
	tg_context *skb;
	void *node;                   /* this run's node table */
	const struct tg_endpoint *ep; /* the pod at this interface */
	struct tg_scratch *s;
	__u32 from_pod;
};

/* Scratch, tables and time. The epoch is read first: a flow judged by tables of
 * a later policy state with the epoch of an earlier one is only judged once more. */
tg_inline int tg_open(struct tg_run *r)
{
	struct tg_control *control;
	__u32 zero = 0;

	r->s = tg_work();
	if (!r->s)
		return TG_DROP_NO_NODE_TABLE;
	__builtin_memset(r->s, 0, offsetof(struct tg_scratch, made));
	r->s->refused = r->s->steered = 0;
	r->s->from_pod = r->from_pod;
	control = bpf_map_lookup_elem(&control_v1, &zero);
	if (!control)
		return TG_DROP_NO_NODE_TABLE;
	r->s->epoch = *(volatile __u64 *)&control->epoch;
	tg_barrier();
	r->node = bpf_map_lookup_elem(&node_v2, &zero);
	if (!r->node)
		return TG_DROP_NO_NODE_TABLE;
	r->s->node = (__u64)r->node;
	r->s->now = tg_now();
	return 0;
}

tg_inline void tg_count(tg_context *skb, __u32 reason, int from_pod)
{
	__u32 index = reason * 2 + (from_pod ? TG_EGRESS : TG_INGRESS);
	struct tg_counter *counter;

	if (dry_run)
		return;
	counter = bpf_map_lookup_elem(&metrics_v1, &index);
	if (counter) {
		counter->packets += 1;
		counter->bytes += tg_length(skb);
	}
}

#endif
