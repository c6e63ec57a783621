// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The datapath under a stopwatch: the programs of pod.bpf.c behind a prelude
 * that makes every repetition of a dry run the first packet of another flow. */
#include <tidegate/pod.h>

/* Destinations are fresh_base .. fresh_base + fresh_count - 1 (host order). */
const volatile __u32 fresh_base = 0;
const volatile __u32 fresh_count = 1;
const volatile __u16 fresh_port = 80;

/* A TCP SYN over IPv4 without options: another source port and destination,
 * and everything restored that address translation changed the last time. Its
 * checksums are wrong from here on; nothing on the way verifies them. */
tg_inline int fresh(struct __sk_buff *skb)
{
	void *end = (void *)(long)skb->data_end;
	struct iphdr *ip = (void *)(long)skb->data + ETH_HLEN;
	struct tcphdr *tcp = (void *)(ip + 1);
	__u32 r = bpf_get_prandom_u32();

	if ((void *)(tcp + 1) > end)
		return -1;
	ip->daddr = bpf_htonl(fresh_base + ((r >> 16) * fresh_count >> 16));
	tcp->source = r;
	tcp->dest = bpf_htons(fresh_port);
	return 0;
}

SEC("tc")
int empty(struct __sk_buff *skb)
{
	(void)skb;
	return TG_PASS;
}

/* What the prelude costs, to be subtracted. */
SEC("tc")
int fresh_only(struct __sk_buff *skb)
{
	return fresh(skb) ? TC_ACT_SHOT : TG_PASS;
}

SEC("tc")
int fresh_flow(struct __sk_buff *skb)
{
	return fresh(skb) ? TC_ACT_SHOT : tg_pod(skb, 1);
}

/* What a verdict is compared with: the peer's address in one trie. */
SEC("tc")
int bare_lpm(struct __sk_buff *skb)
{
	struct tg_prefix key = { .bits = 128 };
	__u32 *found;

	if (fresh(skb))
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, daddr), &key.addr.w[3], 4))
		return TC_ACT_SHOT;
	key.addr.w[2] = bpf_htonl(0xffff);
	found = bpf_map_lookup_elem(&ipcache_lpm_v1, &key);
	return found && *found == 7 ? TG_PASS : TC_ACT_SHOT;
}

/* One end's policy about the first packet of a flow, and nothing else: the
 * subject's rule set, who the peer is, and what the set says of it. */
SEC("tc")
int one_verdict(struct __sk_buff *skb)
{
	struct tg_node_key key = { .kind = TG_NODE_IFINDEX };
	const struct tg_endpoint *ep;
	struct tg_scratch *s;
	struct tg_question *q;
	struct tg_peer peer;
	__u32 zero = 0;
	void *node;

	if (fresh(skb))
		return TC_ACT_SHOT;
	s = bpf_map_lookup_elem(&scratch, &zero);
	node = bpf_map_lookup_elem(&node_v2, &zero);
	if (!s || !node)
		return TC_ACT_SHOT;
	key.addr.w[0] = skb->ifindex;
	ep = bpf_map_lookup_elem(node, &key);
	if (!ep)
		return TC_ACT_SHOT;
	q = &s->question;
	__builtin_memset(&q->addr, 0, sizeof(q->addr));
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, daddr), &q->addr.w[3], 4))
		return TC_ACT_SHOT;
	q->addr.w[2] = bpf_htonl(0xffff);
	tg_peer_lookup(&q->addr, &s->peer);
	tg_find_peer(node, &q->addr, &s->peer, &peer);
	q->identity = peer.identity;
	q->entity = tg_entity_of(&peer, 1);
	q->port = bpf_htons(fresh_port);
	q->protocol = IPPROTO_TCP;
	tg_policy_check(&ep->egress, q, &s->egress);
	return s->egress.reason ? TC_ACT_SHOT : TG_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
