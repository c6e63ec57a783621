/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Packets that leave the node past its stack: it would not forward what comes
 * from outside, or from a pod, with an address of the node itself as source. */
#ifndef TIDEGATE_LEAVE_H
#define TIDEGATE_LEAVE_H

#include <tidegate/nat.h>
#include <linux/pkt_cls.h>

/* On its way to `t->dst`, as the node's routes have it: a verdict of tc, or above
 * TC_ACT_VALUE_MAX an enum tg_reason. */
enum { TG_LEAVE_DROP = 1 << 8 };

tg_global int tg_route(struct __sk_buff *skb, const struct tg_packet *p)
{
	struct bpf_fib_lookup fib = {};
	struct ethhdr *eth;
	long found;
	int reason;

	if (!p)
		return TG_LEAVE_DROP | TG_DROP_NO_ROUTE;
	fib.l4_protocol = p->t.protocol;
	fib.ifindex = skb->ifindex;
	if (p->family == 4) {
		fib.family = TG_AF_INET;
		fib.ipv4_src = p->t.src.w[3];
		fib.ipv4_dst = p->t.dst.w[3];
	} else {
		fib.family = TG_AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &p->t.src, 16);
		__builtin_memcpy(fib.ipv6_dst, &p->t.dst, 16);
	}
	reason = tg_hop(skb);
	if (reason)
		return TG_LEAVE_DROP | reason;
	found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return bpf_redirect_neigh(fib.ifindex, NULL, 0, 0);
	eth = tg_at(skb, 0, sizeof(*eth));
	if (found != BPF_FIB_LKUP_RET_SUCCESS || !eth)
		return TG_LEAVE_DROP | TG_DROP_NO_ROUTE;
	__builtin_memcpy(eth->h_dest, fib.dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib.smac, ETH_ALEN);
	return bpf_redirect(fib.ifindex, 0);
}

#endif
