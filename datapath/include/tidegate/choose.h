/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What a packet asks the tables: for its flow, and for a backend. */
#ifndef TIDEGATE_CHOOSE_H
#define TIDEGATE_CHOOSE_H

#include <tidegate/run.h>

tg_inline void tg_key(struct tg_run *r)
{
	__u32 hash = tg_flow_hash(&r->s->p.t);

	r->s->src_is_a = tg_ct_key(&r->s->p.t, &r->s->key);
	r->s->proof = tg_proof(hash);
	r->s->set = tg_set(hash);
}

tg_inline struct tg_ct *tg_lookup(struct tg_run *r)
{
	struct tg_ct *ct = bpf_map_lookup_elem(&ct_v2, &r->s->key);

	return ct && tg_ct_alive(ct, r->s->proof, r->s->p.t.protocol, r->s->now) ? ct : NULL;
}

/* The client's side of a translated flow that is not established. */
tg_inline struct tg_ct *tg_lookup_answered(struct tg_run *r)
{
	struct tg_ct *ct = bpf_map_lookup_elem(&answered_v1, &r->s->key);

	return ct && tg_ct_alive(ct, r->s->proof, r->s->p.t.protocol, r->s->now) ? ct : NULL;
}

/* Whether the packet goes against the way the flow began. */
tg_inline int tg_is_reply(const struct tg_run *r, __u32 flags)
{
	return !!(flags & TG_CT_BEGAN_A) != !!r->s->src_is_a;
}

tg_inline int tg_choose(struct tg_run *r, struct tg_choice *choice)
{
	struct tg_frontend_key key = { .addr = r->s->p.t.dst, .port = r->s->p.t.dport,
				       .protocol = r->s->p.t.protocol };
	__u32 hash = tg_mix(tg_addr_proof(&r->s->p.t.src) * 31 + r->s->p.t.sport + (__u32)r->s->proof);
	int answer = tg_service(&key, hash, choice);

	if (answer != TG_SERVICE_SPECIAL)
		return answer;
	r->s->asks.addr = r->s->p.t.src;
	/* On a ring the client's place is the same on every node, at any of its addresses. */
	r->s->asks.hash = choice->base >> TG_FRONTEND_FLAGS & TG_FRONTEND_RING ?
				  tg_mix(tg_addr_proof(&r->s->p.t.src) + r->s->p.t.sport * 0x9E3779B1u) : hash;
	r->s->asks.outside = !r->from_pod;
	return tg_special(&key, &r->s->asks, choice, dry_run);
}

/* A flow has got a backend of the frontend, or there is none. */
tg_inline void tg_count_asked(struct tg_run *r, const struct tg_addr *addr, __be16 port,
			      __u32 refused)
{
	struct tg_frontend_key *key = &r->s->counted;

	if (dry_run)
		return;
	key->addr = *addr;
	key->port = port;
	key->protocol = r->s->p.t.protocol;
	key->pad = 0;
	tg_service_count(key, refused);
}

#endif
