/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Rewriting addresses and ports. Transport checksums go through the helper:
 * only it knows whether the stack has left them for the device to complete. */
#ifndef TIDEGATE_NAT_H
#define TIDEGATE_NAT_H

#include <stddef.h>
#include <tidegate/parse.h>

enum tg_side { TG_SIDE_SRC = 0, TG_SIDE_DST = 1 };

struct tg_target {
	struct tg_addr addr;
	__be16 port;
	__u16 side; /* enum tg_side */
};

/* One's complement difference, as bpf_l4_csum_replace takes it. */
tg_inline __u32 tg_csum_diff(__u32 from, __u32 to)
{
	__u64 sum = (__u64)(__u32)~from + to;

	return (sum & 0xffffffff) + (sum >> 32);
}

tg_inline __u32 tg_csum_add(__u32 x, __u32 y)
{
	__u64 sum = (__u64)x + y;

	return (sum & 0xffffffff) + (sum >> 32);
}

tg_inline __u32 tg_addr_diff(const struct tg_addr *from, const struct tg_addr *to)
{
	__u32 sum = tg_csum_diff(from->w[3], to->w[3]);

	if (tg_addr_is_v4(from))
		return sum;
	sum = tg_csum_add(sum, tg_csum_diff(from->w[0], to->w[0]));
	sum = tg_csum_add(sum, tg_csum_diff(from->w[1], to->w[1]));
	return tg_csum_add(sum, tg_csum_diff(from->w[2], to->w[2]));
}

tg_inline __u16 tg_csum_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* RFC 1624: HC' = ~(~HC + ~m + m'). */
tg_inline __u16 tg_csum_apply(__u16 check, __u32 diff)
{
	return ~tg_csum_fold(tg_csum_add((__u16)~check, diff));
}

tg_inline int tg_csum_offset(__u8 protocol)
{
	return protocol == IPPROTO_TCP ? (int)offsetof(struct tcphdr, check) :
	       protocol == IPPROTO_UDP ? (int)offsetof(struct udphdr, check) :
	       protocol == IPPROTO_ICMPV6 ? (int)offsetof(struct tg_icmp, checksum) : -1;
}

/* The address in the IP header at `at`, and an IPv4 header's checksum. */
tg_global int tg_store_addr(struct __sk_buff *skb, __u32 at, const struct tg_target *to)
{
	if (!to || at > TG_MAX_L4)
		return TG_DROP_REWRITE;
	if (tg_addr_is_v4(&to->addr)) {
		struct iphdr *ip = tg_at(skb, at, sizeof(*ip));
		__be32 *addr;

		if (!ip)
			return TG_DROP_REWRITE;
		addr = to->side ? &ip->daddr : &ip->saddr;
		ip->check = tg_csum_apply(ip->check, tg_csum_diff(*addr, to->addr.w[3]));
		*addr = to->addr.w[3];
	} else {
		struct ipv6hdr *ip = tg_at(skb, at, sizeof(*ip));

		if (!ip)
			return TG_DROP_REWRITE;
		__builtin_memcpy(to->side ? &ip->daddr : &ip->saddr, &to->addr, 16);
	}
	return 0;
}

/* Gives one side of the packet another address and port; `t` follows. */
tg_global int tg_rewrite(struct __sk_buff *skb, struct tg_packet *p,
				 const struct tg_target *to)
{
	struct tg_addr *addr;
	__be16 *port, *ports;
	int check;
	__u32 l4;

	if (!p || !to)
		return TG_DROP_REWRITE;
	addr = to->side ? &p->t.dst : &p->t.src;
	port = to->side ? &p->t.dport : &p->t.sport;
	l4 = p->l4;
	check = tg_csum_offset(p->t.protocol);
	if (p->fragment != TG_LATER_FRAGMENT && l4 <= TG_MAX_L4) {
		__u64 mangled = p->t.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

		if (check >= 0 && bpf_l4_csum_replace(skb, l4 + check, 0,
						      tg_addr_diff(addr, &to->addr),
						      BPF_F_PSEUDO_HDR | mangled))
			return TG_DROP_REWRITE;
		if (*port != to->port) {
			/* CRC32c covers the ports and cannot be patched here. */
			if (p->t.protocol == IPPROTO_SCTP)
				return TG_DROP_SCTP_PORT;
			if (bpf_l4_csum_replace(skb, l4 + check, 0,
						tg_csum_diff(*port, to->port), mangled))
				return TG_DROP_REWRITE;
			ports = tg_at(skb, l4, 2 * sizeof(*ports));
			if (!ports)
				return TG_DROP_REWRITE;
			ports[to->side ? 1 : 0] = to->port;
		}
	}
	*addr = to->addr;
	*port = to->port;
	return tg_store_addr(skb, ETH_HLEN, to);
}

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

#endif
