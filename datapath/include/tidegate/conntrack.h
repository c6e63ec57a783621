/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Flows. One key serves both directions; which end began is in the value, so
 * a packet of either direction costs one look-up.
 *
 * A value is valid if its word is (epoch, proof of the key) both before and
 * after the other fields were read: an entry may be recycled for another flow
 * under its reader. Writers take the word away, write, then set it.
 */
#ifndef TIDEGATE_CONNTRACK_H
#define TIDEGATE_CONNTRACK_H

#include <tidegate/parse.h>

/* Life times, in units of `seen` (2^30 ns, about a second). */
const volatile __u32 tcp_established_life = 20117; /* 6 h */
const volatile __u32 tcp_closed_life = 10;         /* both ends closed, or a reset */
const volatile __u32 tcp_opening_life = 60;        /* no reply yet */
const volatile __u32 other_established_life = 180;
const volatile __u32 other_opening_life = 60;

#define TG_PROOF_MASK ((1ull << TG_CT_PROOF_BITS) - 1)
#define TG_CT_CLOSED_BOTH (TG_CT_FIN_ORIG | TG_CT_FIN_REPLY)

/* Whether packets are told of one by one: `trace.h`. */
tg_inline int tg_tracing(void)
{
	struct tg_trace_filter *filter;
	__u32 zero = 0;

	filter = bpf_map_lookup_elem(&trace_filter_v1, &zero);
	return filter && *(volatile __u64 *)&filter->until;
}

/* The tick << 32 | what tg_second_seen() was at it, in one word, so that CPUs may share it. */
__u64 tg_clock;

#define TG_SECOND_TRACED (1u << 31) /* of 2^31 seconds nobody will see one */

/* What a flow's `seen` is if its last packet was now, and nothing is traced; with
 * TG_SECOND_TRACED no flow has it. Both are looked up once a tick: coarse time does
 * not move more often, and a filter may wait so long. The tick is read without a call. */
tg_inline __u32 tg_second_seen(void)
{
	__u64 tick = bpf_jiffies64() << 32, held = *(volatile __u64 *)&tg_clock;

	if ((held ^ tick) >> 32 || !(__u32)held) {
		held = tick | (__u32)(bpf_ktime_get_coarse_ns() >> 30);
		if (tg_tracing())
			held |= TG_SECOND_TRACED;
		*(volatile __u64 *)&tg_clock = held;
	}
	return held;
}

tg_inline __u32 tg_now(void)
{
	return tg_second_seen() & ~TG_SECOND_TRACED;
}

/* Two ports as they lie in memory one after the other. */
tg_inline __u32 tg_ports_word(__be16 first, __be16 second)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return first | (__u32)second << 16;
#else
	return (__u32)first << 16 | second;
#endif
}

/* Fills the key; returns whether the tuple's source is its end a. Its last words
 * are written whole, as the kernel's hash reads them: reading a word that was
 * just written in pieces stalls. */
tg_inline int tg_ct_key(const struct tg_tuple *t, struct tg_ct_key *key)
{
	const __u64 *src = (const __u64 *)&t->src, *dst = (const __u64 *)&t->dst;
	int src_is_a;

	if (t->sport != t->dport)
		src_is_a = t->sport < t->dport;
	else if (src[1] != dst[1])
		src_is_a = src[1] < dst[1];
	else
		src_is_a = src[0] <= dst[0];
	if (src_is_a) {
		key->a = t->src;
		key->b = t->dst;
		((__u32 *)key)[8] = tg_ports_word(t->sport, t->dport);
	} else {
		key->a = t->dst;
		key->b = t->src;
		((__u32 *)key)[8] = tg_ports_word(t->dport, t->sport);
	}
	((__u32 *)key)[9] = bpf_htonl((__u32)t->protocol << 24); /* and pad */
	return src_is_a;
}

/* The same for both directions. */
tg_inline __u32 tg_flow_hash(const struct tg_tuple *t)
{
	__u32 h = (tg_addr_proof(&t->src) + tg_addr_proof(&t->dst)) * 0x9E3779B1u;

	h ^= ((__u32)t->sport + t->dport + ((__u32)t->protocol << 16)) * 0x85EBCA77u;
	return h ^ h >> 15;
}

tg_inline __u64 tg_proof(__u32 hash)
{
	return hash & TG_PROOF_MASK;
}

/* Of a share, by the hash's bits above the proof. */
tg_inline __u32 tg_set(__u32 hash)
{
	return hash >> TG_CT_PROOF_BITS & (TG_HALF_OPEN_SETS - 1);
}

tg_inline __u64 tg_word(__u64 epoch, __u64 proof)
{
	return epoch << TG_CT_PROOF_BITS | proof;
}

tg_inline __u64 tg_read_word(const struct tg_ct *ct)
{
	__u64 word = *(volatile const __u64 *)&ct->word;

	tg_barrier();
	return word;
}

tg_inline int tg_closed(__u32 flags)
{
	return (flags & TG_CT_RST) || (flags & TG_CT_CLOSED_BOTH) == TG_CT_CLOSED_BOTH;
}

tg_inline int tg_expired(const struct tg_ct *ct, __u8 protocol, __u32 now)
{
	__u32 life;

	if (protocol == IPPROTO_TCP)
		life = tg_closed(ct->flags) ? tcp_closed_life :
		       ct->flags & TG_CT_REPLIED ? tcp_established_life : tcp_opening_life;
	else
		life = ct->flags & TG_CT_REPLIED ? other_established_life : other_opening_life;
	return (__s32)(now - ct->seen) > (__s32)life;
}

/* A SYN without ACK opens a flow, whatever was there before. */
tg_inline int tg_is_syn(const struct tg_packet *p)
{
	return (p->tcp_flags & (TG_TCP_SYN | TG_TCP_ACK)) == TG_TCP_SYN;
}

/* Whether the entry is this flow's and lives, whatever its epoch. */
tg_inline int tg_ct_alive(const struct tg_ct *ct, __u64 proof, __u8 protocol, __u32 now)
{
	return !((tg_read_word(ct) ^ proof) & TG_PROOF_MASK) && !tg_expired(ct, protocol, now);
}

/* Returns whether this packet closes the flow: of all that could, one does. */
tg_inline int tg_touch(struct tg_ct *ct, const struct tg_packet *p, int reply, __u32 now)
{
	__u32 add = 0, before;

	if (ct->seen != now)
		ct->seen = now;
	if (p->tcp_flags & TG_TCP_FIN)
		add |= reply ? TG_CT_FIN_REPLY : TG_CT_FIN_ORIG;
	if (p->tcp_flags & TG_TCP_RST)
		add |= TG_CT_RST;
	if (!add)
		return 0;
	before = __sync_fetch_and_or(&ct->flags, add);
	return !tg_closed(before) && tg_closed(before | add);
}

/* After everything else of the entry. */
tg_inline void tg_write_word(struct tg_ct *ct, __u64 word)
{
	tg_barrier();
	*(volatile __u64 *)&ct->word = word;
}

/* Changes the word if it is `from` still; whoever succeeds alone may write. */
tg_inline int tg_swap_word(struct tg_ct *ct, __u64 from, __u64 to)
{
	return __sync_val_compare_and_swap(&ct->word, from, to) == from;
}

/* ---- ways of a set ------------------------------------------------------------------- */

tg_inline int tg_key_equal(const struct tg_ct_key *x, const struct tg_ct_key *y)
{
	const __u64 *v = (const __u64 *)x, *w = (const __u64 *)y;

	return !((v[0] ^ w[0]) | (v[1] ^ w[1]) | (v[2] ^ w[2]) | (v[3] ^ w[3]) | (v[4] ^ w[4]));
}

tg_inline int tg_holds(const struct tg_half_open *way, __u64 word, const struct tg_ct_key *key,
		       __u64 proof)
{
	return word != TG_CT_FREE && word != TG_CT_BUSY && !((word ^ proof) & TG_PROOF_MASK) &&
	       tg_key_equal(&way->key, key);
}

/* Bounded where the verifier sees it: the compiler knows what the functions
 * below return, and would leave the mask out. */
tg_inline struct tg_half_open *tg_way(struct tg_half_open_set *set, __u32 at)
{
	asm volatile("%0 &= %1" : "+r"(at) : "i"(TG_HALF_OPEN_WAYS - 1));
	return &set->way[at];
}

/* The way that holds the flow, or -1. */
tg_global int tg_find_way(const struct tg_half_open_set *set, const struct tg_ct_key *key,
			  __u64 proof)
{
	int i;

	if (!set || !key)
		return -1;
	for (i = 0; i < TG_HALF_OPEN_WAYS; i++)
		if (tg_holds(&set->way[i], tg_read_word(&set->way[i].ct), key, proof))
			return i;
	return -1;
}

enum tg_rank {
	TG_RANK_BUSY = 0,
	TG_RANK_OWN = 0xffffffff,
	TG_RANK_FREE = TG_RANK_OWN - 1,
	TG_RANK_EXPIRED = TG_RANK_OWN - 2,
};

/* How gladly a way is given up for a flow: the flow's own, then a free one, one
 * that has expired, the one least recently seen; any of those equally old, so
 * low bits of `now_tie` (time << 2 | tie) decide. `word`: as it was read. */
tg_inline __u32 tg_rank(const struct tg_half_open *way, const struct tg_ct_key *key,
			__u64 proof, __u64 now_tie, __u64 *word)
{
	__u32 now = now_tie >> 2;
	__s32 age;

	*word = tg_read_word(&way->ct);
	if (*word == TG_CT_FREE)
		return TG_RANK_FREE;
	if (*word == TG_CT_BUSY)
		return TG_RANK_BUSY;
	if (tg_holds(way, *word, key, proof))
		return TG_RANK_OWN;
	age = now - way->ct.seen;
	if (age <= 0)
		age = 0;
	else if (tg_expired(&way->ct, way->key.protocol, now))
		return TG_RANK_EXPIRED;
	return ((__u32)age << 2 | (now_tie & 3)) + 1;
}

/* The way that is given up most gladly, plus TG_HALF_OPEN_WAYS if it is the flow's
 * own; `word`: as it was read, busy if they all are. Apart, so that the verifier
 * walks through it once and not at each try. */
tg_global int tg_pick_way(const struct tg_half_open_set *set, const struct tg_ct_key *key,
			  __u64 proof, __u32 now, __u64 *word)
{
	__u32 rank, highest = 0, best = 0;
	__u64 seen;
	int i;

	if (!set || !key || !word)
		return 0;
	*word = TG_CT_BUSY;
	for (i = 0; i < TG_HALF_OPEN_WAYS; i++) {
		rank = tg_rank(&set->way[i], key, proof, (__u64)now << 2 | ((proof + i) & 3),
			       &seen);
		if (rank > highest) {
			highest = rank;
			best = i;
			*word = seen;
		}
		tg_forget(highest, now);
		tg_forget(best, now);
	}
	return highest == TG_RANK_OWN ? best + TG_HALF_OPEN_WAYS : best;
}

#define TG_CLAIMS 4

/* Makes a way the caller's to write: the flow's own, else the one given up most
 * gladly. Returns its number, plus TG_HALF_OPEN_WAYS if it is the flow's own;
 * -1: at each try another CPU was faster. */
tg_global int tg_claim_way(struct tg_half_open_set *set, const struct tg_ct_key *key, __u64 proof,
			   __u32 now)
{
	__u64 word;
	int try, at;

	if (!set || !key)
		return -1;
	for (try = 0; try < TG_CLAIMS; try++) {
		at = tg_pick_way(set, key, proof, now, &word);
		if (word != TG_CT_BUSY && tg_swap_word(&tg_way(set, at)->ct, word, TG_CT_BUSY))
			return at & (2 * TG_HALF_OPEN_WAYS - 1);
	}
	return -1;
}

#endif
