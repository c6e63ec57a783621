/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The way of a packet at a node's uplink: Services for clients outside the node.
 *
 * `from_net` sees what comes in. A backend that is a pod of this node gets the
 * packet with the client's address, judged and tracked as at the pod's own
 * interface (`flow.h`), and its answers are translated there. What is for
 * another node goes on with this node's address (`snat.h`). What is for no
 * Service passes as it came, whatever it is.
 *
 * What goes out there: `masquerade.h`.
 */
#ifndef TIDEGATE_UPLINK_H
#define TIDEGATE_UPLINK_H

#include <tidegate/dsr.h>
#include <tidegate/error.h>
#include <tidegate/leave.h>
#include <tidegate/refuse.h>
#include <tidegate/snat.h>

#define TG_PACKET_HOST 0 /* linux/if_packet.h */
#define TG_NOT_OURS (-2) /* of no Service: none of TC_ACT_* */

/* A reason that `tg_route` gives, or its verdict. */
tg_inline int tg_send(struct tg_run *r)
{
	int verdict = tg_route(r->skb, &r->s->p);

	if (verdict & TG_LEAVE_DROP)
		return tg_drop(r, verdict & (TG_LEAVE_DROP - 1));
	tg_count(r->skb, TG_FORWARDED, 0);
	if (tg_tracing())
		tg_trace(r->skb, TG_TO_NETWORK, TG_HOW_UNSAID);
	return verdict;
}

/* ---- backends on this node -------------------------------------------------------- */

static __noinline int tg_net_deliver(struct tg_run *r)
{
	const struct tg_forward *forward = &r->s->forward;
	struct ethhdr *eth;

	tg_count(r->skb, TG_FORWARDED, 0);
	if (tg_tracing())
		tg_trace(r->skb, TG_TO_ENDPOINT, r->s->how);
	eth = tg_at(r->skb, 0, sizeof(*eth));
	if (!eth || !forward->ifindex || tg_no_mac(forward->pod_mac))
		return TG_PASS;
	__builtin_memcpy(eth->h_dest, forward->pod_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, forward->host_mac, ETH_ALEN);
	return bpf_redirect_peer(forward->ifindex, 0);
}

static __noinline int tg_net_local(struct tg_run *r, const struct tg_choice *choice)
{
	int reason;

	if (!choice)
		return TG_PASS;
	/* What pods here send does not come from outside. */
	if (tg_local(r->node, &r->s->p.t.src))
		return tg_drop(r, TG_DROP_INVALID_SOURCE);
	reason = tg_translate(r, choice);
	if (reason)
		return tg_drop(r, reason);
	r->s->flags |= TG_CT_UPLINK;
	tg_key(r);
	reason = tg_is_syn(&r->s->p) ? TG_LOST : tg_follow_known(r, tg_lookup(r));
	if (reason == TG_LOST) {
		reason = tg_new_flow(r);
		if (!reason)
			tg_count_asked(r, &r->s->nat.addr, r->s->nat.port, 0);
	}
	return reason ? tg_drop(r, reason) : tg_net_deliver(r);
}

/* What another node was asked for, of a pod here. */
static __noinline int tg_net_carried(struct tg_run *r)
{
	int reason = tg_dsr_open(r);

	return reason ? tg_drop(r, reason) : tg_net_local(r, &r->s->choice);
}

/* ---- backends elsewhere ------------------------------------------------------------- */

/* By direct server return. Who sent what is too large to be carried is told so. */
static __noinline int tg_net_carry(struct tg_run *r, const struct tg_nat *nat)
{
	__u32 mtu = tg_dsr_fits(r);
	int reason;

	if (mtu) {
		tg_drop(r, TG_DROP_NO_ROUTE);
		return tg_refuse(r->skb, &r->s->p, mtu) ? TC_ACT_SHOT :
							  (int)bpf_redirect(r->skb->ifindex, 0);
	}
	reason = tg_dsr_wrap(r, nat);
	return reason ? tg_drop(r, reason) : tg_send(r);
}

/* s->nat_found is what becomes of this packet, and its flow lives. */
static __noinline int tg_net_onward(struct tg_run *r, const struct tg_nat *nat)
{
	int reason, stays;

	if (!nat)
		return TG_PASS;
	if (dsr && (nat->flags & (TG_NAT_DSR | TG_NAT_REPLY)) == TG_NAT_DSR && tg_dsr_tells(&r->s->p))
		return tg_net_carry(r, nat);
	stays = nat->flags & (TG_NAT_HOST | TG_NAT_MASQUERADE);
	reason = tg_nat_apply(r, nat);
	if (reason)
		return tg_drop(r, reason);
	if (!stays)
		return tg_send(r);
	if (nat->flags & TG_NAT_MASQUERADE) {
		tg_count(r->skb, TG_REASON_MASQUERADED, r->from_pod);
		return TG_PASS;
	}
	tg_count(r->skb, TG_FORWARDED, 0);
	return TG_PASS;
}

static __noinline int tg_net_remote(struct tg_run *r, const struct tg_choice *choice)
{
	__u32 host = 0;
	int reason;

	if (!choice)
		return TG_PASS;
	if (tg_is_node(&choice->addr))
		host = TG_NAT_HOST;
	else if (dsr && tg_is_outside(&r->s->p.t.src))
		host = TG_NAT_DSR;
	reason = tg_nat_make(host);
	if (reason)
		return tg_drop(r, reason);
	tg_count_asked(r, &r->s->p.t.dst, r->s->p.t.dport, 0);
	return tg_net_onward(r, &r->s->nat_made);
}

/* A packet of a flow that has entries here already; TG_NOT_OURS: it has none.
 * `answers`: only those that come back count. What goes to a frontend is asked
 * about only while there is that frontend, or a flow would outlive it. */
static __noinline int tg_net_known(struct tg_run *r, int answers)
{
	struct tg_scratch *s = r->s;
	struct tg_nat *nat;

	tg_nat_key(&s->nat_key, &s->p.t);
	nat = tg_nat_find(&s->nat_key, &s->nat_found);
	if (!nat)
		return TG_NOT_OURS;
	if (answers && !(s->nat_found.flags & TG_NAT_REPLY))
		return TG_NOT_OURS;
	if (tg_nat_left(r)) {
		tg_nat_remove(s, nat, &s->nat_key, &s->nat_found);
		return TG_NOT_OURS;
	}
	tg_nat_touch(r, nat, &s->nat_found);
	return tg_net_onward(r, &s->nat_found);
}

/* ---- services ------------------------------------------------------------------------ */

/* A pod's flow that was established through this uplink. */
tg_inline int tg_net_established(struct tg_run *r, struct tg_choice *choice)
{
	struct tg_ct *ct;

	tg_key(r);
	if (tg_is_syn(&r->s->p))
		return TG_SERVICE_NONE;
	ct = tg_lookup(r);
	if (!ct || !(ct->flags & TG_CT_SERVICE) || tg_is_reply(r, ct->flags))
		return TG_SERVICE_NONE;
	return tg_chosen(r, ct, choice);
}

static __noinline int tg_net_service(struct tg_run *r)
{
	struct tg_choice *choice = &r->s->choice;
	struct tg_frontend_key key = { .addr = r->s->p.t.dst, .port = r->s->p.t.dport,
				       .protocol = r->s->p.t.protocol };
	int answer;

	/* Asked for first: most packets are for no frontend. */
	if (tg_service(&key, 0, choice) != TG_SERVICE_SPECIAL ||
	    !(choice->base >> TG_FRONTEND_FLAGS & TG_FRONTEND_OUTSIDE))
		return TG_NOT_OURS;
	/* Asked of every packet: a range that is narrowed cuts the flows it leaves out. */
	if (choice->base >> TG_FRONTEND_FLAGS & TG_FRONTEND_RANGES &&
	    !tg_may_ask(choice->base, &r->s->p.t.src))
		return tg_drop(r, TG_DROP_SOURCE_RANGE);
	answer = tg_net_known(r, 0);
	if (answer != TG_NOT_OURS)
		return answer;
	answer = tg_net_established(r, choice);
	if (answer == TG_SERVICE_NONE)
		answer = tg_choose(r, choice);
	if (answer == TG_SERVICE_NONE)
		return TG_NOT_OURS;
	if (answer == TG_SERVICE_RANGE)
		return tg_drop(r, TG_DROP_SOURCE_RANGE);
	if (answer != TG_SERVICE_FOUND) {
		tg_count_asked(r, &r->s->p.t.dst, r->s->p.t.dport, 1);
		tg_drop(r, TG_DROP_NO_BACKEND);
		return answer == TG_SERVICE_EMPTY && !tg_refuse(r->skb, &r->s->p, 0) ?
			       (int)bpf_redirect(r->skb->ifindex, 0) : TC_ACT_SHOT;
	}
	r->ep = tg_local(r->node, &choice->addr);
	return r->ep ? tg_net_local(r, choice) : tg_net_remote(r, choice);
}

/* An answer to what this node sent on with an address of its own. */
tg_inline int tg_net_answer(struct tg_run *r)
{
	__u16 port = bpf_ntohs(r->s->p.t.dport);
	int done;

	if ((port < snat_first || port > snat_last) && r->s->p.t.protocol != IPPROTO_SCTP)
		return TG_NOT_OURS;
	done = tg_net_known(r, 1);
	if (done == TG_NOT_OURS && (r->s->p.tcp_flags & TG_TCP_ACK) &&
	    tg_is_node(&r->s->p.t.dst) && !(r->s->p.tcp_flags & TG_TCP_SYN))
		tg_count(r->skb, TG_REASON_NAT_LOST, 0);
	return done;
}

/* ---- ICMP errors ------------------------------------------------------------------------- */

/* About a packet that had been translated here: p.t is what it quotes, `src` and
 * `dst` are the error's own addresses. */
static __noinline int tg_net_error_nat(struct tg_run *r, const struct tg_addr *src,
				       const struct tg_addr *dst)
{
	struct tg_target *inner = &r->s->inner, *outer = &r->s->outer;
	struct tg_nat *nat = &r->s->nat_found;
	int reason, from_end;

	if (!src || !dst)
		return TG_NOT_OURS;
	/* The key of the packets that go the other way. */
	r->s->turned.src = r->s->p.t.dst;
	r->s->turned.dst = r->s->p.t.src;
	r->s->turned.sport = r->s->p.t.dport;
	r->s->turned.dport = r->s->p.t.sport;
	r->s->turned.protocol = r->s->p.t.protocol;
	tg_nat_key(&r->s->nat_key, &r->s->turned);
	if (!tg_nat_find(&r->s->nat_key, nat))
		return TG_NOT_OURS;
	from_end = tg_addr_equal(src, &r->s->p.t.dst);
	inner->addr = outer->addr = nat->dst;
	inner->port = nat->dport;
	inner->side = TG_SIDE_SRC;
	outer->side = TG_SIDE_DST;
	reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
	if (!reason)
		reason = tg_rewrite_outer(r, dst, outer);
	inner->addr = outer->addr = nat->src;
	inner->port = nat->sport;
	inner->side = TG_SIDE_DST;
	outer->side = TG_SIDE_SRC;
	if (!reason)
		reason = tg_rewrite_quoted(r->skb, &r->s->p, inner);
	if (!reason && from_end)
		reason = tg_rewrite_outer(r, src, outer);
	if (reason)
		return tg_drop(r, reason);
	tg_count(r->skb, TG_FORWARDED, 0);
	return 0;
}

static __noinline int tg_net_error(struct tg_run *r, int egress)
{
	struct tg_addr src = r->s->p.t.src, dst = r->s->p.t.dst;
	struct tg_ct *ct;
	int done;

	if (tg_parse_quoted(r->skb, &r->s->p) || !tg_addr_equal(&dst, &r->s->p.t.src))
		return TG_PASS;
	done = tg_net_error_nat(r, &src, &dst);
	if (done == TC_ACT_SHOT)
		return done;
	if (!done) {
		if (egress || (r->s->nat_found.flags & (TG_NAT_HOST | TG_NAT_MASQUERADE)))
			return TG_PASS;
		/* The error's own way: to whoever sent what it quotes. */
		r->s->p.t.dst = r->s->nat_found.dst;
		r->s->p.t.src = src;
		r->s->p.t.protocol = r->s->p.protocol;
		done = tg_route(r->skb, &r->s->p);
		return done & TG_LEAVE_DROP ? tg_drop(r, done & (TG_LEAVE_DROP - 1)) : done;
	}
	if (egress)
		return TG_PASS;
	tg_key(r);
	ct = tg_lookup(r);
	if (!ct)
		ct = tg_lookup_answered(r);
	if (!ct || !(ct->flags & TG_CT_SERVICE))
		return TG_PASS;
	r->s->inner.addr = ct->nat_addr;
	r->ep = tg_local(r->node, &r->s->inner.addr);
	if (!r->ep)
		return TG_PASS;
	r->s->p.t.src = src;
	r->s->p.t.dst = dst;
	r->s->p.t.protocol = r->s->p.protocol;
	done = tg_icmp_error(r);
	return done ? tg_drop(r, done) : tg_net_deliver(r);
}

/* ---- programs -------------------------------------------------------------------------------- */

tg_inline int tg_from_net(struct __sk_buff *skb)
{
	struct tg_run r = { .skb = skb };
	__u8 protocol;
	int done;

	/* Another host's, seen because somebody listens to everything. */
	if (skb->pkt_type != TG_PACKET_HOST || tg_open(&r) || tg_parse(skb, &r.s->p))
		return TG_PASS;
	r.s->uplink = skb->ifindex;
	if (r.s->p.kind == TG_KIND_ICMP_ERROR)
		return tg_net_error(&r, 0);
	if (dsr && r.s->p.kind == TG_KIND_FLOW && r.s->p.t.protocol == IPPROTO_UDP &&
	    tg_dsr_trusted(&r))
		return tg_net_carried(&r);
	protocol = r.s->p.t.protocol;
	if (r.s->p.kind != TG_KIND_FLOW || !tg_has_ports(protocol))
		return TG_PASS;
	/* A pod's fragments are its own interface's business. */
	if (r.s->p.fragment && (tg_local(r.node, &r.s->p.t.src) || tg_track_fragment(&r.s->p, 0)))
		return TG_PASS;
	done = tg_net_answer(&r);
	if (done == TG_NOT_OURS && !tg_is_icmp(protocol))
		done = tg_net_service(&r);
	return done == TG_NOT_OURS ? TG_PASS : done;
}

#endif
