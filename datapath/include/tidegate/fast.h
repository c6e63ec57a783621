/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The short way of a packet that changes nothing: of an established flow that
 * is not translated, judged in this epoch, seen in this second, while nothing is traced.
 *
 * Whatever is not just that takes the long way (`pod.h`), which does the same
 * for it and more. The node table is not asked: the flow's entry, written by
 * the tables of this epoch, says at which interface each of its ends lives. A
 * packet that comes from, or goes to, another interface takes the long way.
 */
#ifndef TIDEGATE_FAST_H
#define TIDEGATE_FAST_H

#include <tidegate/account.h>

#define TG_LONG_WAY (-2) /* none of TC_ACT_* */

/* Any of these may begin, end or reset a flow. */
#define TG_TCP_CHANGES (TG_TCP_FIN | TG_TCP_SYN | TG_TCP_RST)

/* Fills the ports of TCP and UDP at `l4`; 0: it is something else, or changes a
 * flow, or does not lie in the linear data. */
tg_inline int tg_plain_ports(struct __sk_buff *skb, __u32 l4, struct tg_tuple *t)
{
	if (t->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = tg_at(skb, l4, sizeof(*tcp));

		if (!tcp || (((__u8 *)tcp)[13] & TG_TCP_CHANGES))
			return 0;
		t->sport = tcp->source;
		t->dport = tcp->dest;
		return 1;
	}
	if (t->protocol == IPPROTO_UDP) {
		struct udphdr *udp = tg_at(skb, l4, sizeof(*udp));

		if (!udp)
			return 0;
		t->sport = udp->source;
		t->dport = udp->dest;
		return 1;
	}
	return 0;
}

/* What to do with the packet of this tuple. `epoch`: read before anything else;
 * `key`: the caller's stack, of which Linux 6.1 leaves little: both families share it. */
tg_inline int tg_fast_flow(struct __sk_buff *skb, int from_pod, const struct tg_tuple *t,
			   __u32 l4, __u64 epoch, struct tg_ct_key *key)
{
	const struct tg_forward *sender, *receiver;
	struct tg_forward forward;
	struct tg_ct *ct;
	__u32 flags;
	int began;
	__u64 word;

	word = tg_word(epoch, tg_proof(tg_flow_hash(t)));
	/* Now, and not when it is compared: the addresses would be kept until then. */
	asm volatile("" : "+r"(word));
	began = tg_ct_key(t, key);
	ct = bpf_map_lookup_elem(&ct_v2, key);
	if (!ct || tg_read_word(ct) != word || ct->seen != tg_second_seen())
		return TG_LONG_WAY;
	flags = ct->flags;
	began = began == !!(flags & TG_CT_BEGAN_A);
	sender = began ? &ct->to_src : &ct->to_dst;
	receiver = began ? &ct->to_dst : &ct->to_src;
	if ((flags & (TG_CT_NAT | TG_CT_SERVICE | TG_CT_HAIRPIN)) ||
	    skb->ifindex != (from_pod ? sender : receiver)->ifindex)
		return TG_LONG_WAY;
	forward = *receiver;
	tg_barrier();
	if (tg_read_word(ct) != word)
		return TG_LONG_WAY;
	tg_account(ct, skb, !began);
	if (!began && tg_awaits(ct, t->protocol))
		tg_first_byte(skb, ct, l4);
	return tg_deliver(skb, from_pod, &forward);
}

/* What to do with TCP and UDP without IP options, extension headers, fragments
 * and tags, or TG_LONG_WAY. Each family has its own way to the end, so that the
 * words of an IPv4 address that are constants cost nothing. Inlined: a call's cost shows here. */
tg_inline int tg_fast(struct __sk_buff *skb, int from_pod)
{
	struct tg_control *control;
	struct tg_ct_key key;
	struct tg_tuple t;
	struct ethhdr *eth;
	__u32 zero = 0;
	__u64 epoch;

	control = bpf_map_lookup_elem(&control_v1, &zero);
	if (!control)
		return TG_LONG_WAY;
	epoch = *(volatile __u64 *)&control->epoch;
	tg_barrier();
	eth = tg_at(skb, 0, sizeof(*eth));
	if (dry_run || !eth || skb->vlan_present)
		return TG_LONG_WAY;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));

		if (!ip || *(__u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(TG_IP_MF | TG_IP_OFFSET)))
			return TG_LONG_WAY;
		tg_addr_v4(&t.src, ip->saddr);
		tg_addr_v4(&t.dst, ip->daddr);
		t.protocol = ip->protocol;
		if (tg_plain_ports(skb, ETH_HLEN + sizeof(*ip), &t))
			return tg_fast_flow(skb, from_pod, &t, ETH_HLEN + sizeof(*ip), epoch, &key);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));

		if (!ip || ip->version != 6)
			return TG_LONG_WAY;
		__builtin_memcpy(&t.src, &ip->saddr, sizeof(t.src));
		__builtin_memcpy(&t.dst, &ip->daddr, sizeof(t.dst));
		/* Mapped ones are in the tables as IPv4's. */
		if (tg_addr_is_v4(&t.src) || tg_addr_is_v4(&t.dst))
			return TG_LONG_WAY;
		t.protocol = ip->nexthdr;
		if (tg_plain_ports(skb, ETH_HLEN + sizeof(*ip), &t))
			return tg_fast_flow(skb, from_pod, &t, ETH_HLEN + sizeof(*ip), epoch, &key);
	}
	return TG_LONG_WAY;
}

#endif
