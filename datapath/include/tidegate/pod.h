/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The way of a packet at a pod's host-side interface.
 *
 * `from_pod` sees what leaves the pod, `to_pod` what enters it. One run settles
 * a flow for every end that lives on this node; a packet for a local pod then
 * goes straight into it, past the destination's hook.
 */
#ifndef TIDEGATE_POD_H
#define TIDEGATE_POD_H

#include <tidegate/error.h>
#include <tidegate/fast.h>
#include <tidegate/l2.h>
#include <tidegate/refuse.h>

tg_inline int tg_begin(struct tg_run *r)
{
	struct tg_node_key key = { .kind = TG_NODE_IFINDEX };
	int reason = tg_open(r);

	if (reason)
		return reason;
	key.addr.w[0] = r->skb->ifindex;
	r->ep = bpf_map_lookup_elem(r->node, &key);
	return r->ep ? 0 : TG_DROP_PENDING;
}

tg_inline int tg_check_packet(struct tg_run *r)
{
	int reason;

	if (r->s->p.kind == TG_KIND_ND)
		return tg_check_nd(r);
	if (r->from_pod && !tg_owns(r->ep, &r->s->p.t.src))
		return TG_DROP_INVALID_SOURCE;
	if (r->s->p.fragment && r->s->p.kind == TG_KIND_FLOW) {
		reason = tg_track_fragment(&r->s->p, dry_run);
		if (reason)
			return reason;
	}
	return r->s->p.kind == TG_KIND_ICMP_ERROR ? tg_icmp_error(r) : tg_flow(r);
}

tg_inline int tg_long_way(struct __sk_buff *skb, int from_pod)
{
	struct tg_run r = { .skb = skb, .from_pod = from_pod };
	int reason;

	if (from_pod && !dry_run && tg_tracing())
		tg_trace(skb, TG_FROM_ENDPOINT, TG_HOW_UNSAID);
	reason = tg_begin(&r);
	if (!r.s)
		return TC_ACT_SHOT;
	if (!reason)
		reason = tg_parse(skb, &r.s->p);
	if (reason)
		return tg_drop(&r, reason);
	/* What this node itself makes; the stack's own, not merely a node's address. */
	r.s->host = !from_pod && !skb->ingress_ifindex;
	if (r.s->p.kind == TG_KIND_ARP) {
		reason = from_pod ? tg_check_arp(skb, r.ep) : 0;
		return reason ? tg_drop(&r, reason) : tg_pass(&r);
	}
	reason = tg_check_packet(&r);
	if (!reason)
		return tg_forward_packet(&r);
	tg_drop(&r, reason);
	/* Back into the pod. */
	return r.s->refused && !dry_run && !tg_refuse(skb, &r.s->p, 0) ?
		       (int)bpf_redirect_peer(skb->ifindex, 0) : TC_ACT_SHOT;
}

tg_inline int tg_pod(struct __sk_buff *skb, int from_pod)
{
	int done = tg_fast(skb, from_pod);

	return done == TG_LONG_WAY ? tg_long_way(skb, from_pod) : done;
}

#endif
