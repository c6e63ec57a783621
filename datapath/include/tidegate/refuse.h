/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who asks for what nobody serves is told so at once, as by a host without a
 * listener: TCP by a reset, the rest by an ICMP error. The packet becomes the
 * answer; where it goes is the caller's. Packets with options, extension headers
 * or in fragments get none. */
#ifndef TIDEGATE_REFUSE_H
#define TIDEGATE_REFUSE_H

#include <tidegate/nat.h>

#define TG_REFUSE_TTL 64
#define TG_ICMP_UNREACHABLE 3
#define TG_ICMP_PORT 3
#define TG_ICMP_FRAGMENTATION 4
#define TG_ICMPV6_UNREACHABLE 1
#define TG_ICMPV6_TOO_BIG 2
#define TG_ICMPV6_PORT 4

struct tg_icmp_error4 {
	struct iphdr ip;
	__be32 icmp[2];
	__be32 quoted[7]; /* IP header and ports */
};
TG_SIZE(struct tg_icmp_error4, 56);

struct tg_icmp_error6 {
	struct ipv6hdr ip;
	__be32 icmp[2];
	__be32 quoted[12];
};
TG_SIZE(struct tg_icmp_error6, 96);

/* Added up in one's complement; the order of words does not matter. */
#define tg_sum_words(sum, words, count)                                   \
	do {                                                              \
		for (int at = 0; at < (count); at++)                      \
			sum = tg_csum_add(sum, ((const __be32 *)(words))[at]); \
	} while (0)

/* Of the answer: from whom the packet was for, to whom it came from. */
tg_inline __u32 tg_sum_pseudo(const struct tg_packet *p, __u8 protocol, __u32 length)
{
	__u32 sum = bpf_htonl(length + protocol);

	if (p->family == 4)
		return tg_csum_add(tg_csum_add(sum, p->t.src.w[3]), p->t.dst.w[3]);
	tg_sum_words(sum, p->t.src.w, 4);
	tg_sum_words(sum, p->t.dst.w, 4);
	return sum;
}

tg_inline void tg_answer4(struct iphdr *ip, const struct tg_packet *p, __u8 protocol, __u16 length)
{
	__u32 sum = 0;

	__builtin_memset(ip, 0, sizeof(*ip));
	*(__u8 *)ip = 0x45;
	ip->tot_len = bpf_htons(length);
	ip->ttl = TG_REFUSE_TTL;
	ip->protocol = protocol;
	ip->saddr = p->t.dst.w[3];
	ip->daddr = p->t.src.w[3];
	tg_sum_words(sum, ip, 5);
	ip->check = ~tg_csum_fold(sum);
}

tg_inline void tg_answer6(struct ipv6hdr *ip, const struct tg_packet *p, __u8 next, __u16 length)
{
	__builtin_memset(ip, 0, sizeof(*ip));
	*(__u8 *)ip = 0x60;
	ip->payload_len = bpf_htons(length);
	ip->nexthdr = next;
	ip->hop_limit = TG_REFUSE_TTL;
	__builtin_memcpy(&ip->saddr, &p->t.dst, 16);
	__builtin_memcpy(&ip->daddr, &p->t.src, 16);
}

/* RFC 9293, 3.10.7.1: what a closed port answers. */
tg_global int tg_reset(struct __sk_buff *skb, const struct tg_packet *p)
{
	__be32 words[5];
	struct ipv6hdr ip6;
	struct iphdr ip4;
	__u32 l4, sum, length;
	__u8 flags, header;

	if (!p || p->l4 > TG_MAX_L4)
		return -1;
	l4 = p->l4;
	if (tg_load(skb, l4, words, sizeof(words)))
		return -1;
	header = ((__u8 *)words)[12] >> 4;
	flags = ((__u8 *)words)[13];
	if (flags & TG_TCP_RST)
		return -1;
	length = skb->len - l4 - header * 4 + !!(flags & TG_TCP_SYN) + !!(flags & TG_TCP_FIN);
	words[0] = words[0] << 16 | words[0] >> 16;
	if (flags & TG_TCP_ACK) {
		words[1] = words[2];
		words[2] = 0;
		words[3] = bpf_htonl(5u << 28 | (__u32)TG_TCP_RST << 16);
	} else {
		words[2] = bpf_htonl(bpf_ntohl(words[1]) + length);
		words[1] = 0;
		words[3] = bpf_htonl(5u << 28 | (__u32)(TG_TCP_RST | TG_TCP_ACK) << 16);
	}
	words[4] = 0;
	sum = tg_sum_pseudo(p, IPPROTO_TCP, sizeof(words));
	tg_sum_words(sum, words, 5);
	((__u16 *)words)[8] = ~tg_csum_fold(sum);
	if (bpf_skb_change_tail(skb, l4 + sizeof(words), 0) ||
	    bpf_skb_store_bytes(skb, l4, words, sizeof(words), 0))
		return -1;
	if (p->family == 4) {
		tg_answer4(&ip4, p, IPPROTO_TCP, sizeof(ip4) + sizeof(words));
		return bpf_skb_store_bytes(skb, ETH_HLEN, &ip4, sizeof(ip4), 0);
	}
	tg_answer6(&ip6, p, IPPROTO_TCP, sizeof(words));
	return bpf_skb_store_bytes(skb, ETH_HLEN, &ip6, sizeof(ip6), 0);
}

tg_global int tg_unreachable4(struct __sk_buff *skb, const struct tg_packet *p, __u32 mtu)
{
	struct tg_icmp_error4 e = {};
	__u32 sum = 0;

	if (!p || tg_load(skb, ETH_HLEN, e.quoted, sizeof(e.quoted)))
		return -1;
	e.icmp[0] = bpf_htonl(TG_ICMP_UNREACHABLE << 24 |
			      (mtu ? TG_ICMP_FRAGMENTATION : TG_ICMP_PORT) << 16);
	e.icmp[1] = bpf_htonl(mtu);
	tg_sum_words(sum, e.icmp, 9);
	((__u16 *)e.icmp)[1] = ~tg_csum_fold(sum);
	tg_answer4(&e.ip, p, IPPROTO_ICMP, sizeof(e));
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(e.quoted), 0) ||
	    bpf_skb_adjust_room(skb, sizeof(e) - sizeof(e.quoted), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &e, sizeof(e), 0);
}

tg_global int tg_unreachable6(struct __sk_buff *skb, const struct tg_packet *p, __u32 mtu)
{
	struct tg_icmp_error6 e = {};
	__u32 sum;

	if (!p || tg_load(skb, ETH_HLEN, e.quoted, sizeof(e.quoted)))
		return -1;
	e.icmp[0] = bpf_htonl(mtu ? TG_ICMPV6_TOO_BIG << 24 :
				    TG_ICMPV6_UNREACHABLE << 24 | TG_ICMPV6_PORT << 16);
	e.icmp[1] = bpf_htonl(mtu);
	sum = tg_sum_pseudo(p, IPPROTO_ICMPV6, sizeof(e) - sizeof(e.ip));
	tg_sum_words(sum, e.icmp, 14);
	((__u16 *)e.icmp)[1] = ~tg_csum_fold(sum);
	tg_answer6(&e.ip, p, IPPROTO_ICMPV6, sizeof(e) - sizeof(e.ip));
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(e.quoted), 0) ||
	    bpf_skb_adjust_room(skb, sizeof(e) - sizeof(e.quoted), BPF_ADJ_ROOM_MAC, 0))
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &e, sizeof(e), 0);
}

/* Makes the packet its own refusal, addressed to its sender; 0, or it gets none. `mtu`:
 * it is refused because it is larger than that; 0: because nobody serves it. */
tg_global int tg_refuse(struct __sk_buff *skb, const struct tg_packet *p, __u32 mtu)
{
	__u32 plain = ETH_HLEN;
	__u8 mac[2 * ETH_ALEN];
	int failed;

	if (!p || p->fragment)
		return -1;
	plain += p->family == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
	if (p->l4 != plain || tg_load(skb, 0, mac + ETH_ALEN, ETH_ALEN) ||
	    tg_load(skb, ETH_ALEN, mac, ETH_ALEN))
		return -1;
	if (p->t.protocol == IPPROTO_TCP && !mtu)
		failed = tg_reset(skb, p);
	else if (p->family == 4)
		failed = tg_unreachable4(skb, p, mtu);
	else
		failed = tg_unreachable6(skb, p, mtu);
	return failed ? failed : bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0);
}

#endif
