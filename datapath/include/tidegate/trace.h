/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Packets told of one by one, for who looks for a fault: those that a filter
 * names, and for as long as it says, from the next tick on. Without a filter it costs
 * the short way nothing, and what takes the long one a load. */
#ifndef TIDEGATE_TRACE_H
#define TIDEGATE_TRACE_H

#include <tidegate/parse.h>

tg_inline int tg_trace_identity(const struct tg_addr *addr, __u32 identity)
{
	struct tg_ipcache *found = bpf_map_lookup_elem(&ipcache_v1, addr);
	__u32 held = TG_ID_WORLD;

	if (found)
		held = *(volatile __u32 *)&found->identity & TG_ID_MASK;
	return held == identity;
}

tg_inline int tg_trace_end(const struct tg_trace_filter *f, const struct tg_addr *addr)
{
	return tg_addr_equal(&f->ip4, addr) || tg_addr_equal(&f->ip6, addr);
}

/* What a packet says, without options and extension headers; -1: it is no IP. */
tg_inline int tg_trace_parse(struct __sk_buff *skb, struct tg_trace *seen)
{
	__u32 l4 = ETH_HLEN;
	__be32 words[5];
	__be16 type;

	if (tg_load(skb, offsetof(struct ethhdr, h_proto), &type, 2))
		return -1;
	if (type == bpf_htons(ETH_P_IP)) {
		if (tg_load(skb, l4, words, 20))
			return -1;
		tg_addr_v4(&seen->src, words[3]);
		tg_addr_v4(&seen->dst, words[4]);
		seen->protocol = ((__u8 *)words)[9];
		l4 += (((__u8 *)words)[0] & 0xf) * 4;
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		if (tg_load(skb, l4 + 6, &seen->protocol, 1) ||
		    tg_load(skb, l4 + 8, &seen->src, sizeof(seen->src)) ||
		    tg_load(skb, l4 + 24, &seen->dst, sizeof(seen->dst)))
			return -1;
		l4 += sizeof(struct ipv6hdr);
	} else {
		return -1;
	}
	if (tg_is_icmp(seen->protocol)) {
		if (!tg_load(skb, l4, &seen->sport, 2))
			seen->dport = 0xffff;
		if (!seen->sport && seen->protocol == IPPROTO_ICMPV6) {
			seen->sport = bpf_htons(ICMPV6_ECHO_REQUEST << 8);
			seen->dport = TG_ICMP_ZERO;
		}
	} else if (seen->protocol == IPPROTO_TCP || seen->protocol == IPPROTO_UDP ||
		   seen->protocol == IPPROTO_SCTP) {
		if (tg_load(skb, l4, &seen->sport, 4))
			seen->sport = seen->dport = 0;
		if (seen->protocol == IPPROTO_TCP && tg_load(skb, l4 + 13, &seen->tcp_flags, 1))
			seen->tcp_flags = 0;
	}
	return 0;
}

tg_inline int tg_trace_wanted(const struct tg_trace_filter *f, const struct tg_trace *seen)
{
	if (f->protocol && f->protocol != seen->protocol)
		return 0;
	if (f->port && f->port != seen->sport && f->port != seen->dport)
		return 0;
	if (!(tg_addr_is_zero(&f->ip4) && tg_addr_is_zero(&f->ip6)) &&
	    !tg_trace_end(f, &seen->src) && !tg_trace_end(f, &seen->dst))
		return 0;
	return !f->identity || tg_trace_identity(&seen->src, f->identity) ||
	       tg_trace_identity(&seen->dst, f->identity);
}

/* The ring holds what fits; what does not is counted with other lost events. */
tg_global int tg_trace(struct __sk_buff *skb, __u32 point, __u32 how)
{
	struct tg_trace_filter *filter;
	struct tg_trace seen = {};
	__u32 zero = 0, lost = TG_REASON_EVENT_LOST * 2;
	struct tg_counter *counter;

	filter = bpf_map_lookup_elem(&trace_filter_v1, &zero);
	if (!filter)
		return 0;
	seen.time = bpf_ktime_get_ns();
	if (seen.time > filter->until) {
		filter->until = 0;
		return 0;
	}
	if (tg_trace_parse(skb, &seen) || !tg_trace_wanted(filter, &seen))
		return 0;
	seen.point = point;
	seen.how = how;
	seen.ifindex = skb->ifindex;
	seen.length = skb->len;
	if (!bpf_ringbuf_output(&traces_v1, &seen, sizeof(seen), BPF_RB_NO_WAKEUP))
		return 0;
	counter = bpf_map_lookup_elem(&metrics_v1, &lost);
	if (counter)
		counter->packets += 1;
	return 0;
}

#endif
