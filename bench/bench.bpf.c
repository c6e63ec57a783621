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

char _license[] SEC("license") = "Dual BSD/GPL";
