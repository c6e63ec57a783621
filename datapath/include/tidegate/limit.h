/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* How many events a kind of denial may make: what one rule denies one peer over
 * and over must not fill the ring that a new denial needs, nor buy CPU time.
 *
 * A kind has a place of its own, or none: a place is given up only when it has been
 * idle for long, and whoever finds none is told of without a limit. So a
 * collision never hides anything. What is not sent is counted at the kind's
 * place, for whoever reads the ring to look up.
 */
#ifndef TIDEGATE_LIMIT_H
#define TIDEGATE_LIMIT_H

#include <tidegate/addr.h>
#include <tidegate/maps.h>

/* An event every `denial_interval_ns`, 128 a second, and two seconds of them at once. */
const volatile __u64 denial_interval_ns = 7812500;
const volatile __u64 denial_burst_ns = 2000000000;
const volatile __u64 denial_idle_ns = 30000000000; /* then another kind may have the place */

tg_inline __u32 tg_kind_hash(const struct tg_denial_kind *kind)
{
	__u32 h = kind->rule_set * 0x9E3779B1u ^ kind->rule * 0x85EBCA77u;

	h ^= kind->src_identity * 0xC2B2AE3Du ^ kind->dst_identity * 0x27D4EB2Fu;
	return tg_mix(h ^ kind->endpoint * 0x165667B1u ^ kind->what);
}

tg_inline int tg_same_kind(const struct tg_denial_kind *x, const struct tg_denial_kind *y)
{
	return !((x->rule_set ^ y->rule_set) | (x->rule ^ y->rule) |
		 (x->src_identity ^ y->src_identity) | (x->dst_identity ^ y->dst_identity) |
		 (x->endpoint ^ y->endpoint) | (x->what ^ y->what));
}

/* Takes one event from the place's allowance; 0: there is none left. `until` is when
 * all that was sent would have been due at the steady rate. */
tg_inline int tg_spend(struct tg_limit *limit, __u64 now)
{
	__u64 held = *(volatile __u64 *)&limit->until, from = held > now ? held : now;

	if (from - now > denial_burst_ns) {
		__sync_fetch_and_add(&limit->suppressed, 1);
		return 0;
	}
	/* Where two CPUs send at once one of the two is not charged. */
	__sync_val_compare_and_swap(&limit->until, held, from + denial_interval_ns);
	return 1;
}

/* The way to take for a new kind, or -1. */
tg_inline int tg_idle_way(const struct tg_limit_set *set, __u64 now)
{
	int i;

	for (i = 0; i < TG_LIMIT_WAYS; i++)
		if (!(*(volatile __u64 *)&set->way[i].serial & 1) &&
		    (!set->way[i].serial || set->way[i].until + denial_idle_ns < now))
			return i;
	return -1;
}

/* Whether an event of this kind must not be sent; then it has been counted. */
tg_global int tg_limited(const struct tg_denial_kind *kind)
{
	__u64 now = bpf_ktime_get_coarse_ns(), serial;
	struct tg_limit_set *set;
	struct tg_limit *way;
	__u32 at;
	int i;

	if (!kind)
		return 0;
	at = tg_kind_hash(kind) & (TG_LIMIT_SETS - 1);
	set = bpf_map_lookup_elem(&limits_v1, &at);
	if (!set)
		return 0;
	for (i = 0; i < TG_LIMIT_WAYS; i++) {
		serial = *(volatile __u64 *)&set->way[i].serial;
		tg_barrier();
		if (serial && !(serial & 1) && tg_same_kind(&set->way[i].kind, kind))
			return !tg_spend(&set->way[i], now);
	}
	i = tg_idle_way(set, now);
	if (i < 0)
		return 0;
	way = &set->way[i & (TG_LIMIT_WAYS - 1)];
	serial = *(volatile __u64 *)&way->serial;
	if ((serial & 1) || __sync_val_compare_and_swap(&way->serial, serial, serial + 1) != serial)
		return 0;
	way->kind = *kind;
	way->suppressed = 0;
	way->until = now + denial_interval_ns;
	tg_barrier();
	*(volatile __u64 *)&way->serial = serial + 2;
	return 0;
}

#endif
