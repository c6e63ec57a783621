/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who may send as whom: source addresses, ARP and neighbour discovery. */
#ifndef TIDEGATE_L2_H
#define TIDEGATE_L2_H

#include <tidegate/end.h>

#define TG_ND_RS 133
#define TG_ND_NS 135
#define TG_ND_NA 136

struct tg_arp {
	__be16 hardware, protocol;
	__u8 hardware_len, protocol_len;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
} __attribute__((packed));

/* A pod may send from its own addresses and from fe80::/10. */
tg_inline int tg_owns(const struct tg_endpoint *ep, const struct tg_addr *addr)
{
	if (tg_addr_is_v4(addr))
		return tg_addr_equal(addr, &ep->ip4);
	/* A pod without IPv6 does not own the unspecified address. */
	return (tg_addr_equal(addr, &ep->ip6) && !tg_addr_is_zero(addr)) ||
	       tg_addr_is_link_local(addr);
}

/* Probes for its own address carry no sender (RFC 5227). */
tg_global int tg_check_arp(struct __sk_buff *skb, const struct tg_endpoint *ep)
{
	struct tg_arp arp;
	struct tg_addr sender;
	__be32 ip;

	if (tg_load(skb, ETH_HLEN, &arp, sizeof(arp)))
		return TG_DROP_TRUNCATED;
	/* Other sizes would put the sender elsewhere than it is looked for. */
	if (arp.hardware != bpf_htons(1) || arp.protocol != bpf_htons(ETH_P_IP) ||
	    arp.hardware_len != 6 || arp.protocol_len != 4)
		return TG_DROP_L2_SENDER;
	__builtin_memcpy(&ip, arp.sender_ip, 4);
	tg_addr_v4(&sender, ip);
	if (ip && (!ep || !tg_addr_equal(&sender, &ep->ip4)))
		return TG_DROP_L2_SENDER;
	return 0;
}

/* RFC 4861: hop limit 255 proves the sender is on the link. Routers are not
 * pods; an advertisement may only be of the sender's own address. */
static __noinline __attribute__((unused)) int tg_check_nd(struct tg_run *r)
{
	const struct tg_endpoint *ep = r->ep;
	struct tg_addr target;
	__u8 type = r->s->p.icmp_type;

	if (!ep)
		return TG_DROP_PENDING;
	if (r->s->p.family == 4 || r->s->p.hop_limit != 255)
		return TG_DROP_ND;
	if (!r->from_pod)
		return 0;
	if (type != TG_ND_RS && type != TG_ND_NS && type != TG_ND_NA)
		return TG_DROP_ND;
	/* Duplicate address detection asks from ::. */
	if (tg_addr_is_zero(&r->s->p.t.src))
		return type == TG_ND_NA ? TG_DROP_INVALID_SOURCE : 0;
	if (!tg_owns(ep, &r->s->p.t.src))
		return TG_DROP_INVALID_SOURCE;
	if (type != TG_ND_NA)
		return 0;
	if (tg_load(r->skb, r->s->p.l4 + 8, &target, sizeof(target)))
		return TG_DROP_TRUNCATED;
	return tg_owns(ep, &target) ? 0 : TG_DROP_L2_SENDER;
}

#endif
