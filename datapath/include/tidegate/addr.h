/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses and the proofs that self-proving words carry. */
#ifndef TIDEGATE_ADDR_H
#define TIDEGATE_ADDR_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <tidegate/types.h>

#define tg_inline static __always_inline
/* Verified once, on its own, whoever calls it: takes only the packet, numbers
 * and plain memory, and checks its pointers. Keeps programs verifiable. */
#define tg_global __noinline

/* Keeps the compiler from merging or reordering what the comment beside its
 * use says must stay apart. */
#define tg_barrier() asm volatile("" ::: "memory")

/* The same number, of which the verifier knows nothing any more: in a loop it
 * else walks the rest once for each value that it has been able to tell apart.
 * `any`: a number that it does not know, of the same width. */
#define tg_forget(number, any) \
	asm volatile("%0 += %1; %0 -= %1" : "+r"(number) : "r"(any))

tg_inline void tg_addr_v4(struct tg_addr *addr, __be32 v4)
{
	addr->w[0] = 0;
	addr->w[1] = 0;
	addr->w[2] = bpf_htonl(0xffff);
	addr->w[3] = v4;
}

tg_inline int tg_addr_is_v4(const struct tg_addr *addr)
{
	return !(addr->w[0] | addr->w[1]) && addr->w[2] == bpf_htonl(0xffff);
}

tg_inline int tg_addr_equal(const struct tg_addr *x, const struct tg_addr *y)
{
	return !((x->w[0] ^ y->w[0]) | (x->w[1] ^ y->w[1]) |
		 (x->w[2] ^ y->w[2]) | (x->w[3] ^ y->w[3]));
}

tg_inline int tg_addr_is_zero(const struct tg_addr *addr)
{
	return !(addr->w[0] | addr->w[1] | addr->w[2] | addr->w[3]);
}

/* fe80::/10 */
tg_inline int tg_addr_is_link_local(const struct tg_addr *addr)
{
	return (addr->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* docs/architecture.md, "Proofs"; the loader computes the same. */
tg_inline __u32 tg_addr_proof(const struct tg_addr *addr)
{
	return (addr->w[0] * 0x9E3779B1u) ^ (addr->w[1] * 0x85EBCA77u) ^
	       (addr->w[2] * 0xC2B2AE3Du) ^ addr->w[3];
}

tg_inline __u16 tg_frontend_proof(const struct tg_frontend_key *key)
{
	__u32 x = tg_addr_proof(&key->addr) ^
		  ((key->port | (__u32)key->protocol << 16) * 0x27D4EB2Fu);

	return x ^ (x >> 16);
}

tg_inline __u32 tg_mix(__u32 h)
{
	h ^= h >> 16;
	h *= 0x85EBCA6Bu;
	h ^= h >> 13;
	h *= 0xC2B2AE35u;
	return h ^ (h >> 16);
}

#endif
