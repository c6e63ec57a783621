/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP errors pass iff the flow they quote is known, and are translated back
 * as that flow's packets are. */
#ifndef TIDEGATE_ERROR_H
#define TIDEGATE_ERROR_H

#include <tidegate/flow.h>

struct tg_quoted {
	struct tg_ct *ct;
	void *map;
	int begun_by_src; /* the quoted packet went the way the flow began */
};

static __noinline int tg_find_quoted(struct tg_run *r, struct tg_quoted *q)
{
	const struct tg_endpoint *ep = r->ep;
	int i;

	if (!ep)
		return TG_DROP_PENDING;
	q->map = &ct_v1;
	q->ct = tg_lookup(r, &ct_v1);
	if (q->ct)
		return 0;
	/* To the receiver of the error the peer is the quoted destination; the
	 * sender itself may be the peer. */
	for (i = 0; i < 2 && !q->ct; i++) {
		if (ep) {
			q->map = tg_share(ep);
			q->ct = q->map ? tg_lookup(r, q->map) : NULL;
		}
		ep = tg_local(r->node, &r->s->p.t.src);
	}
	return q->ct ? 0 : TG_DROP_ICMP_ERROR;
}

/* The outer address on one side, with the checksum that covers it. */
static __noinline int tg_rewrite_outer(struct tg_run *r, const struct tg_addr *from,
				       const struct tg_target *to)
{
	if (!from || !to)
		return TG_DROP_REWRITE;
	if (r->s->p.family == 6 &&
	    bpf_l4_csum_replace(r->skb, r->s->p.l4 + offsetof(struct tg_icmp, checksum), 0,
				tg_addr_diff(from, &to->addr), BPF_F_PSEUDO_HDR))
		return TG_DROP_REWRITE;
	return tg_store_addr(r->skb, ETH_HLEN, to);
}

/* r->s->p.t is the quoted tuple; `src`, `dst` are the error's own addresses. */
static __noinline int tg_icmp_error(struct tg_run *r)
{
	struct tg_addr src = r->s->p.t.src, dst = r->s->p.t.dst;
	struct tg_target *inner = &r->s->inner, *outer = &r->s->outer;
	struct tg_quoted q = {};
	__u32 flags;
	int reason, back;

	reason = tg_parse_quoted(r->skb, &r->s->p);
	if (reason)
		return reason;
	/* An error goes to whoever sent what it quotes. */
	if (!tg_addr_equal(&dst, &r->s->p.t.src))
		return TG_DROP_ICMP_ERROR;
	tg_key(r);
	reason = tg_find_quoted(r, &q);
	if (reason || !q.ct)
		return TG_DROP_ICMP_ERROR;
	flags = q.ct->flags;
	q.begun_by_src = !!(flags & TG_CT_BEGAN_A) == !!r->s->src_is_a;
	inner->addr = outer->addr = q.ct->nat_addr;
	inner->port = q.ct->nat_port;
	/* The error travels against the packet it quotes. */
	back = q.begun_by_src;
	r->s->forward = back ? q.ct->to_src : q.ct->to_dst;
	if (tg_read_word(q.ct) != tg_word(r->s->epoch, r->s->proof)) {
		/* rejudged by the flow's own next packet; until then, no error */
		return TG_DROP_ICMP_ERROR;
	}
	if (flags & TG_CT_SERVICE) {
		/* From the client, about a reply that it saw come from the frontend. */
		inner->side = TG_SIDE_SRC;
		outer->side = TG_SIDE_DST;
		reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
		return reason ? reason : tg_rewrite_outer(r, &dst, outer);
	}
	if (!(flags & TG_CT_NAT) || !q.begun_by_src || (flags & TG_CT_HAIRPIN))
		return 0;
	inner->side = TG_SIDE_DST;
	outer->side = TG_SIDE_SRC;
	back = tg_addr_equal(&src, &r->s->p.t.dst);
	reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
	if (reason || !back)
		return reason;
	return tg_rewrite_outer(r, &src, outer);
}

#endif
