/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Translations at the uplink of what does not end in a pod of this node: two
 * entries a flow, one for each way its packets come in. What they say never
 * changes; an entry that a reader has lost shows by its word, before and after.
 *
 * A flow has a port of this node for as long as an entry with that port and its
 * backend is there: it is taken by inserting what must not exist. The ports are
 * of a range that no socket of the node is given by the kernel.
 */
#ifndef TIDEGATE_SNAT_H
#define TIDEGATE_SNAT_H

#include <tidegate/choose.h>

/* Ports of the node that translated flows have, both included. */
const volatile __u16 snat_first = 10000;
const volatile __u16 snat_last = 29999;

/* Clients outside are answered by their backends' nodes. Loaded as 0 there is nothing
 * of it in the program. */
const volatile __u8 dsr = 0;

/* Whose flows can be given another address and port. */
tg_inline int tg_has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       tg_is_icmp(protocol);
}

/* How long the other end may keep a connection that it closed first, in units of
 * `seen`: TCP's TIME-WAIT, which is 60 s in Linux. */
const volatile __u32 tcp_rest_life = 64;

#define TG_NAT_PROOF_MASK ((1ull << TG_NAT_PROOF_BITS) - 1)
#define TG_NAT_TRIES 32
#define TG_EEXIST 17

tg_inline void tg_nat_key(struct tg_nat_key *key, const struct tg_tuple *t)
{
	key->src = t->src;
	key->dst = t->dst;
	key->sport = t->sport;
	key->dport = t->dport;
	key->protocol = t->protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
}

/* The key of the other way's entry. */
tg_inline void tg_nat_twin(struct tg_nat_key *key, const struct tg_nat *nat, __u8 protocol)
{
	key->src = nat->dst;
	key->dst = nat->src;
	key->sport = nat->dport;
	key->dport = nat->sport;
	key->protocol = protocol;
	key->pad[0] = key->pad[1] = key->pad[2] = 0;
}

tg_inline __u64 tg_nat_proof(const struct tg_nat_key *key)
{
	__u32 x = tg_addr_proof(&key->src) * 0x9E3779B1u + tg_addr_proof(&key->dst);
	__u32 y = key->sport | (__u32)key->dport << 16;

	return ((__u64)tg_mix(x ^ y) << 8 | (tg_mix(y + key->protocol) & 0xff)) & TG_NAT_PROOF_MASK;
}

/* With when it was made: an entry made anew under its key has another word. */
tg_inline __u64 tg_nat_word(const struct tg_nat_key *key, __u32 now)
{
	return (__u64)now << TG_NAT_PROOF_BITS | tg_nat_proof(key);
}

tg_inline __u64 tg_nat_read(const struct tg_nat *nat)
{
	__u64 word = *(volatile const __u64 *)&nat->word;

	tg_barrier();
	return word;
}

/* The entry, and a whole copy of it; NULL: there is none. */
tg_inline struct tg_nat *tg_nat_find(const struct tg_nat_key *key, struct tg_nat *copy)
{
	struct tg_nat *nat = bpf_map_lookup_elem(&nat_v1, key);
	__u64 word;

	if (!nat)
		return NULL;
	word = tg_nat_read(nat);
	if ((word ^ tg_nat_proof(key)) & TG_NAT_PROOF_MASK)
		return NULL;
	*copy = *nat;
	tg_barrier();
	if (tg_nat_read(nat) != word)
		return NULL;
	copy->word = word;
	return nat;
}

tg_inline int tg_nat_over(__u32 seen, __u32 flags, __u8 protocol, __u32 now)
{
	struct tg_ct as = { .seen = seen, .flags = flags };

	return tg_expired(&as, protocol, now);
}

/* Whether the flow of this entry, of which `copy` is one, is over: what each
 * way has seen is in its own entry. */
tg_inline int tg_nat_ends(struct tg_scratch *s, const struct tg_nat *copy, __u8 protocol)
{
	__u32 seen = copy->seen, flags = copy->flags;
	struct tg_nat *twin;

	tg_nat_twin(&s->nat_twin, copy, protocol);
	twin = tg_nat_find(&s->nat_twin, &s->nat_other);
	if (twin) {
		flags |= s->nat_other.flags;
		if ((__s32)(s->nat_other.seen - seen) > 0)
			seen = s->nat_other.seen;
	}
	return tg_nat_over(seen, flags, protocol, s->now);
}

static __noinline int tg_nat_ended(struct tg_run *r, const struct tg_nat *copy, __u8 protocol)
{
	return tg_nat_ends(r->s, copy, protocol);
}

/* Whether the other end may still wait for late segments of this flow, which is
 * over: a SYN of another client from the same port it may take for one of them
 * (RFC 7323, 5.3), and drop. */
tg_inline int tg_nat_rests(const struct tg_nat *copy, __u8 protocol, __u32 now)
{
	return protocol == IPPROTO_TCP && !(copy->flags & TG_CT_RST) && tg_closed(copy->flags) &&
	       (__s32)(now - copy->seen) <= (__s32)tcp_rest_life;
}

/* Whether this packet is none of the flow's any more that s->nat_found is of. UDP
 * leaves a backend that is gone; TCP stays until it ends. */
tg_inline int tg_nat_left(struct tg_run *r)
{
	struct tg_scratch *s = r->s;
	struct tg_choice *now = &s->choice;

	if (s->nat_found.flags & TG_NAT_REPLY)
		return 0;
	if (tg_nat_ended(r, &s->nat_found, s->p.t.protocol) ||
	    (tg_is_syn(&s->p) && tg_closed(s->nat_found.flags)))
		return 1;
	return s->p.t.protocol == IPPROTO_UDP &&
	       (tg_backend(s->nat_found.backend, IPPROTO_UDP, now) != TG_SERVICE_FOUND ||
		!tg_addr_equal(&now->addr, &s->nat_found.dst));
}

/* Both entries go. Whoever takes the word away is alone in it. */
tg_inline int tg_nat_remove(struct tg_scratch *s, struct tg_nat *nat, const struct tg_nat_key *key,
			    const struct tg_nat *copy)
{
	if (__sync_val_compare_and_swap(&nat->word, copy->word, TG_CT_FREE) != copy->word)
		return 0;
	tg_nat_twin(&s->nat_twin, copy, key->protocol);
	bpf_map_delete_elem(&nat_v1, key);
	bpf_map_delete_elem(&nat_v1, &s->nat_twin);
	return 1;
}

tg_inline void tg_nat_touch(struct tg_run *r, struct tg_nat *nat, const struct tg_nat *copy)
{
	int reply = copy->flags & TG_NAT_REPLY;
	__u32 add = reply ? TG_CT_REPLIED : 0;
	struct tg_nat *twin;

	/* Answers do not come by here: that the client goes on says there are some. */
	if (dsr && (copy->flags & TG_NAT_DSR) && !tg_is_syn(&r->s->p))
		add = TG_CT_REPLIED;
	if (nat->seen != r->s->now)
		nat->seen = r->s->now;
	if (r->s->p.tcp_flags & TG_TCP_FIN)
		add |= reply ? TG_CT_FIN_REPLY : TG_CT_FIN_ORIG;
	if (r->s->p.tcp_flags & TG_TCP_RST)
		add |= TG_CT_RST;
	if ((copy->flags & add) == add)
		return;
	__sync_fetch_and_or(&nat->flags, add);
	tg_nat_twin(&r->s->nat_twin, copy, r->s->p.t.protocol);
	twin = tg_nat_find(&r->s->nat_twin, &r->s->nat_other);
	if (twin)
		__sync_fetch_and_or(&twin->flags, add);
}

/* Takes the entry of the way back: s->nat_key is its key, s->nat_made its value.
 * 0, or -TG_EEXIST: a living flow has it, or with `spares` one that rests; or why
 * there is no room. It and its caller find the run's scratch by themselves, and so
 * are verified once. */
tg_global int tg_nat_claim(int spares)
{
	struct tg_scratch *s = tg_work();
	struct tg_nat *held;
	long error;

	if (!s)
		return -1;
	s->nat_made.word = tg_nat_word(&s->nat_key, s->now);
	error = bpf_map_update_elem(&nat_v1, &s->nat_key, &s->nat_made, BPF_NOEXIST);
	if (error != -TG_EEXIST)
		return error;
	held = tg_nat_find(&s->nat_key, &s->nat_found);
	if (!held || !tg_nat_ends(s, &s->nat_found, s->nat_key.protocol) ||
	    (spares && tg_nat_rests(&s->nat_found, s->nat_key.protocol, s->now)) ||
	    !tg_nat_remove(s, held, &s->nat_key, &s->nat_found))
		return -TG_EEXIST;
	return bpf_map_update_elem(&nat_v1, &s->nat_key, &s->nat_made, BPF_NOEXIST);
}

tg_inline int tg_is_node(const struct tg_addr *addr)
{
	struct tg_node_addr *found = bpf_map_lookup_elem(&node_addrs_v1, addr);

	return found && *(volatile __u32 *)&found->proof == tg_addr_proof(addr);
}

/* As whom this node sends on; 0: it has no such address. */
tg_inline int tg_node_source(__u8 family, struct tg_addr *addr)
{
	__u32 at = family == 6;
	struct tg_node_addr *found = bpf_map_lookup_elem(&node_source_v1, &at), copy;

	if (!found)
		return 0;
	copy = *found;
	tg_barrier();
	if (tg_addr_is_zero(&copy.addr) || copy.proof != tg_addr_proof(&copy.addr))
		return 0;
	*addr = copy.addr;
	return 1;
}

/* Makes both entries of a new flow from s->p.t, as it came in, to s->choice;
 * s->nat_made is then that of this way. `kind`: TG_NAT_HOST, TG_NAT_DSR,
 * TG_NAT_MASQUERADE or none. An enum tg_reason. */
tg_global int tg_nat_make(__u32 kind)
{
	__u32 span = (__u32)snat_last - snat_first + 1, at = bpf_get_prandom_u32();
	struct tg_scratch *s = tg_work();
	const struct tg_choice *choice;
	struct tg_tuple *t;
	int i, error = -1;

	if (!s || !span)
		return TG_DROP_NAT_FULL;
	t = &s->p.t;
	choice = &s->choice;
	__builtin_memset(&s->nat_made, 0, sizeof(s->nat_made));
	s->nat_made.seen = s->now;
	s->nat_made.flags = TG_NAT_REPLY | kind;
	s->nat_made.src = t->dst;
	s->nat_made.dst = t->src;
	s->nat_made.sport = t->dport;
	s->nat_made.dport = t->sport;
	s->nat_made.backend = choice->backend;
	s->nat_key.src = choice->addr;
	s->nat_key.sport = choice->port;
	s->nat_key.dst = t->src;
	s->nat_key.dport = t->sport;
	s->nat_key.protocol = t->protocol;
	s->nat_key.pad[0] = s->nat_key.pad[1] = s->nat_key.pad[2] = 0;
	if (kind & (TG_NAT_HOST | TG_NAT_DSR)) {
		error = tg_nat_claim(0);
	} else {
		if (!tg_node_source(s->p.family, &s->nat_key.dst))
			return TG_DROP_NO_ROUTE;
		/* SCTP keeps its port: its checksum cannot be patched for another. */
		for (i = 0; i < TG_NAT_TRIES; i++) {
			if (t->protocol != IPPROTO_SCTP)
				s->nat_key.dport = bpf_htons(snat_first + (at + i * 7919u) % span);
			/* Where all rest, one of them: its end may take it. */
			error = tg_nat_claim(i < TG_NAT_TRIES / 2);
			if (error != -TG_EEXIST || t->protocol == IPPROTO_SCTP)
				break;
		}
	}
	if (error)
		return TG_DROP_NAT_FULL;
	/* This way: to the backend, from the node or still from the client. */
	s->nat_found = s->nat_made;
	s->nat_made.flags = kind;
	s->nat_made.src = s->nat_key.dst;
	s->nat_made.dst = choice->addr;
	s->nat_made.sport = s->nat_key.dport;
	s->nat_made.dport = choice->port;
	tg_nat_twin(&s->nat_twin, &s->nat_found, t->protocol);
	s->nat_made.word = tg_nat_word(&s->nat_twin, s->now);
	if (!bpf_map_update_elem(&nat_v1, &s->nat_twin, &s->nat_made, BPF_NOEXIST))
		return 0;
	/* Another CPU has just made the same flow: its choice counts. */
	bpf_map_delete_elem(&nat_v1, &s->nat_key);
	return tg_nat_find(&s->nat_twin, &s->nat_made) ? 0 : TG_DROP_NAT_FULL;
}

/* Gives an echo its other identifier, which is the request's source port and the
 * reply's destination port. */
tg_global int tg_rewrite_echo(tg_context *skb, struct tg_packet *p, const struct tg_nat *nat)
{
	struct tg_icmp *icmp;
	__be16 id, *held;
	__u32 l4;

	if (!p || !nat || p->l4 > TG_MAX_L4)
		return TG_DROP_REWRITE;
	l4 = p->l4;
	held = nat->flags & TG_NAT_REPLY ? &p->t.dport : &p->t.sport;
	id = nat->flags & TG_NAT_REPLY ? nat->dport : nat->sport;
	if (p->fragment != TG_LATER_FRAGMENT) {
		if (tg_l4_csum(skb, l4 + offsetof(struct tg_icmp, checksum),
			       tg_csum_diff(*held, id), 0))
			return TG_DROP_REWRITE;
		icmp = tg_at(skb, l4, sizeof(*icmp));
		if (!icmp)
			return TG_DROP_REWRITE;
		icmp->id = id;
	}
	*held = id;
	return 0;
}

/* The packet as `nat` says. */
static __noinline int tg_nat_apply(struct tg_run *r, const struct tg_nat *nat)
{
	struct tg_target *to = &r->s->inner;
	int reason = 0;

	if (!nat)
		return TG_DROP_REWRITE;
	to->addr = nat->dst;
	to->port = nat->dport;
	to->side = TG_SIDE_DST;
	if (tg_is_icmp(r->s->p.t.protocol)) {
		reason = tg_rewrite_echo(r->skb, &r->s->p, nat);
		if (reason)
			return reason;
	}
	if (!tg_addr_equal(&to->addr, &r->s->p.t.dst) || to->port != r->s->p.t.dport)
		reason = tg_rewrite(r->skb, &r->s->p, to);
	if (reason)
		return reason;
	to->addr = nat->src;
	to->port = nat->sport;
	to->side = TG_SIDE_SRC;
	if (tg_addr_equal(&to->addr, &r->s->p.t.src) && to->port == r->s->p.t.sport)
		return 0;
	return tg_rewrite(r->skb, &r->s->p, to);
}

#endif
