/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The short way of what only passes through this node on its way from a client
 * outside to a backend elsewhere, and of the answers: translated before the stack
 * has made an skb of it, and sent back out of the interface it came in by.
 *
 * Tables, entries and meaning are those of `uplink.h`, and so nothing is refused,
 * dropped or ended here. Whatever this cannot send on as it should passes as it came,
 * and tc does with it what it does without us: other interfaces, unknown neighbours,
 * fragments, ICMP errors, backends on this node, flows that are over, every denial.
 */
#ifndef TIDEGATE_XDP_H
#define TIDEGATE_XDP_H

#include <tidegate/snat.h>

enum { TG_NOT_KNOWN = -2 }; /* none of XDP_* */

/* The length of the upper layer of a whole packet without options that has hops
 * left; 0: it is another. */
tg_inline __u32 tg_xdp_upper(struct tg_run *r)
{
	__u32 length, head = r->s->p.l4 - ETH_HLEN;

	if (r->s->p.family == 4) {
		struct iphdr *ip = tg_at(r->skb, ETH_HLEN, sizeof(*ip));

		if (!ip || head != sizeof(*ip) || ip->ttl <= 1)
			return 0;
		length = bpf_ntohs(ip->tot_len);
	} else {
		struct ipv6hdr *ip = tg_at(r->skb, ETH_HLEN, sizeof(*ip));

		if (!ip || head != sizeof(*ip) || ip->hop_limit <= 1)
			return 0;
		length = bpf_ntohs(ip->payload_len) + head;
	}
	return length > head && length + ETH_HLEN <= tg_length(r->skb) ? length - head : 0;
}

/* Whether this may be sent on from here, and its checksum is its own. One that comes
 * from the other end of a veth may have that of the pseudo header only, for a device to
 * complete: what tc's helper knows from the skb is seen here by the sum itself. Of the
 * finished ones one in 65,536 looks like it, and takes the long way. */
static __noinline int tg_xdp_plain(struct tg_run *r)
{
	const struct tg_tuple *t = &r->s->p.t;
	__u32 length, sum, at, i;
	__u16 *check;

	if (r->s->p.kind != TG_KIND_FLOW || r->s->p.fragment)
		return 0;
	length = tg_xdp_upper(r);
	if (!length)
		return 0;
	if (t->protocol == IPPROTO_SCTP) { /* 0: the CRC has been left to a device */
		__u32 *crc = tg_at(r->skb, r->s->p.l4 + 8, sizeof(*crc));

		return crc && *crc;
	}
	if (t->protocol != IPPROTO_TCP && t->protocol != IPPROTO_UDP)
		return 0;
	at = t->protocol == IPPROTO_TCP ? offsetof(struct tcphdr, check) :
					  offsetof(struct udphdr, check);
	check = tg_at(r->skb, r->s->p.l4 + at, sizeof(*check));
	if (!check)
		return 0;
	sum = (__u32)bpf_htons(length) + bpf_htons(t->protocol);
	for (i = r->s->p.family == 4 ? 3 : 0; i < 4; i++)
		sum = tg_csum_add(sum, tg_csum_add(t->src.w[i], t->dst.w[i]));
	return *check != tg_csum_fold(sum);
}

/* Where a packet from `src` to `dst` goes on; 0: not out of where it came in, or not
 * by anything known here. The route's interface shows by its address also whether the
 * frame was for this node at all: XDP sees what others are sent, too. */
static __noinline int tg_xdp_way(struct tg_run *r, const struct tg_addr *src,
				 const struct tg_addr *dst, struct bpf_fib_lookup *fib)
{
	struct ethhdr *eth = tg_at(r->skb, 0, sizeof(*eth));
	__u32 *to, *own;

	if (!eth || !src || !dst || !fib)
		return 0;
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->l4_protocol = r->s->p.t.protocol;
	fib->ifindex = r->skb->ingress_ifindex;
	fib->tot_len = tg_length(r->skb) - ETH_HLEN;
	if (r->s->p.family == 4) {
		fib->family = TG_AF_INET;
		fib->ipv4_src = src->w[3];
		fib->ipv4_dst = dst->w[3];
	} else {
		fib->family = TG_AF_INET6;
		__builtin_memcpy(fib->ipv6_src, src, 16);
		__builtin_memcpy(fib->ipv6_dst, dst, 16);
	}
	if (bpf_fib_lookup(r->skb, fib, sizeof(*fib), 0) != BPF_FIB_LKUP_RET_SUCCESS ||
	    fib->ifindex != r->skb->ingress_ifindex)
		return 0;
	to = (__u32 *)eth->h_dest;
	own = (__u32 *)fib->smac;
	return to[0] == own[0] && *(__u16 *)(to + 1) == *(__u16 *)(own + 1);
}

/* As `nat` says, to where `fib` says. From here on it is ours, whatever happens. */
static __noinline int tg_xdp_send(struct tg_run *r, const struct tg_nat *nat,
				  const struct bpf_fib_lookup *fib)
{
	struct ethhdr *eth;

	if (!nat || !fib || tg_nat_apply(r, nat) || tg_hop(r->skb))
		return XDP_ABORTED;
	eth = tg_at(r->skb, 0, sizeof(*eth));
	if (!eth)
		return XDP_ABORTED;
	__builtin_memcpy(eth->h_dest, fib->dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib->smac, ETH_ALEN);
	tg_count(r->skb, TG_FORWARDED, 0);
	return XDP_TX;
}

/* SCTP's checksum covers ports and cannot be patched. */
tg_inline int tg_xdp_may(const struct tg_run *r, const struct tg_nat *nat)
{
	return r->s->p.t.protocol != IPPROTO_SCTP ||
	       (nat->sport == r->s->p.t.sport && nat->dport == r->s->p.t.dport);
}

/* `answers`: as for tc, only those that come back count. */
static __noinline int tg_xdp_known(struct tg_run *r, int answers)
{
	struct tg_scratch *s = r->s;
	struct bpf_fib_lookup fib;
	struct tg_nat *nat;

	tg_nat_key(&s->nat_key, &s->p.t);
	nat = tg_nat_find(&s->nat_key, &s->nat_found);
	if (!nat || (answers && !(s->nat_found.flags & TG_NAT_REPLY)))
		return TG_NOT_KNOWN;
	/* What is carried to its backend's node is tc's. */
	if ((s->nat_found.flags & TG_NAT_DSR) &&
	    (s->p.t.protocol != IPPROTO_TCP || tg_is_syn(&s->p)))
		return XDP_PASS;
	if ((s->nat_found.flags & (TG_NAT_HOST | TG_NAT_MASQUERADE)) || tg_nat_left(r) || !tg_xdp_may(r, &s->nat_found) ||
	    !tg_xdp_way(r, &s->nat_found.src, &s->nat_found.dst, &fib))
		return XDP_PASS;
	tg_nat_touch(r, nat, &s->nat_found);
	return tg_xdp_send(r, &s->nat_found, &fib);
}

static __noinline int tg_xdp_new(struct tg_run *r, const struct tg_choice *choice)
{
	struct tg_scratch *s = r->s;
	struct bpf_fib_lookup fib;

	if (!choice || dsr)
		return XDP_PASS;
	s->inner.addr = choice->addr;
	if (tg_local(r->node, &s->inner.addr) || tg_is_node(&s->inner.addr) ||
	    (s->p.t.protocol == IPPROTO_SCTP && choice->port != s->p.t.dport) ||
	    !tg_node_source(s->p.family, &s->outer.addr) ||
	    !tg_xdp_way(r, &s->outer.addr, &s->inner.addr, &fib) || tg_nat_make(0))
		return XDP_PASS;
	tg_count_asked(r, &s->p.t.dst, s->p.t.dport, 0);
	return tg_xdp_send(r, &s->nat_made, &fib);
}

static __noinline int tg_xdp_service(struct tg_run *r)
{
	struct tg_choice *choice = &r->s->choice;
	struct tg_frontend_key key = { .addr = r->s->p.t.dst, .port = r->s->p.t.dport,
				       .protocol = r->s->p.t.protocol };
	struct tg_ct *ct;
	int done;

	if (tg_service(&key, 0, choice) != TG_SERVICE_SPECIAL ||
	    !(choice->base >> TG_FRONTEND_FLAGS & TG_FRONTEND_OUTSIDE))
		return XDP_PASS;
	if (choice->base >> TG_FRONTEND_FLAGS & TG_FRONTEND_RANGES &&
	    !tg_may_ask(choice->base, &r->s->p.t.src))
		return XDP_PASS;
	done = tg_xdp_known(r, 0);
	if (done != TG_NOT_KNOWN)
		return done;
	tg_key(r);
	ct = tg_is_syn(&r->s->p) ? NULL : tg_lookup(r);
	/* A pod of this node has the flow. */
	if (ct && (ct->flags & TG_CT_SERVICE))
		return XDP_PASS;
	return tg_choose(r, choice) == TG_SERVICE_FOUND ? tg_xdp_new(r, choice) : XDP_PASS;
}

tg_inline int tg_xdp(struct xdp_md *ctx)
{
	struct tg_run r = { .skb = ctx };
	__u16 port;
	int done;

	/* What is told of packet by packet is tc's. */
	if (tg_tracing() || tg_open(&r) || tg_parse(ctx, &r.s->p) || !tg_xdp_plain(&r))
		return XDP_PASS;
	port = bpf_ntohs(r.s->p.t.dport);
	if ((port >= snat_first && port <= snat_last) || r.s->p.t.protocol == IPPROTO_SCTP) {
		done = tg_xdp_known(&r, 1);
		if (done != TG_NOT_KNOWN)
			return done;
	}
	return tg_xdp_service(&r);
}

#endif
