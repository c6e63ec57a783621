/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* How a run at tc ends: its verdict, what is counted and told of it, and where
 * the packet goes. */
#ifndef TIDEGATE_END_H
#define TIDEGATE_END_H

#include <linux/pkt_cls.h>
#include <tidegate/run.h>
#include <tidegate/trace.h>

/* What a pod sees as the source when it reaches itself through a Service and
 * the translation was made per packet. Never on a wire. */
const volatile struct tg_addr hairpin_ip4 = {};
const volatile struct tg_addr hairpin_ip6 = {};

#define TG_PASS TC_ACT_UNSPEC /* other programs on the interface have their turn */

/* ---- counters and events ---------------------------------------------------- */

tg_inline void tg_answer(struct tg_run *r, __u32 reason)
{
	const struct tg_verdict *audited = r->s->egress.audit ? &r->s->egress : &r->s->ingress;

	if (!dry_run)
		return;
	r->skb->cb[0] = reason | r->s->egress.audit << 8 | r->s->ingress.audit << 16;
	r->skb->cb[1] = r->s->egress.rule_set;
	r->skb->cb[2] = r->s->egress.rule;
	r->skb->cb[3] = r->s->ingress.rule_set;
	r->skb->cb[4] = r->s->ingress.rule;
	r->skb->mark = r->s->egress.shape | r->s->ingress.shape << 8;
	r->skb->priority = audited->audit ? audited->audit_rule : (__u32)TG_RULE_NONE;
}

/* `endpoint`: of the pod at this interface, 0: none; `what`: enum tg_reason |
 * enum tg_direction << 8 | enum tg_event_flags << 16. */
#define TG_WHAT(reason, direction, flags) ((reason) | (__u32)(direction) << 8 | (flags) << 16)

tg_inline const struct tg_verdict *tg_verdict_of(const struct tg_scratch *s, __u32 what)
{
	return (what >> 8 & 0xff) == TG_EGRESS ? &s->egress : &s->ingress;
}

/* Whose verdict it is. */
tg_inline __u32 tg_subject(const struct tg_scratch *s, __u32 endpoint, __u32 what)
{
	if (!tg_verdict_of(s, what)->reason && !(what >> 16))
		return endpoint;
	return (what >> 8 & 0xff) == TG_EGRESS ? s->made.src_endpoint : s->made.dst_endpoint;
}

tg_inline __u32 tg_deciding_rule(const struct tg_verdict *v, __u32 what)
{
	return what >> 16 & TG_EVENT_AUDIT ? v->audit_rule : v->rule;
}

tg_global int tg_event(struct __sk_buff *skb, __u32 endpoint, __u32 what)
{
	struct tg_scratch *s = tg_work();
	const struct tg_verdict *v;
	struct tg_event *e;

	if (!s)
		return 0;
	v = tg_verdict_of(s, what);
	e = bpf_ringbuf_reserve(&events_v1, sizeof(*e), 0);
	if (!e) {
		tg_count(skb, TG_REASON_EVENT_LOST, s->from_pod);
		return 0;
	}
	e->direction = what >> 8;
	e->endpoint = tg_subject(s, endpoint, what);
	e->time = bpf_ktime_get_ns();
	e->ifindex = skb->ifindex;
	e->socket = bpf_get_socket_cookie(skb);
	e->src = s->p.t.src;
	e->dst = s->p.t.dst;
	e->sport = s->p.t.sport;
	e->dport = s->p.t.dport;
	e->protocol = s->p.t.protocol;
	e->reason = what;
	e->tcp_flags = s->p.tcp_flags;
	e->src_identity = s->src_identity;
	e->dst_identity = s->dst_identity;
	e->rule_set = v->rule_set;
	e->rule = tg_deciding_rule(v, what);
	e->flags = what >> 16;
	/* Readers poll; waking one per denial would let a flood buy CPU time. */
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return 0;
}

/* An event, unless there are too many of its kind. */
tg_inline void tg_offer(struct __sk_buff *skb, struct tg_scratch *s, __u32 endpoint, __u32 what)
{
	const struct tg_verdict *v = tg_verdict_of(s, what);
	struct tg_denial_kind *kind = &s->kind;

	kind->rule_set = v->rule_set;
	kind->rule = tg_deciding_rule(v, what);
	kind->src_identity = s->src_identity;
	kind->dst_identity = s->dst_identity;
	kind->endpoint = tg_subject(s, endpoint, what);
	kind->what = what;
	if (tg_limited(kind))
		tg_count(skb, TG_REASON_EVENT_LIMITED, (what >> 8 & 0xff) == TG_EGRESS);
	else
		tg_event(skb, endpoint, what);
}

/* A packet that is dropped for `reason`. */
tg_global int tg_denied(struct __sk_buff *skb, __u32 endpoint, __u32 reason)
{
	struct tg_scratch *s = tg_work();
	__u32 direction;

	if (!s)
		return 0;
	/* Whose policy said no; else where the packet was. */
	if (s->ingress.reason)
		direction = TG_INGRESS;
	else
		direction = s->egress.reason || s->from_pod ? TG_EGRESS : TG_INGRESS;
	tg_count(skb, reason & 0xff, direction == TG_EGRESS);
	tg_offer(skb, s, endpoint, TG_WHAT(reason & 0xff, direction, 0));
	return 0;
}

tg_inline int tg_drop(struct tg_run *r, __u32 reason)
{
	tg_answer(r, reason);
	if (!dry_run)
		tg_denied(r->skb, r->ep ? r->ep->id : 0, reason);
	return TC_ACT_SHOT;
}

/* What the ends' policies want said of a flow that passes: audits, then what a rule logs. */
tg_global int tg_report(struct __sk_buff *skb)
{
	struct tg_scratch *s = tg_work();
	__u32 at;

	if (!s)
		return 0;
	for (at = 0; at < 4; at++) {
		__u32 direction = at & 1, flags = at & 2 ? TG_EVENT_LOG : TG_EVENT_AUDIT;
		const struct tg_verdict *v = direction == TG_EGRESS ? &s->egress : &s->ingress;
		__u32 reason = flags == TG_EVENT_LOG ? TG_FORWARDED : v->audit;

		if (flags == TG_EVENT_LOG ? !v->log : !v->audit)
			continue;
		if (flags == TG_EVENT_AUDIT)
			tg_count(skb, TG_REASON_AUDIT, direction == TG_EGRESS);
		tg_offer(skb, s, 0, TG_WHAT(reason, direction, flags));
	}
	return 0;
}

/* ---- forwarding --------------------------------------------------------------- */

tg_inline int tg_pass(struct tg_run *r)
{
	tg_answer(r, TG_FORWARDED);
	tg_count(r->skb, TG_FORWARDED, r->from_pod);
	return TG_PASS;
}

tg_inline int tg_no_mac(const __u8 mac[6])
{
	return !(mac[0] | mac[1] | mac[2] | mac[3] | mac[4] | mac[5]);
}

/* Into the pod at `forward`, or on to the stack. */
tg_inline int tg_deliver(struct __sk_buff *skb, int from_pod, const struct tg_forward *forward)
{
	const __u32 *macs = (const __u32 *)forward->pod_mac;
	struct ethhdr *eth;
	__u32 *to;

	tg_count(skb, TG_FORWARDED, from_pod);
	if (!from_pod || !forward->ifindex)
		return TG_PASS;
	/* Back out of the uplink: the answer of a NodePort has an address of the node. */
	if (tg_no_mac(forward->pod_mac))
		return bpf_redirect_neigh(forward->ifindex, NULL, 0, 0);
	eth = tg_at(skb, 0, sizeof(*eth));
	if (!eth) /* never: every header before it was parsed */
		return TC_ACT_SHOT;
	/* Both have destination and source in this order, twelve bytes on end. */
	to = (__u32 *)eth;
	to[0] = macs[0];
	to[1] = macs[1];
	to[2] = macs[2];
	return bpf_redirect_peer(forward->ifindex, 0);
}

tg_inline int tg_forward_packet(struct tg_run *r)
{
	const struct tg_forward *forward = &r->s->forward;

	tg_answer(r, TG_FORWARDED);
	if (!dry_run && tg_tracing())
		tg_trace(r->skb, r->from_pod && !forward->ifindex ? TG_TO_STACK : TG_TO_ENDPOINT,
			 r->s->how);
	return tg_deliver(r->skb, r->from_pod, forward);
}

tg_inline void tg_set_forward(struct tg_forward *forward, const struct tg_endpoint *ep)
{
	forward->ifindex = ep->ifindex;
	__builtin_memcpy(forward->pod_mac, ep->pod_mac, 6);
	__builtin_memcpy(forward->host_mac, ep->host_mac, 6);
}

#endif
