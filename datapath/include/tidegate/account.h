/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What is counted of a flow, and told of its start and its end. */
#ifndef TIDEGATE_ACCOUNT_H
#define TIDEGATE_ACCOUNT_H

#include <tidegate/end.h>
#include <tidegate/sock.h>

tg_inline void tg_account(struct tg_ct *ct, const struct __sk_buff *skb, int reply)
{
	__u32 segments;

	if (!flow_events || dry_run)
		return;
	segments = skb->gso_segs;
	if (!segments)
		segments = 1;
	if (reply) {
		ct->reply_packets += segments;
		ct->reply_bytes += skb->len;
	} else {
		ct->packets += segments;
		ct->bytes += skb->len;
	}
}

/* How long ago that was, in a byte: microseconds with three bits behind the first one,
 * shifted: a value of 8 and more is (8 + its low three bits) << (the rest - 1). */
tg_global int tg_latency(__u64 since)
{
	__u64 took = (bpf_ktime_get_ns() - since) / 1000;
	__u32 shift = 0, step;

	if (took >> 34)
		return 0xff;
	for (step = 16; step; step >>= 1)
		if (took >> (shift + step + 3))
			shift += step;
	if (took >> 3 >> shift)
		return (shift + 1) << 3 | (took >> shift & 7);
	return took ? took : 1;
}

/* Whether the flow waits for the first byte of an answer. A flow whose first answer
 * was not timed began under other programs: its start says nothing of that. */
tg_inline int tg_awaits(const struct tg_ct *ct, __u8 protocol)
{
	return flow_events && protocol == IPPROTO_TCP && !ct->first_byte && ct->handshake;
}

/* A segment of TCP against the way the flow began: the first with a byte in it? */
tg_global int tg_first_byte(struct __sk_buff *skb, struct tg_ct *ct, __u32 l4)
{
	__u8 offset;

	if (!ct || tg_load(skb, l4 + 12, &offset, 1))
		return 0;
	if (skb->len > l4 + (offset >> 4) * 4u)
		ct->first_byte = tg_latency(ct->start);
	return 0;
}

/* The frontend that the socket asked for, where the socket was translated. */
tg_inline int tg_frontend_asked(struct tg_asked *asked)
{
	struct tg_sock_key *key = &asked->key;
	struct tg_sock *found;

	if (asked->protocol == IPPROTO_TCP)
		return tg_stream_asked(key->cookie, &asked->addr, &asked->port);
	found = bpf_map_lookup_elem(&socks_v1, key);
	if (!found)
		return 0;
	asked->addr = found->addr;
	asked->port = found->port;
	tg_barrier();
	return *(volatile __u64 *)&found->cookie == key->cookie;
}

tg_inline void tg_tell_start(struct __sk_buff *skb, struct tg_scratch *s, struct tg_flow_event *e)
{
	struct tg_asked *asked = &s->asked;

	e->src_identity = s->src_identity;
	e->dst_identity = s->dst_identity;
	e->src_rule_set = s->egress.rule_set;
	e->dst_rule_set = s->ingress.rule_set;
	if (s->flags & TG_CT_NAT) {
		e->frontend = s->nat.addr;
		e->frontend_port = s->nat.port;
	}
	/* What came over a wire has none, nor what this node's stack forwards. */
	if (!skb->sk)
		return;
	e->cookie = bpf_get_socket_cookie(skb);
	e->cgroup = bpf_skb_cgroup_id(skb);
	if (!e->cookie || (s->flags & TG_CT_NAT))
		return;
	__builtin_memset(asked, 0, sizeof(*asked));
	asked->key.cookie = e->cookie;
	asked->key.addr = asked->addr = e->dst;
	asked->key.port = asked->port = e->dport;
	asked->protocol = e->protocol;
	if (!tg_frontend_asked(asked))
		return;
	e->frontend = asked->addr;
	e->frontend_port = asked->port;
}

/* `ct`: the flow's entry; the packet is as it was looked up, `reply`: it goes
 * against the way the flow began. */
tg_global int tg_tell(struct __sk_buff *skb, const struct tg_ct *ct, __u32 kind, __u32 reply)
{
	struct tg_scratch *s = tg_work();
	const struct tg_tuple *t;
	struct tg_flow_event *e;

	if (!s || !ct)
		return 0;
	t = &s->p.t;
	e = bpf_ringbuf_reserve(&flows_v1, sizeof(*e), 0);
	if (!e) {
		tg_count(skb, TG_REASON_EVENT_LOST, s->from_pod);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = kind == TG_FLOW_START ? ct->start : bpf_ktime_get_ns();
	e->start = ct->start;
	e->packets = ct->packets;
	e->bytes = ct->bytes;
	e->reply_packets = ct->reply_packets;
	e->reply_bytes = ct->reply_bytes;
	e->src = reply ? t->dst : t->src;
	e->dst = reply ? t->src : t->dst;
	e->sport = reply ? t->dport : t->sport;
	e->dport = reply ? t->sport : t->dport;
	e->protocol = t->protocol;
	e->kind = kind;
	e->direction = !s->from_pod == !reply ? TG_INGRESS : TG_EGRESS;
	e->tcp_flags = s->p.tcp_flags;
	e->handshake = ct->handshake;
	e->first_byte = ct->first_byte;
	e->ifindex = skb->ifindex;
	e->src_identity = e->dst_identity = TG_IDENTITY_UNSAID;
	e->src_endpoint = ct->src_endpoint;
	e->dst_endpoint = ct->dst_endpoint;
	e->src_rule = ct->src_rule;
	e->dst_rule = ct->dst_rule;
	if (kind == TG_FLOW_START)
		tg_tell_start(skb, s, e);
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return 0;
}

/* A packet of a known flow, whose other fields have been read: 0 if the entry
 * has changed meanwhile. With a stack of its own: the callers have none to spare. */
tg_global int tg_settle(struct __sk_buff *skb, struct tg_ct *ct, int reply)
{
	struct tg_scratch *s = tg_work();
	int ended;

	if (!s || !ct)
		return 0;
	ended = tg_touch(ct, &s->p, reply, s->now);
	if (tg_read_word(ct) != tg_word(s->epoch, s->proof))
		return 0;
	tg_account(ct, skb, reply);
	if (reply && !dry_run && tg_awaits(ct, s->p.t.protocol))
		tg_first_byte(skb, ct, s->p.l4);
	if (flow_events && ended)
		tg_tell(skb, ct, TG_FLOW_END, reply);
	return 1;
}

#endif
