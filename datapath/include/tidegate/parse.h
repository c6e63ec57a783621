/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From bytes to a tuple. Every function bounds-checks before it reads and
 * returns an enum tg_reason: 0 or why the packet must be dropped. */
#ifndef TIDEGATE_PARSE_H
#define TIDEGATE_PARSE_H

#include <stddef.h>
#include <linux/icmpv6.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <tidegate/maps.h>
#include <tidegate/packet.h>

enum tg_kind {
	TG_KIND_FLOW = 0,
	TG_KIND_ARP = 1,
	TG_KIND_ND = 2,         /* NS, NA, RS, RA or redirect; see icmp_type */
	TG_KIND_ICMP_ERROR = 3, /* the tuple is the quoted one */
};

struct tg_tuple {
	struct tg_addr src;
	struct tg_addr dst;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};

struct tg_packet {
	struct tg_tuple t;   /* of the flow; of the quoted packet in an error */
	__u32 l4;            /* offset of the transport header */
	__u8 family;         /* 4 or 6 */
	__u8 kind;           /* enum tg_kind */
	__u8 tcp_flags;      /* byte 13 of the TCP header, else 0 */
	__u8 icmp_type;
	__u8 fragment;       /* enum tg_fragment_kind */
	__u8 hop_limit;
	__u8 protocol;       /* outer; t.protocol is the quoted one in an error */
	__u8 pad;
	__u32 fragment_id;   /* as on the wire */
};

enum tg_fragment_kind {
	TG_NOT_FRAGMENT = 0,
	TG_FIRST_FRAGMENT = 1,
	TG_LATER_FRAGMENT = 2, /* has no transport header */
};

/* linux/icmp.h needs headers of a hosted C library. */
struct tg_icmp {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 id; /* echo */
	__be16 sequence;
};

#define TG_ICMP_ECHO_REPLY 0
#define TG_ICMP_REDIRECT 5
#define TG_ICMP_ECHO 8
#define TG_TCP_FIN 0x01
#define TG_TCP_SYN 0x02
#define TG_TCP_RST 0x04
#define TG_TCP_ACK 0x10
#define TG_IP_MF 0x2000
#define TG_IP_OFFSET 0x1fff

#ifndef IPPROTO_SCTP
#define IPPROTO_SCTP 132
#endif
#define TG_ICMP_ERRORS_V4 (1u << 3 | 1u << 4 | 1u << 11 | 1u << 12)

struct tg_ports {
	__be16 source;
	__be16 dest;
};

tg_inline int tg_is_icmp(__u8 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

/* First fragments leave their ports for those that follow; a later one whose
 * first was not seen is dropped. Called once the sender is known to own its
 * address: else one pod could name the ports of another's fragments. */
tg_global int tg_track_fragment(struct tg_packet *p, int dry)
{
	struct tg_frag_key key = {};
	struct tg_frag value = {};
	struct tg_frag *seen;

	if (!p)
		return TG_DROP_INVALID;
	key.src = p->t.src;
	key.dst = p->t.dst;
	key.id = p->fragment_id;
	key.protocol = p->t.protocol;
	value.sport = p->t.sport;
	value.dport = p->t.dport;
	value.proof = tg_addr_proof(&key.src) ^ tg_addr_proof(&key.dst) ^ key.id;
	if (p->fragment == TG_FIRST_FRAGMENT) {
		if (!dry)
			bpf_map_update_elem(&frags_v1, &key, &value, BPF_ANY);
		return 0;
	}
	seen = bpf_map_lookup_elem(&frags_v1, &key);
	if (!seen)
		return TG_DROP_FRAGMENT;
	key.id = value.proof;
	*(__u64 *)&value = *(volatile __u64 *)seen;
	if (value.proof != key.id)
		return TG_DROP_FRAGMENT;
	p->t.sport = value.sport;
	p->t.dport = value.dport;
	return 0;
}

tg_inline int tg_parse_ports(tg_context *skb, struct tg_packet *p)
{
	if (p->t.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = tg_at(skb, p->l4, sizeof(*tcp));

		if (!tcp)
			return TG_DROP_TRUNCATED;
		p->t.sport = tcp->source;
		p->t.dport = tcp->dest;
		p->tcp_flags = ((__u8 *)tcp)[13];
	} else if (p->t.protocol == IPPROTO_UDP || p->t.protocol == IPPROTO_SCTP) {
		struct udphdr *udp = tg_at(skb, p->l4, sizeof(*udp));

		if (!udp)
			return TG_DROP_TRUNCATED;
		p->t.sport = udp->source;
		p->t.dport = udp->dest;
	}
	return 0;
}

/* Whether it is an echo. Its ports are (identifier, 0) in a request and (0,
 * identifier) in the reply: a request the other way is a flow of its own. */
tg_inline int tg_echo(struct tg_tuple *t, __u8 type, __be16 id)
{
	int v4 = t->protocol == IPPROTO_ICMP;

	if (type == (v4 ? TG_ICMP_ECHO : ICMPV6_ECHO_REQUEST))
		t->sport = id;
	else if (type == (v4 ? TG_ICMP_ECHO_REPLY : ICMPV6_ECHO_REPLY))
		t->dport = id;
	else
		return 0;
	return 1;
}

/* What is no echo has type and code, as on the wire, for its source port, and
 * one for the other that no echo has beside it: each type is a flow of its own
 * either way, because nothing says which of them answers which. The other port
 * of type 255 code 255 is an echo's type: no flow has that for its source port,
 * so none is taken for the answer. Type 0 code 0 of ICMPv6 would have no port, as
 * an echo's reply: it has the echo's type, with TG_ICMP_ZERO. */
#define TG_ICMP_ZERO bpf_htons(1)

tg_inline void tg_icmp_ports(struct tg_tuple *t, __u8 type, __be16 type_code, __be16 id)
{
	__be16 echo = bpf_htons((t->protocol == IPPROTO_ICMP ? TG_ICMP_ECHO : ICMPV6_ECHO_REQUEST) << 8);

	if (!tg_echo(t, type, id)) {
		t->sport = type_code ? type_code : echo;
		t->dport = !type_code ? TG_ICMP_ZERO : type_code == 0xffff ? echo : 0xffff;
	}
}

/* What a policy takes for the flow's port: of ICMP its type and code. By the
 * tuple, which is all that is known whenever it is asked: the code of an echo
 * counts as 0, and an answer without identifier as a request. */
tg_inline __be16 tg_policy_port(const struct tg_tuple *t)
{
	int v4 = t->protocol == IPPROTO_ICMP;

	if (!tg_is_icmp(t->protocol))
		return t->dport;
	if (t->sport && t->dport)
		return t->dport == TG_ICMP_ZERO ? 0 : t->sport;
	if (t->dport)
		return bpf_htons((v4 ? TG_ICMP_ECHO_REPLY : ICMPV6_ECHO_REPLY) << 8);
	return bpf_htons((v4 ? TG_ICMP_ECHO : ICMPV6_ECHO_REQUEST) << 8);
}

/* ICMP as a flow or as an error. */
tg_inline int tg_parse_icmp(tg_context *skb, struct tg_packet *p)
{
	struct tg_icmp *icmp = tg_at(skb, p->l4, sizeof(*icmp));
	__u8 type;

	if (!icmp)
		return TG_DROP_TRUNCATED;
	/* A family carries its own ICMP only: nothing answers the other. */
	if ((p->t.protocol == IPPROTO_ICMP) != (p->family == 4))
		return TG_DROP_INVALID;
	type = icmp->type;
	p->icmp_type = type;
	tg_icmp_ports(&p->t, type, *(__be16 *)icmp, icmp->id);
	if (p->family == 4) {
		if (type == TG_ICMP_REDIRECT)
			p->kind = TG_KIND_ND;
		else if (type < 32 && (TG_ICMP_ERRORS_V4 & 1u << type))
			p->kind = TG_KIND_ICMP_ERROR;
		return 0;
	}
	if (type >= 133 && type <= 137)
		p->kind = TG_KIND_ND;
	else if (type >= 1 && type <= 4)
		p->kind = TG_KIND_ICMP_ERROR;
	return 0;
}

tg_inline int tg_parse_l4(tg_context *skb, struct tg_packet *p)
{
	p->protocol = p->t.protocol;
	return tg_is_icmp(p->t.protocol) ? tg_parse_icmp(skb, p) : tg_parse_ports(skb, p);
}

/* Loose and strict source routes name another destination than the header's. */
tg_global int tg_source_routed(tg_context *skb, __u32 end)
{
	__u32 at = ETH_HLEN + sizeof(struct iphdr);
	__u8 option[2];
	int i;

	for (i = 0; i < 40; i++) {
		if (at >= end)
			return 0;
		if (tg_load(skb, at, option, 1))
			return 1;
		if (option[0] == 0)
			return 0;
		if (option[0] == 1) {
			at += 1;
			continue;
		}
		if (option[0] == 131 || option[0] == 137)
			return 1;
		if (tg_load(skb, at, option, 2) || option[1] < 2)
			return 1;
		at += option[1];
	}
	return 0;
}

tg_inline int tg_parse_ipv4(tg_context *skb, struct tg_packet *p)
{
	struct iphdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));
	__u32 header;
	__u16 frag;

	if (!ip)
		return TG_DROP_TRUNCATED;
	if (ip->version != 4 || ip->ihl < 5)
		return TG_DROP_INVALID;
	p->family = 4;
	tg_addr_v4(&p->t.src, ip->saddr);
	tg_addr_v4(&p->t.dst, ip->daddr);
	p->t.protocol = ip->protocol;
	header = ip->ihl * 4;
	p->fragment_id = ip->id;
	frag = bpf_ntohs(ip->frag_off);
	p->l4 = ETH_HLEN + header;
	if (header > sizeof(*ip) && p->l4 > tg_length(skb))
		return TG_DROP_TRUNCATED;
	if (header > sizeof(*ip) && tg_source_routed(skb, p->l4))
		return TG_DROP_SOURCE_ROUTE;
	if (frag & TG_IP_OFFSET) {
		p->protocol = p->t.protocol;
		p->fragment = TG_LATER_FRAGMENT;
		/* RFC 1858: a TCP header must not continue in a second fragment. */
		return p->protocol == IPPROTO_TCP && (frag & TG_IP_OFFSET) < 3 ?
			       TG_DROP_FRAGMENT : 0;
	}
	if (frag & TG_IP_MF)
		p->fragment = TG_FIRST_FRAGMENT;
	return tg_parse_l4(skb, p);
}

struct tg_ext {
	__u8 next;
	__u8 length;
	__be16 offset; /* fragment header: offset and flags */
	__be32 id;
};

tg_inline int tg_is_ext(__u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	       next == IPPROTO_FRAGMENT || next == IPPROTO_AH;
}

/* Walks to the upper layer. A later fragment ends the walk at its header. The
 * headers must lie within the packet, as its length has it: a jumbogram, whose
 * header says 0, is none that we pass. */
tg_global int tg_walk_ipv6(tg_context *skb, struct tg_packet *p,
				   struct tg_ext *fragment)
{
	struct tg_ext ext;
	__u32 at = ETH_HLEN + sizeof(struct ipv6hdr);
	__be16 length;
	__u32 end;
	__u8 next;
	int i;

	if (!p || !fragment ||
	    tg_load(skb, ETH_HLEN + offsetof(struct ipv6hdr, payload_len), &length, 2))
		return TG_DROP_INVALID;
	end = at + bpf_ntohs(length);
	if (end > tg_length(skb))
		end = tg_length(skb);
	next = p->t.protocol;
	for (i = 0; i < TG_MAX_EXT_HEADERS; i++) {
		if (!tg_is_ext(next))
			break;
		if (at > TG_MAX_L4 - sizeof(ext) || tg_load(skb, at, &ext, sizeof(ext)))
			return TG_DROP_EXT_HEADER;
		if (next == IPPROTO_ROUTING && ((__u8 *)&ext)[3])
			return TG_DROP_SOURCE_ROUTE; /* segments left */
		if (next == IPPROTO_FRAGMENT) {
			if (fragment->next != IPPROTO_NONE)
				return TG_DROP_EXT_HEADER;
			*fragment = ext;
			fragment->length = 1;
			at += 8;
			if (bpf_ntohs(ext.offset) & 0xfff8) {
				next = ext.next;
				break;
			}
		} else if (next == IPPROTO_AH) {
			at += (ext.length + 2) * 4;
		} else {
			at += (ext.length + 1) * 8;
		}
		next = ext.next;
	}
	if (at > end || (tg_is_ext(next) && !(bpf_ntohs(fragment->offset) & 0xfff8)))
		return TG_DROP_EXT_HEADER;
	p->t.protocol = next;
	p->l4 = at;
	return 0;
}

tg_inline int tg_parse_ipv6(tg_context *skb, struct tg_packet *p)
{
	struct ipv6hdr *ip = tg_at(skb, ETH_HLEN, sizeof(*ip));
	struct tg_ext fragment = { .next = IPPROTO_NONE };
	__u16 offset;
	int reason;

	if (!ip)
		return TG_DROP_TRUNCATED;
	if (ip->version != 6)
		return TG_DROP_INVALID;
	p->family = 6;
	__builtin_memcpy(&p->t.src, &ip->saddr, sizeof(p->t.src));
	__builtin_memcpy(&p->t.dst, &ip->daddr, sizeof(p->t.dst));
	/* On the wire a mapped address is nobody's; in our tables it is IPv4's. */
	if (tg_addr_is_v4(&p->t.src) || tg_addr_is_v4(&p->t.dst))
		return TG_DROP_INVALID_SOURCE;
	p->t.protocol = ip->nexthdr;
	p->hop_limit = ip->hop_limit;
	p->l4 = ETH_HLEN + sizeof(*ip);
	if (!tg_is_ext(ip->nexthdr))
		return tg_parse_l4(skb, p);
	reason = tg_walk_ipv6(skb, p, &fragment);
	if (reason)
		return reason;
	offset = bpf_ntohs(fragment.offset);
	p->fragment_id = fragment.id;
	if (fragment.length && (offset & 0xfff8)) {
		p->protocol = p->t.protocol;
		p->fragment = TG_LATER_FRAGMENT;
		return p->protocol == IPPROTO_TCP && (offset & 0xfff8) < 24 ?
			       TG_DROP_FRAGMENT : 0;
	}
	if (fragment.length && (offset & 1))
		p->fragment = TG_FIRST_FRAGMENT;
	reason = tg_parse_l4(skb, p);
	if (!reason && fragment.length && p->kind == TG_KIND_ND)
		return TG_DROP_FRAGMENT; /* RFC 6980: ND is never fragmented */
	return reason;
}

/* The tuple that an ICMP error quotes. At least eight bytes of its transport
 * header are quoted (RFC 792), enough for the ports. */
tg_global int tg_parse_quoted(tg_context *skb, struct tg_packet *p)
{
	struct ipv6hdr ip6;
	struct iphdr ip;
	struct tg_ports ports[2];
	__u32 at;

	if (!p)
		return TG_DROP_INVALID;
	at = p->l4 + sizeof(struct tg_icmp);
	if (p->family == 4) {
		if (tg_load(skb, at, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return TG_DROP_ICMP_ERROR;
		if (bpf_ntohs(ip.frag_off) & TG_IP_OFFSET)
			return TG_DROP_ICMP_ERROR;
		tg_addr_v4(&p->t.src, ip.saddr);
		tg_addr_v4(&p->t.dst, ip.daddr);
		p->t.protocol = ip.protocol;
		at += ip.ihl * 4;
	} else {
		if (tg_load(skb, at, &ip6, sizeof(ip6)) || ip6.version != 6)
			return TG_DROP_ICMP_ERROR;
		__builtin_memcpy(&p->t.src, &ip6.saddr, sizeof(p->t.src));
		__builtin_memcpy(&p->t.dst, &ip6.daddr, sizeof(p->t.dst));
		p->t.protocol = ip6.nexthdr;
		at += sizeof(ip6);
	}
	p->t.sport = p->t.dport = 0;
	if (!tg_is_icmp(p->t.protocol) && p->t.protocol != IPPROTO_TCP &&
	    p->t.protocol != IPPROTO_UDP && p->t.protocol != IPPROTO_SCTP)
		return 0;
	if (tg_load(skb, at, ports, sizeof(ports)))
		return TG_DROP_ICMP_ERROR;
	if (tg_is_icmp(p->t.protocol)) {
		tg_icmp_ports(&p->t, *(__u8 *)ports, ports[0].source, ports[1].source);
		return 0;
	}
	p->t.sport = ports[0].source;
	p->t.dport = ports[0].dest;
	return 0;
}

tg_inline int tg_parse(tg_context *skb, struct tg_packet *p)
{
	struct ethhdr *eth;

	tg_linearise(skb);
	eth = tg_at(skb, 0, sizeof(*eth));
	if (!eth)
		return TG_DROP_TRUNCATED;
	if (tg_has_tag(skb) || eth->h_proto == bpf_htons(ETH_P_8021Q) ||
	    eth->h_proto == bpf_htons(ETH_P_8021AD))
		return TG_DROP_VLAN;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return tg_parse_ipv4(skb, p);
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		return tg_parse_ipv6(skb, p);
	if (eth->h_proto != bpf_htons(ETH_P_ARP))
		return TG_DROP_ETHERTYPE;
	p->kind = TG_KIND_ARP;
	return 0;
}

#endif
