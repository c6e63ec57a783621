/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What leaves by an uplink, behind the stack: pods' flows to the world outside,
 * with an address and a port of the node; and answers of the node itself, if it is a
 * Service's backend (`uplink.h`).
 *
 * Policy, routes and netfilter see the pod, in both directions: answers are given
 * its address back before the stack sees them. What the node's own rules have
 * masqueraded first has no pod's address here any more.
 */
#ifndef TIDEGATE_MASQUERADE_H
#define TIDEGATE_MASQUERADE_H

#include <tidegate/uplink.h>

/* Whether packets to `addr` leave with the node's address, as the loader has it. */
static __noinline int tg_is_masqueraded(const struct tg_addr *addr)
{
	struct tg_prefix key = { .bits = 128 };
	__u32 *found;

	if (!addr)
		return 0;
	key.addr = *addr;
	found = bpf_map_lookup_elem(&masquerade_v1, &key);
	if (!found || !*(volatile __u32 *)found)
		return 0;
	return tg_is_outside(addr);
}

/* Whether the packet answers what began at the other end: who asked for the pod's
 * address is answered from it. */
static __noinline int tg_is_answer(struct tg_run *r)
{
	struct tg_half_open_set *set;
	struct tg_ct *ct, *young = NULL;

	tg_key(r);
	ct = tg_lookup(r);
	if (!ct || tg_closed(ct->flags)) {
		set = r->ep ? tg_share_set(r, r->ep) : NULL;
		young = set ? tg_lookup_set(r, set) : NULL;
	}
	if (young)
		ct = young;
	return ct && tg_is_reply(r, ct->flags);
}

/* The entry of this way, s->nat_made, of a flow that is or has to be translated.
 * Above 0: an enum tg_reason. */
static __noinline int tg_masquerade_find(struct tg_run *r)
{
	struct tg_scratch *s = r->s;
	struct tg_nat *nat;

	tg_nat_key(&s->nat_key, &s->p.t);
	nat = tg_nat_find(&s->nat_key, &s->nat_made);
	if (nat && !(tg_is_syn(&s->p) && tg_closed(s->nat_made.flags)) &&
	    !tg_nat_ended(r, &s->nat_made, s->p.t.protocol)) {
		tg_nat_touch(r, nat, &s->nat_made);
		return 0;
	}
	if (nat)
		tg_nat_remove(s, nat, &s->nat_key, &s->nat_made);
	if (!tg_is_masqueraded(&s->p.t.dst) || tg_is_answer(r))
		return TG_NOT_OURS;
	s->choice.addr = s->p.t.dst;
	s->choice.port = s->p.t.dport;
	s->choice.backend = 0;
	return tg_nat_make(TG_NAT_MASQUERADE);
}

/* Of a pod here, to whatever it is. */
tg_inline int tg_masquerade(struct tg_run *r)
{
	struct tg_ipcache who;
	int reason;

	/* Nothing is looked for on the way from pod to pod. */
	*(__u64 *)&who = tg_ipcache_word(&r->s->p.t.dst);
	if ((who.identity & TG_IPCACHE_PEER) || !tg_has_ports(r->s->p.t.protocol))
		return TG_PASS;
	if (r->s->p.fragment && tg_track_fragment(&r->s->p, 0))
		return tg_drop(r, TG_DROP_FRAGMENT);
	/* An echo's request has no destination port, and other ICMP no answers. */
	if (tg_is_icmp(r->s->p.t.protocol) && r->s->p.t.dport)
		return TG_PASS;
	reason = tg_masquerade_find(r);
	if (reason == TG_NOT_OURS)
		return TG_PASS;
	if (!reason)
		reason = tg_nat_apply(r, &r->s->nat_made);
	if (reason)
		return tg_drop(r, reason);
	tg_count(r->skb, TG_REASON_MASQUERADED, 1);
	return TG_PASS;
}

/* Answers of backends that are the node itself. */
tg_inline int tg_own_answer(struct tg_run *r)
{
	int reason;

	tg_nat_key(&r->s->nat_key, &r->s->p.t);
	if (!tg_nat_find(&r->s->nat_key, &r->s->nat_found) ||
	    !(r->s->nat_found.flags & TG_NAT_HOST) || !(r->s->nat_found.flags & TG_NAT_REPLY))
		return TG_PASS;
	reason = tg_nat_apply(r, &r->s->nat_found);
	return reason ? tg_drop(r, reason) : TG_PASS;
}

tg_inline int tg_to_net(struct __sk_buff *skb)
{
	struct tg_run r = { .skb = skb };
	struct tg_prefix any = {};

	/* Forwarded, or of the node's own making. */
	r.from_pod = skb->ingress_ifindex != 0;
	/* The first entry there is: most nodes masquerade nothing here. */
	if (r.from_pod && !bpf_map_lookup_elem(&masquerade_v1, &any))
		return TG_PASS;
	if (tg_open(&r) || tg_parse(skb, &r.s->p))
		return TG_PASS;
	if (r.from_pod) {
		r.ep = tg_local(r.node, &r.s->p.t.src);
		if (!r.ep)
			return TG_PASS;
	}
	if (r.s->p.kind == TG_KIND_ICMP_ERROR)
		return tg_net_error(&r, 1);
	if (r.s->p.kind != TG_KIND_FLOW)
		return TG_PASS;
	return r.from_pod ? tg_masquerade(&r) : tg_own_answer(&r);
}

#endif
