/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Flows: judged once, followed after, judged again when the policy moves. */
#ifndef TIDEGATE_FLOW_H
#define TIDEGATE_FLOW_H

#include <tidegate/account.h>
#include <tidegate/choose.h>
#include <tidegate/l2.h>
#include <tidegate/end.h>

/* ---- verdict -------------------------------------------------------------------- */

/* Judges the flow whose tuple (as its originator sent it, after translation)
 * is `t`; `self_is_src`: this interface's pod began it. Fills verdicts, and in
 * `made` what conntrack keeps of them. Returns an enum tg_reason. */
tg_global int tg_judge(const struct tg_endpoint *ep, const struct tg_tuple *t, struct tg_ct *made,
		       int self_is_src)
{
	const struct tg_endpoint *src, *dst;
	struct tg_scratch *s = tg_work();
	struct tg_question *q;
	struct tg_peer peer;
	__u32 zero = 0;
	void *node;

	if (!s || !ep || !t || !made)
		return TG_DROP_PENDING;
	q = &s->question;
	node = bpf_map_lookup_elem(&node_v2, &zero);
	if (!node)
		return TG_DROP_NO_NODE_TABLE;
	/* Switched meanwhile: both ends' policies are those of one table. */
	if ((__u64)node != s->node)
		ep = tg_at_interface(node, ep->ifindex);
	if (!ep)
		return TG_DROP_PENDING;
	/* Of one direction only another verdict of this run may be left. */
	s->egress.audit = s->egress.log = s->ingress.audit = s->ingress.log = 0;
	made->src_rule = made->dst_rule = TG_RULE_NONE;
	if (!self_is_src || !s->asked_peer)
		tg_peer_lookup(self_is_src ? &t->dst : &t->src, &s->peer);
	tg_find_peer(node, self_is_src ? &t->dst : &t->src, &s->peer, &peer);
	src = self_is_src ? ep : peer.endpoint;
	dst = self_is_src ? peer.endpoint : ep;
	s->src_identity = self_is_src ? ep->identity : peer.identity;
	s->dst_identity = self_is_src ? peer.identity : ep->identity;
	if (s->host) {
		s->src_identity = TG_ID_HOST;
		src = NULL;
	}
	if (src) {
		made->src_endpoint = src->id;
		tg_set_forward(&made->to_src, src);
	}
	if (s->flags & TG_CT_UPLINK)
		made->to_src.ifindex = s->uplink;
	if (dst) {
		made->dst_endpoint = dst->id;
		/* Later packets show by this that they are sent by who has the address. */
		if (tg_owns(dst, &t->dst))
			tg_set_forward(&made->to_dst, dst);
	}
	/* What a node makes itself may reach its pods: kubelet probes. */
	if (s->host) {
		s->ingress.rule = made->dst_rule = TG_RULE_HOST;
		return 0;
	}
	/* By id: the table holds an endpoint once for each of its keys. */
	if ((peer.endpoint && peer.endpoint->id == ep->id) || (s->flags & TG_CT_HAIRPIN)) {
		/* What a pod sends itself does not come from outside. */
		if (!s->from_pod)
			return TG_DROP_INVALID_SOURCE;
		s->egress.rule = made->src_rule = TG_RULE_SELF;
		s->ingress.rule = made->dst_rule = TG_RULE_SELF;
		if (s->flags & TG_CT_HAIRPIN)
			tg_set_forward(&made->to_dst, ep);
		return 0;
	}
	q->port = tg_policy_port(t);
	q->protocol = t->protocol;
	if (src) {
		q->addr = t->dst;
		q->identity = s->dst_identity;
		q->entity = self_is_src ? tg_entity_of(&peer, 1) : 0;
		tg_policy_check(&src->egress, q, &s->egress);
		if (s->egress.reason)
			return s->egress.reason;
		made->src_rule = s->egress.rule;
	}
	if (dst) {
		q->addr = t->src;
		q->identity = s->src_identity;
		q->entity = self_is_src ? 0 : tg_entity_of(&peer, 0);
		tg_policy_check(&dst->ingress, q, &s->ingress);
		if (s->ingress.reason)
			return s->ingress.reason;
		made->dst_rule = s->ingress.rule;
	}
	return 0;
}

/* After a verdict that lets the flow pass, and from where there is more of the stack left. */
tg_inline void tg_report_verdict(struct __sk_buff *skb, const struct tg_scratch *s)
{
	if (!dry_run && (s->egress.audit | s->egress.log | s->ingress.audit | s->ingress.log))
		tg_report(skb);
}

/* ---- half-open flows --------------------------------------------------------------- */

/* The part of an endpoint's share that this flow may lie in. */
tg_inline struct tg_half_open_set *tg_share_set(const struct tg_run *r,
						const struct tg_endpoint *ep)
{
	__u32 slot = ep->half_open, at = r->s->set;
	void *share = bpf_map_lookup_elem(&half_open_v2, &slot);

	return share ? bpf_map_lookup_elem(share, &at) : NULL;
}

tg_inline struct tg_ct *tg_lookup_set(struct tg_run *r, struct tg_half_open_set *set)
{
	int at = tg_find_way(set, &r->s->key, r->s->proof);
	struct tg_ct *ct;

	if (at < 0)
		return NULL;
	ct = &tg_way(set, at)->ct;
	return tg_ct_alive(ct, r->s->proof, r->s->p.t.protocol, r->s->now) ? ct : NULL;
}

/* Whether the way that is taken for `ct` is this very flow's, which goes on: a
 * SYN that is sent again. What was counted so far is counted on. */
tg_inline int tg_is_same(const struct tg_run *r, struct tg_ct *ct, const struct tg_half_open *way,
			 int at)
{
	const struct tg_ct *held = &way->ct;

	if (at < TG_HALF_OPEN_WAYS || tg_closed(held->flags) || !held->start ||
	    tg_expired(held, r->s->p.t.protocol, r->s->now))
		return 0;
	ct->start = held->start;
	ct->packets += held->packets;
	ct->bytes += held->bytes;
	ct->reply_packets = held->reply_packets;
	ct->reply_bytes = held->reply_bytes;
	return 1;
}

/* A flow that cannot be tracked is not let through: its replies would not be
 * known, and its end never be seen. */
tg_inline int tg_save(struct tg_run *r, struct tg_ct *ct)
{
	struct tg_half_open_set *set;
	struct tg_half_open *way;
	int at, again = 0;

	ct->seen = r->s->now;
	ct->flags = r->s->flags | (r->s->src_is_a ? TG_CT_BEGAN_A : 0);
	ct->backend = r->s->backend;
	ct->nat_addr = r->s->nat.addr;
	ct->nat_port = r->s->nat.port;
	ct->word = TG_CT_BUSY;
	if (dry_run)
		return 0;
	if (flow_events)
		ct->start = bpf_ktime_get_ns();
	tg_account(ct, r->skb, 0);
	set = tg_share_set(r, r->ep);
	if (!set)
		return TG_DROP_CT_INSERT;
	at = tg_claim_way(set, &r->s->key, r->s->proof, r->s->now);
	if (at < 0)
		return TG_DROP_CT_INSERT;
	way = tg_way(set, at);
	if (flow_events)
		again = tg_is_same(r, ct, way, at);
	way->key = r->s->key;
	way->ct = *ct;
	tg_write_word(&way->ct, tg_word(r->s->epoch, r->s->proof));
	if (flow_events && !again)
		tg_tell(r->skb, ct, TG_FLOW_START, 0);
	return 0;
}

/* The client's side of a translated flow; `ct` is its entry, or a copy. Returns
 * whether the client is end a of `client_key`. */
tg_inline int tg_client_key(struct tg_scratch *s, const struct tg_ct *ct, int reply)
{
	const struct tg_tuple *t = &s->p.t;
	struct tg_tuple *client = &s->client;

	/* A pod that reaches itself is the client, not the address it was given. */
	if (ct->flags & TG_CT_HAIRPIN)
		client->src = reply ? t->src : t->dst;
	else
		client->src = reply ? t->dst : t->src;
	client->sport = reply ? t->dport : t->sport;
	client->dst = ct->nat_addr;
	client->dport = ct->nat_port;
	client->protocol = t->protocol;
	return tg_ct_key(client, &s->client_key);
}

/* s->made, a translated flow's entry, becomes what is known under s->client_key: that a client
 * has asked, and which backend it has. */
tg_inline void tg_make_client(struct tg_scratch *s, int reply)
{
	__u32 began_a = tg_client_key(s, &s->made, reply) ? TG_CT_BEGAN_A : 0;

	s->made.nat_addr = reply ? s->p.t.src : s->p.t.dst;
	s->made.nat_port = reply ? s->p.t.sport : s->p.t.dport;
	s->made.flags = TG_CT_SERVICE | began_a | (s->made.flags & TG_CT_HAIRPIN);
	s->made.word = tg_word(s->epoch, tg_proof(tg_flow_hash(&s->client)));
}

/* Out of the share, into the table. Of a translated flow the client's side is
 * recorded too, so that what it sends next finds its backend. */
tg_global int tg_establish(struct tg_ct *ct, int reply)
{
	struct tg_scratch *s = tg_work();
	__u64 word;

	if (dry_run || !s || !ct)
		return 0;
	word = tg_word(s->epoch, s->proof);
	s->made = *ct;
	tg_barrier();
	if (s->made.word != word || tg_read_word(ct) != word)
		return 0;
	s->made.flags |= TG_CT_REPLIED;
	if (bpf_map_update_elem(&ct_v2, &s->key, &s->made, BPF_ANY))
		return 0;
	tg_swap_word(ct, word, TG_CT_FREE);
	if (!(s->made.flags & TG_CT_NAT))
		return 0;
	tg_make_client(s, reply);
	s->made.flags |= TG_CT_REPLIED;
	bpf_map_update_elem(&ct_v2, &s->client_key, &s->made, BPF_ANY);
	return 0;
}

/* ---- tracked flows ------------------------------------------------------------------- */

enum tg_way {
	TG_WAY_REPLY = 1, /* against the way the flow began */
	TG_WAY_OUT = 2,   /* out of the pod at this interface */
};

/* The policy has moved since this flow was judged: judge it again, in the
 * direction it began, whichever way this packet goes. A flow that is no longer
 * allowed keeps its entry, with the old epoch: without it the other end's next
 * packet would pass for the first of a flow of its own, and open the way back.
 * `word`: as read; where another run was faster the caller finds it changed.
 * `way`: of the packet that belongs to the flow, enum tg_way. */
tg_inline int tg_rejudge(struct __sk_buff *skb, const struct tg_endpoint *ep, struct tg_ct *ct,
			 __u64 word, int way)
{
	struct tg_scratch *s = tg_work();
	int reply = way & TG_WAY_REPLY;
	struct tg_tuple *t;
	int reason;

	if (!s || !ct)
		return TG_DROP_PENDING;
	t = &s->turned;
	*t = s->p.t;
	__builtin_memset(&s->made, 0, sizeof(s->made));
	if (reply) {
		t->src = s->p.t.dst;
		t->dst = s->p.t.src;
		t->sport = s->p.t.dport;
		t->dport = s->p.t.sport;
	}
	s->host = ct->dst_rule == (__u32)TG_RULE_HOST;
	s->flags = ct->flags & (TG_CT_NAT | TG_CT_HAIRPIN | TG_CT_UPLINK);
	s->uplink = ct->to_src.ifindex;
	reason = tg_judge(ep, t, &s->made, !(way & TG_WAY_OUT) == !!reply);
	if (reason) {
		if (!dry_run && ct->seen != s->now)
			ct->seen = s->now;
		return reason;
	}
	tg_report_verdict(skb, s);
	if (dry_run || word == TG_CT_BUSY || !tg_swap_word(ct, word, TG_CT_BUSY))
		return 0;
	ct->src_endpoint = s->made.src_endpoint;
	ct->dst_endpoint = s->made.dst_endpoint;
	ct->src_rule = s->made.src_rule;
	ct->dst_rule = s->made.dst_rule;
	ct->to_dst = s->made.to_dst;
	ct->to_src = s->made.to_src;
	tg_write_word(ct, tg_word(s->epoch, s->proof));
	return 0;
}

enum tg_follow {
	TG_FOLLOWED = 0,  /* r->s->forward and the packet are set */
	TG_LOST = -1,     /* the entry changed under us: treat as a miss */
};

/* A packet of a known flow. Above zero: an enum tg_reason. */
tg_global int tg_follow_ct(struct __sk_buff *skb, const struct tg_endpoint *ep, struct tg_ct *ct)
{
	struct tg_target to = { .side = TG_SIDE_SRC };
	struct tg_scratch *s = tg_work();
	int reply, reason;
	__u32 flags;
	__u64 word;

	if (!s || !ct)
		return TG_LOST;
	word = tg_read_word(ct);
	flags = ct->flags;
	reply = !!(flags & TG_CT_BEGAN_A) != !!s->src_is_a;
	if (word != tg_word(s->epoch, s->proof)) {
		if ((word ^ s->proof) & TG_PROOF_MASK)
			return TG_LOST;
		reason = tg_rejudge(skb, ep, ct, word,
				    (reply ? TG_WAY_REPLY : 0) | (s->from_pod ? TG_WAY_OUT : 0));
		if (reason)
			return reason;
	}
	s->forward = reply ? ct->to_src : ct->to_dst;
	s->how = reply ? TG_HOW_REPLY : TG_HOW_ESTABLISHED;
	to.addr = ct->nat_addr;
	to.port = ct->nat_port;
	if (!dry_run && !tg_settle(skb, ct, reply))
		return TG_LOST;
	if (!reply || !(flags & TG_CT_NAT))
		return TG_FOLLOWED;
	if (flags & TG_CT_HAIRPIN) {
		struct tg_target back = { .addr = s->p.t.src, .port = s->p.t.dport,
					  .side = TG_SIDE_DST };

		if (!ep)
			return TG_DROP_PENDING;
		tg_set_forward(&s->forward, ep);
		reason = tg_rewrite(skb, &s->p, &back);
		if (reason)
			return reason;
	}
	return tg_rewrite(skb, &s->p, &to);
}

tg_inline int tg_follow(struct tg_run *r, struct tg_ct *ct)
{
	return tg_follow_ct(r->skb, r->ep, ct);
}

/* Whether this packet shows that both ends talk: from then on the flow has a
 * place in the table. A flood of SYNs and the answers to it never get there. */
tg_inline int tg_proves(const struct tg_packet *p, __u32 flags)
{
	return (flags & TG_CT_REPLIED) && !(p->tcp_flags & (TG_TCP_SYN | TG_TCP_RST));
}

/* The first answer. What an earlier connection left under the client's key
 * names that one's backend: its SYN did not look there. What is noted
 * of this one lives as long as a flow that opens. */
tg_global int tg_replied(struct tg_ct *ct)
{
	struct tg_scratch *s = tg_work();

	if (dry_run || !s || !ct || (__sync_fetch_and_or(&ct->flags, TG_CT_REPLIED) & TG_CT_REPLIED))
		return 0;
	if (flow_events && ct->start)
		ct->handshake = tg_latency(ct->start);
	if (!(ct->flags & TG_CT_NAT))
		return 0;
	s->made = *ct;
	tg_barrier();
	if ((tg_read_word(ct) ^ s->proof) & TG_PROOF_MASK)
		return 0;
	tg_make_client(s, 1);
	if (bpf_map_lookup_elem(&ct_v2, &s->client_key))
		bpf_map_delete_elem(&ct_v2, &s->client_key);
	bpf_map_update_elem(&answered_v1, &s->client_key, &s->made, BPF_ANY);
	return 0;
}

tg_inline int tg_follow_set(struct tg_run *r, struct tg_half_open_set *set)
{
	struct tg_ct *ct = tg_lookup_set(r, set);
	int reply;

	if (!ct)
		return TG_LOST;
	reply = tg_is_reply(r, ct->flags);
	if (tg_proves(&r->s->p, ct->flags)) {
		struct tg_ct *moved;

		tg_establish(ct, reply);
		moved = tg_lookup(r);
		if (moved)
			return tg_follow(r, moved);
	}
	if (reply && !(ct->flags & TG_CT_REPLIED))
		tg_replied(ct);
	return tg_follow(r, ct);
}

/* Looks for a flow that is not established: in this pod's share, then in that
 * of the peer, if it lives here. */
static __noinline int tg_follow_half_open(struct tg_run *r)
{
	const struct tg_endpoint *ep = r->ep;
	struct tg_half_open_set *set;
	int found;

	if (!ep)
		return TG_LOST;
	set = tg_share_set(r, ep);
	found = set ? tg_follow_set(r, set) : TG_LOST;
	if (found != TG_LOST)
		return found;
	ep = tg_local(r->node, r->from_pod ? &r->s->p.t.dst : &r->s->p.t.src);
	set = ep ? tg_share_set(r, ep) : NULL;
	return set ? tg_follow_set(r, set) : TG_LOST;
}

/* ---- services per packet ---------------------------------------------------------------- */

/* Word by word: a copy that is not volatile is folded to the zeros compiled in. */
tg_inline void tg_hairpin(__u8 family, struct tg_addr *addr)
{
	int i;

	for (i = 0; i < 4; i++)
		addr->w[i] = family == 4 ? hairpin_ip4.w[i] : hairpin_ip6.w[i];
}

/* Sends the packet to its backend: `choice`. */
static __noinline int tg_translate(struct tg_run *r, const struct tg_choice *choice)
{
	struct tg_target to = { .addr = choice->addr, .port = choice->port, .side = TG_SIDE_DST };
	struct tg_target from = { .side = TG_SIDE_SRC };
	int reason;

	r->s->asked_peer = 0;
	r->s->nat.addr = r->s->p.t.dst;
	r->s->nat.port = r->s->p.t.dport;
	r->s->backend = choice->backend;
	r->s->flags = TG_CT_NAT;
	if (tg_addr_equal(&choice->addr, &r->s->p.t.src)) {
		r->s->flags |= TG_CT_HAIRPIN;
		tg_hairpin(r->s->p.family, &from.addr);
		from.port = r->s->p.t.sport;
		reason = tg_rewrite(r->skb, &r->s->p, &from);
		if (reason)
			return reason;
	}
	return tg_rewrite(r->skb, &r->s->p, &to);
}

/* The backend that this client's flow has, by its entry; UDP leaves one that
 * is gone, TCP stays until it ends. */
tg_inline int tg_chosen(struct tg_run *r, struct tg_ct *ct, struct tg_choice *choice)
{
	struct tg_choice now = {};

	choice->addr = ct->nat_addr;
	choice->port = ct->nat_port;
	choice->backend = ct->backend;
	if (!dry_run)
		tg_touch(ct, &r->s->p, 0, r->s->now);
	if ((tg_read_word(ct) ^ r->s->proof) & TG_PROOF_MASK)
		return TG_SERVICE_NONE;
	if (r->s->p.t.protocol == IPPROTO_TCP)
		return TG_SERVICE_FOUND;
	if (tg_backend(choice->backend, r->s->p.t.protocol, &now) != TG_SERVICE_FOUND ||
	    !tg_addr_equal(&now.addr, &choice->addr) || now.port != choice->port)
		return TG_SERVICE_NONE;
	return TG_SERVICE_FOUND;
}

/* ---- connected sockets for datagrams ------------------------------------------------------- */

/* Whom the frontend's datagrams of this socket go to now: who took the place of the
 * backend that it is connected to, for as long as that one lives, else another. */
tg_inline int tg_successor(struct tg_scratch *s)
{
	struct tg_sock_key *key = &s->asked.key;
	struct tg_sock *held, next = {};
	__u32 hash = tg_mix(tg_addr_proof(&s->p.t.src) * 31 + s->p.t.sport);
	int answer;

	key->addr = s->counted.addr;
	key->port = s->counted.port;
	held = bpf_map_lookup_elem(&socks_v1, key);
	if (held) {
		next = *held;
		tg_barrier();
		if (*(volatile __u64 *)&held->cookie == key->cookie && next.cookie == key->cookie &&
		    tg_backend(next.backend, IPPROTO_UDP, &s->choice) == TG_SERVICE_FOUND &&
		    tg_addr_equal(&s->choice.addr, &next.addr) && s->choice.port == next.port)
			return TG_SERVICE_FOUND;
	}
	answer = tg_service(&s->counted, hash, &s->choice);
	if (answer == TG_SERVICE_SPECIAL) {
		s->asks.addr = s->p.t.src;
		s->asks.hash = hash;
		s->asks.outside = 0;
		answer = tg_special(&s->counted, &s->asks, &s->choice, 0);
	}
	if (answer != TG_SERVICE_FOUND)
		return answer;
	next.cookie = key->cookie;
	next.addr = s->choice.addr;
	next.port = s->choice.port;
	next.backend = s->choice.backend;
	bpf_map_update_elem(&socks_v1, key, &next, BPF_ANY);
	return answer;
}

/* A socket that was connected to a frontend is connected to a backend, and no hook
 * sees what it sends: when that backend is gone its datagrams are translated to
 * another here, as if it were the frontend they asked for. s->choice is that one;
 * returns, and leaves in s->steered, an enum tg_service_answer. */
tg_global int tg_steer(struct __sk_buff *skb)
{
	struct tg_scratch *s = tg_work();
	struct tg_sock_key *key;
	struct tg_sock *held;
	__u32 id;

	if (dry_run || !s)
		return 0;
	key = &s->asked.key;
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = bpf_get_socket_cookie(skb);
	key->addr = s->p.t.dst;
	key->port = s->p.t.dport;
	held = key->cookie ? bpf_map_lookup_elem(&socks_v1, key) : NULL;
	if (!held)
		return 0;
	id = held->backend;
	s->counted.addr = held->addr;
	s->counted.port = held->port;
	s->counted.protocol = IPPROTO_UDP;
	s->counted.pad = 0;
	tg_barrier();
	if (!id || *(volatile __u64 *)&held->cookie != key->cookie)
		return 0;
	if (tg_backend(id, IPPROTO_UDP, &s->choice) == TG_SERVICE_FOUND &&
	    tg_addr_equal(&s->choice.addr, &key->addr) && s->choice.port == key->port)
		return 0;
	s->steered = tg_successor(s);
	return s->steered;
}

/* ---- the slow path ------------------------------------------------------------------------ */

static __noinline int tg_new_flow(struct tg_run *r)
{
	struct tg_scratch *s = r->s;
	int reason;

	__builtin_memset(&s->made, 0, sizeof(s->made));
	reason = tg_judge(r->ep, &s->p.t, &s->made, r->from_pod);
	if (reason)
		return reason;
	r->s->forward = s->made.to_dst;
	r->s->how = TG_HOW_NEW;
	tg_report_verdict(r->skb, s);
	return tg_save(r, &s->made);
}

/* Follows the flow if it is known under the tuple as it now is. An opening SYN
 * is judged, whatever is known; so a flow in a share is newer than `ct` of the
 * table if that is closed or a service's, and takes its place. */
tg_inline int tg_follow_known(struct tg_run *r, struct tg_ct *ct)
{
	int found, usable = ct && !(ct->flags & TG_CT_SERVICE);
	__u64 word = ct ? tg_read_word(ct) : TG_CT_BUSY;

	if (dry_run == 1 || tg_is_syn(&r->s->p))
		return TG_LOST;
	if (usable && !tg_closed(ct->flags)) {
		found = tg_follow(r, ct);
		if (found != TG_LOST)
			return found;
		usable = 0;
	}
	found = tg_follow_half_open(r);
	if (found == TG_LOST)
		return usable ? tg_follow(r, ct) : TG_LOST;
	if (ct && !dry_run)
		tg_swap_word(ct, word, TG_CT_FREE);
	return found;
}

/* A backend for what a pod sends. Most of it is for a pod, and no Service's: that is
 * said by the address's entry, which the verdict asks for next. */
tg_inline int tg_choose_for_pod(struct tg_run *r, struct tg_choice *choice)
{
	int own = tg_peer_lookup(&r->s->p.t.dst, &r->s->peer);

	r->s->asked_peer = 1;
	return own && !(r->s->peer.identity & TG_IPCACHE_FRONTEND) ? TG_SERVICE_NONE :
								      tg_choose(r, choice);
}

/* Whatever is not an established flow's packet: a service's, a young flow's, a
 * new one's. */
static __noinline int tg_slow(struct tg_run *r, struct tg_ct *ct)
{
	struct tg_choice *choice = &r->s->choice;
	int answer = r->from_pod ? (int)r->s->steered : TG_SERVICE_NONE, found;

	if (answer == TG_SERVICE_NONE && ct && (ct->flags & TG_CT_SERVICE) && r->from_pod &&
	    !tg_is_reply(r, ct->flags))
		answer = tg_chosen(r, ct, choice);
	if (answer == TG_SERVICE_NONE) {
		found = tg_follow_known(r, ct);
		if (found != TG_LOST)
			return found;
		if (r->from_pod)
			answer = tg_choose_for_pod(r, choice);
	}
	if (answer == TG_SERVICE_EMPTY || answer == TG_SERVICE_SILENT) {
		r->s->refused = answer == TG_SERVICE_EMPTY;
		if (!r->s->steered)
			tg_count_asked(r, &r->s->p.t.dst, r->s->p.t.dport, 1);
		return TG_DROP_NO_BACKEND;
	}
	if (answer == TG_SERVICE_FOUND) {
		found = tg_translate(r, choice);
		if (found)
			return found;
		tg_key(r);
		found = tg_is_syn(&r->s->p) ? TG_LOST : tg_follow_known(r, tg_lookup(r));
		if (found != TG_LOST)
			return found;
	}
	found = tg_new_flow(r);
	if (!found && answer == TG_SERVICE_FOUND && !r->s->steered)
		tg_count_asked(r, &r->s->nat.addr, r->s->nat.port, 0);
	return found;
}

/* 0 and r->s->forward, or an enum tg_reason. */
tg_inline int tg_flow(struct tg_run *r)
{
	struct tg_ct *ct;
	int found;

	tg_key(r);
	if (dry_run == 1 || tg_is_syn(&r->s->p) ||
	    (r->from_pod && r->s->p.t.protocol == IPPROTO_UDP && tg_steer(r->skb)))
		return tg_slow(r, NULL);
	ct = tg_lookup(r);
	if (ct && !(ct->flags & TG_CT_SERVICE) && !tg_closed(ct->flags)) {
		found = tg_follow(r, ct);
		if (found != TG_LOST)
			return found;
		ct = NULL;
	}
	return tg_slow(r, ct);
}

#endif
