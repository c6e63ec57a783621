/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Direct server return: a client outside is answered by its backend's node, with
 * the Service's address, and that node's policies see the client.
 *
 * The node that is asked sends on the packet that opens a flow (of TCP the SYN, of all
 * else each packet) as it came, inside a UDP datagram of its own to the backend's
 * address: Geneve (RFC 8926), with the backend's port as an option. What follows of TCP
 * goes to the backend's address bare, from the client's; the backend's node remembers.
 *
 * The backend's node opens what a node of the cluster sends to a pod of its own, and
 * nothing else; what is inside must come from outside the cluster and be for an
 * address of a node or a Service. docs/decisions/0011-dsr-by-geneve.md
 */
#ifndef TIDEGATE_DSR_H
#define TIDEGATE_DSR_H

#include <tidegate/error.h>
#include <tidegate/leave.h>
#include <tidegate/refuse.h>
#include <tidegate/snat.h>

#define TG_GENEVE_PORT 6081
#define TG_GENEVE_WORDS 2          /* of options */
#define TG_GENEVE_CRITICAL 0x40    /* who does not know the option must drop it */
#define TG_GENEVE_CLASS 0xfff1     /* of the experimental ones */
#define TG_GENEVE_TYPE 0x81        /* critical */
#define TG_DSR_HOPS 64

struct tg_geneve {
	__u8 words;
	__u8 flags;
	__be16 protocol; /* ethertype of what is inside */
	__be32 network;
	__be16 class;
	__u8 type;
	__u8 length; /* in words, without these four bytes */
	__be16 port; /* the backend's */
	__u16 pad;
};

struct tg_carrier4 {
	struct iphdr ip;
	struct udphdr udp;
	struct tg_geneve geneve;
} __attribute__((packed, aligned(4)));
TG_SIZE(struct tg_carrier4, 44);

struct tg_carrier6 {
	struct ipv6hdr ip;
	struct udphdr udp;
	struct tg_geneve geneve;
} __attribute__((packed, aligned(4)));
TG_SIZE(struct tg_carrier6, 64);

tg_inline __u32 tg_carrier(__u8 family)
{
	return family == 4 ? sizeof(struct tg_carrier4) : sizeof(struct tg_carrier6);
}

/* What says the flow's backend and Service: of TCP the backend's node remembers it. */
tg_inline int tg_dsr_tells(const struct tg_packet *p)
{
	return p->t.protocol != IPPROTO_TCP || tg_is_syn(p);
}

/* ---- the node that is asked ------------------------------------------------------------- */

tg_inline void tg_dsr_fill(struct udphdr *udp, struct tg_geneve *g, const struct tg_packet *p,
			   __be16 port, __u32 length)
{
	udp->source = bpf_htons(0xc000 | (tg_flow_hash(&p->t) & 0x3fff));
	udp->dest = bpf_htons(TG_GENEVE_PORT);
	udp->len = bpf_htons(length);
	udp->check = 0; /* also over IPv6: RFC 6935. What is inside has its own. */
	__builtin_memset(g, 0, sizeof(*g));
	g->words = TG_GENEVE_WORDS;
	g->flags = TG_GENEVE_CRITICAL;
	g->protocol = bpf_htons(p->family == 4 ? ETH_P_IP : ETH_P_IPV6);
	g->class = bpf_htons(TG_GENEVE_CLASS);
	g->type = TG_GENEVE_TYPE;
	g->length = 1;
	g->port = port;
}

static __noinline int tg_dsr_wrap4(struct tg_run *r, __be16 port, __u32 length)
{
	struct tg_carrier4 c;
	__u32 sum = 0;

	tg_dsr_fill(&c.udp, &c.geneve, &r->s->p, port, length - sizeof(c.ip));
	__builtin_memset(&c.ip, 0, sizeof(c.ip));
	*(__u8 *)&c.ip = 0x45;
	c.ip.tot_len = bpf_htons(length);
	c.ip.frag_off = bpf_htons(0x4000); /* not to be cut */
	c.ip.ttl = TG_DSR_HOPS;
	c.ip.protocol = IPPROTO_UDP;
	c.ip.saddr = r->s->inner.addr.w[3];
	c.ip.daddr = r->s->outer.addr.w[3];
	tg_sum_words(sum, &c.ip, 5);
	c.ip.check = ~tg_csum_fold(sum);
	return bpf_skb_store_bytes(r->skb, ETH_HLEN, &c, sizeof(c), 0);
}

static __noinline int tg_dsr_wrap6(struct tg_run *r, __be16 port, __u32 length)
{
	struct tg_carrier6 c;

	tg_dsr_fill(&c.udp, &c.geneve, &r->s->p, port, length - sizeof(c.ip));
	__builtin_memset(&c.ip, 0, sizeof(c.ip));
	*(__u8 *)&c.ip = 0x60;
	c.ip.payload_len = bpf_htons(length - sizeof(c.ip));
	c.ip.nexthdr = IPPROTO_UDP;
	c.ip.hop_limit = TG_DSR_HOPS;
	__builtin_memcpy(&c.ip.saddr, &r->s->inner.addr, 16);
	__builtin_memcpy(&c.ip.daddr, &r->s->outer.addr, 16);
	return bpf_skb_store_bytes(r->skb, ETH_HLEN, &c, sizeof(c), 0);
}

/* Into a datagram to the backend. An enum tg_reason; r->s->inner.addr: from whom. */
static __noinline int tg_dsr_wrap(struct tg_run *r, const struct tg_nat *nat)
{
	struct tg_packet *p = &r->s->p;
	__u32 room = tg_carrier(p->family);
	int failed;

	if (!nat || !tg_node_source(p->family, &r->s->inner.addr))
		return TG_DROP_NO_ROUTE;
	failed = tg_hop(r->skb);
	if (failed)
		return failed;
	r->s->outer.addr = nat->dst;
	if (bpf_skb_adjust_room(r->skb, room, BPF_ADJ_ROOM_MAC, 0))
		return TG_DROP_REWRITE;
	failed = p->family == 4 ? tg_dsr_wrap4(r, nat->dport, tg_length(r->skb) - ETH_HLEN) :
				  tg_dsr_wrap6(r, nat->dport, tg_length(r->skb) - ETH_HLEN);
	p->t.src = r->s->inner.addr;
	p->t.dst = r->s->outer.addr;
	p->t.protocol = IPPROTO_UDP;
	return failed ? TG_DROP_REWRITE : 0;
}

/* Whether a packet can be carried on the link it came in by; else what of it could. */
tg_inline __u32 tg_dsr_fits(struct tg_run *r)
{
	__u32 room = tg_carrier(r->s->p.family), mtu = 0;

	return bpf_check_mtu(r->skb, 0, &mtu, room, 0) > 0 && mtu > room ? mtu - room : 0;
}

/* ---- the backend's node ---------------------------------------------------------------------- */

/* Whether the packet is a node's of the cluster, to a pod here, and the carrier ours;
 * s->choice is then the backend. */
static __noinline int tg_dsr_trusted(struct tg_run *r)
{
	struct tg_scratch *s = r->s;
	struct tg_ipcache who = {};
	struct tg_geneve g;

	if (s->p.t.dport != bpf_htons(TG_GENEVE_PORT) || s->p.fragment)
		return 0;
	r->ep = tg_local(r->node, &s->p.t.dst);
	if (!r->ep || s->p.l4 + sizeof(struct udphdr) + sizeof(g) != ETH_HLEN + tg_carrier(s->p.family) ||
	    tg_load(r->skb, s->p.l4 + sizeof(struct udphdr), &g, sizeof(g)))
		return 0;
	if (g.words != TG_GENEVE_WORDS || g.flags != TG_GENEVE_CRITICAL || g.network ||
	    g.protocol != bpf_htons(s->p.family == 4 ? ETH_P_IP : ETH_P_IPV6) ||
	    g.class != bpf_htons(TG_GENEVE_CLASS) || g.type != TG_GENEVE_TYPE || g.length != 1)
		return 0;
	tg_peer_lookup(&s->p.t.src, &who);
	if ((who.identity & (TG_IPCACHE_NODE | TG_IPCACHE_OWN)) != TG_IPCACHE_NODE)
		return 0;
	s->choice.addr = s->p.t.dst;
	s->choice.port = g.port;
	s->choice.backend = 0; /* this node did not choose it */
	return 1;
}

static __noinline int tg_dsr_parse(struct tg_run *r)
{
	__builtin_memset(&r->s->p, 0, sizeof(r->s->p));
	return tg_parse(r->skb, &r->s->p);
}

/* Takes off the carrier. What is inside must be what a node may send on so: from
 * outside, to who answers for Services. An enum tg_reason. */
static __noinline int tg_dsr_open(struct tg_run *r)
{
	struct tg_ipcache asked = {};
	struct tg_packet *p = &r->s->p;
	int reason;

	if (bpf_skb_adjust_room(r->skb, -(__s32)tg_carrier(p->family), BPF_ADJ_ROOM_MAC, 0))
		return TG_DROP_REWRITE;
	reason = tg_dsr_parse(r);
	if (reason)
		return reason;
	if (p->kind != TG_KIND_FLOW || !tg_has_ports(p->t.protocol) || tg_is_icmp(p->t.protocol))
		return TG_DROP_INVALID;
	tg_peer_lookup(&p->t.dst, &asked);
	if (!tg_is_outside(&p->t.src) ||
	    !(asked.identity & (TG_IPCACHE_NODE | TG_IPCACHE_FRONTEND)))
		return TG_DROP_INVALID_SOURCE;
	return p->fragment ? tg_track_fragment(p, 0) : 0;
}

#endif
