/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Rewriting addresses, ports and hop limits. At tc transport checksums go through
 * the helper: only it knows whether the stack has left them for the device. */
#ifndef TIDEGATE_NAT_H
#define TIDEGATE_NAT_H

#include <stddef.h>
#include <tidegate/parse.h>

#define TG_AF_INET 2 /* linux/socket.h; of bpf_fib_lookup */
#define TG_AF_INET6 10

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

/* The transport checksum at `at` follows a difference. With BPF_F_MARK_MANGLED_0
 * one of 0, which is none, stays, and none becomes 0. */
tg_inline int tg_l4_csum(tg_context *skb, __u32 at, __u32 diff, __u64 flags)
{
#ifdef TG_XDP
	__u16 *check = tg_at(skb, at, sizeof(*check));

	if (!check)
		return -1;
	if ((flags & BPF_F_MARK_MANGLED_0) && !*check)
		return 0;
	*check = tg_csum_apply(*check, diff);
	if ((flags & BPF_F_MARK_MANGLED_0) && !*check)
		*check = 0xffff;
	return 0;
#else
	return bpf_l4_csum_replace(skb, at, 0, diff, flags);
#endif
}

/* The address in the IP header at `at`, and an IPv4 header's checksum. */
tg_global int tg_store_addr(tg_context *skb, __u32 at, const struct tg_target *to)
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
tg_global int tg_rewrite(tg_context *skb, struct tg_packet *p,
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

		if (check >= 0 && tg_l4_csum(skb, l4 + check, tg_addr_diff(addr, &to->addr),
					     BPF_F_PSEUDO_HDR | mangled))
			return TG_DROP_REWRITE;
		if (*port != to->port) {
			/* CRC32c covers the ports and cannot be patched here. */
			if (p->t.protocol == IPPROTO_SCTP)
				return TG_DROP_SCTP_PORT;
			if (tg_l4_csum(skb, l4 + check, tg_csum_diff(*port, to->port),
				       mangled))
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

/* One router less to live for. An enum tg_reason. */
tg_global int tg_hop(tg_context *skb)
{
	struct ethhdr *eth = tg_at(skb, 0, sizeof(*eth));

	if (!eth)
		return TG_DROP_TRUNCATED;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));
		__u16 before, after;

		if (!ip)
			return TG_DROP_TRUNCATED;
		if (ip->ttl <= 1)
			return TG_DROP_TTL;
		__builtin_memcpy(&before, &ip->ttl, 2);
		ip->ttl -= 1;
		__builtin_memcpy(&after, &ip->ttl, 2);
		ip->check = tg_csum_apply(ip->check, tg_csum_diff(before, after));
	} else {
		struct ipv6hdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));

		if (!ip)
			return TG_DROP_TRUNCATED;
		if (ip->hop_limit <= 1)
			return TG_DROP_TTL;
		ip->hop_limit -= 1;
	}
	return 0;
}

#endif
