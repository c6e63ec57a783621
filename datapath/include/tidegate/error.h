/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP errors pass iff the flow they quote is known, and are translated back
 * as that flow's packets are. */
#ifndef TIDEGATE_ERROR_H
#define TIDEGATE_ERROR_H

#include <tidegate/flow.h>
#include <tidegate/l2.h>

/* The same inside the packet that an ICMP error quotes. The quoted transport
 * checksum stays as the sender computed it: nobody verifies it (RFC 792). */
tg_global int tg_rewrite_quoted(struct __sk_buff *skb, struct tg_packet *p,
					const struct tg_target *to)
{
	__u32 inner, l4, diff;
	struct tg_addr *addr;
	__be16 *port;

	if (!p || !to || p->l4 > TG_MAX_L4)
		return TG_DROP_REWRITE;
	addr = to->side ? &p->t.dst : &p->t.src;
	port = to->side ? &p->t.dport : &p->t.sport;
	inner = p->l4 + sizeof(struct tg_icmp);
	diff = tg_csum_diff(*port, to->port);
	if (p->family == 4) {
		__u8 first;

		/* Address and header checksum of the quoted header cancel out. */
		if (tg_load(skb, inner, &first, 1))
			return TG_DROP_REWRITE;
		l4 = inner + (first & 15) * 4;
	} else {
		l4 = inner + sizeof(struct ipv6hdr);
		diff = tg_csum_add(diff, tg_addr_diff(addr, &to->addr));
	}
	/* An echo's one port is its identifier. */
	l4 += tg_is_icmp(p->t.protocol) ? offsetof(struct tg_icmp, id) : to->side ? 2 : 0;
	if (bpf_l4_csum_replace(skb, p->l4 + offsetof(struct tg_icmp, checksum), 0, diff, 0) ||
	    (*port != to->port && bpf_skb_store_bytes(skb, l4, &to->port, 2, 0)))
		return TG_DROP_REWRITE;
	*addr = to->addr;
	*port = to->port;
	return tg_store_addr(skb, inner, to);
}

struct tg_quoted {
	struct tg_ct *ct;
	int reply; /* the quoted packet went against the way the flow began */
};

static __noinline int tg_find_quoted(struct tg_run *r, struct tg_quoted *q)
{
	const struct tg_endpoint *ep = r->ep;
	struct tg_half_open_set *set;
	struct tg_ct *ct;
	int i;

	if (!ep)
		return TG_DROP_PENDING;
	tg_key(r);
	ct = tg_lookup(r);
	/* A flow in a share is newer than a closed one. */
	q->ct = ct && !tg_closed(ct->flags) ? ct : NULL;
	/* To the receiver of an error the other end is the quoted destination, to
	 * its sender the quoted source. */
	for (i = 0; i < 2 && !q->ct; i++) {
		if (ep) {
			set = tg_share_set(r, ep);
			q->ct = set ? tg_lookup_set(r, set) : NULL;
		}
		ep = tg_local(r->node, r->from_pod ? &r->s->p.t.src : &r->s->p.t.dst);
	}
	if (!q->ct)
		q->ct = ct ? ct : tg_lookup_answered(r);
	if (!q->ct)
		return TG_DROP_ICMP_ERROR;
	q->reply = tg_is_reply(r, q->ct->flags);
	return 0;
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

/* From the client, about a reply that it saw come from the frontend: now about
 * the reply that the backend sent. */
static __noinline int tg_error_to_backend(struct tg_run *r, const struct tg_addr *frontend,
					  struct tg_quoted *q)
{
	struct tg_target *inner = &r->s->inner, *outer = &r->s->outer;
	int reason;

	if (!q->ct || !q->reply || (q->ct->flags & TG_CT_HAIRPIN))
		return TG_DROP_ICMP_ERROR;
	inner->addr = outer->addr = q->ct->nat_addr;
	inner->port = q->ct->nat_port;
	inner->side = TG_SIDE_SRC;
	outer->side = TG_SIDE_DST;
	if ((tg_read_word(q->ct) ^ r->s->proof) & TG_PROOF_MASK)
		return TG_DROP_ICMP_ERROR;
	reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
	if (!reason)
		reason = tg_rewrite_outer(r, frontend, outer);
	return reason ? reason : tg_find_quoted(r, q);
}

/* The error's own addresses are `src`, `dst`; r->s->p.t is the quoted tuple. */
static __noinline int tg_icmp_error(struct tg_run *r)
{
	struct tg_addr src = r->s->p.t.src, dst = r->s->p.t.dst;
	struct tg_target *inner = &r->s->inner, *outer = &r->s->outer;
	struct tg_quoted q = {};
	__u32 flags;
	__u64 word;
	int reason;

	reason = tg_parse_quoted(r->skb, &r->s->p);
	if (reason)
		return reason;
	/* An error goes to whoever sent what it quotes, and a pod, being no router,
	 * reports only what was sent to it. */
	if (!tg_addr_equal(&dst, &r->s->p.t.src) ||
	    (r->from_pod && !tg_owns(r->ep, &r->s->p.t.dst)))
		return TG_DROP_ICMP_ERROR;
	reason = tg_find_quoted(r, &q);
	if (!reason && q.ct && (q.ct->flags & TG_CT_SERVICE))
		reason = tg_error_to_backend(r, &dst, &q);
	if (reason || !q.ct)
		return TG_DROP_ICMP_ERROR;
	/* The error travels against the packet it quotes. */
	word = tg_read_word(q.ct);
	if (word != tg_word(r->s->epoch, r->s->proof)) {
		reason = tg_rejudge(r->skb, r->ep, q.ct, word,
				    (q.reply ? TG_WAY_REPLY : 0) | (r->from_pod ? 0 : TG_WAY_OUT));
		if (reason)
			return reason;
	}
	flags = q.ct->flags;
	r->s->forward = q.reply ? q.ct->to_dst : q.ct->to_src;
	inner->addr = outer->addr = q.ct->nat_addr;
	inner->port = q.ct->nat_port;
	if (!dry_run && tg_read_word(q.ct) != tg_word(r->s->epoch, r->s->proof))
		return TG_DROP_ICMP_ERROR;
	if (!(flags & TG_CT_NAT) || q.reply)
		return 0;
	/* A pod that reaches itself has two translations to undo; none is made. */
	if (flags & (TG_CT_HAIRPIN | TG_CT_SERVICE))
		return TG_DROP_ICMP_ERROR;
	inner->side = TG_SIDE_DST;
	outer->side = TG_SIDE_SRC;
	flags = tg_addr_equal(&src, &r->s->p.t.dst);
	reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
	if (reason || !flags)
		return reason;
	return tg_rewrite_outer(r, &src, outer);
}

#endif
