/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The packet as its hook has it: what tc and XDP do each in its own way. An object
 * for XDP defines TG_XDP before it includes anything. `skb` is whichever it is. */
#ifndef TIDEGATE_PACKET_H
#define TIDEGATE_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <tidegate/addr.h>

#ifdef TG_XDP
typedef struct xdp_md tg_context;
#else
typedef struct __sk_buff tg_context;
#endif

#define TG_MAX_L4 512 /* headers deeper than this are not walked */

tg_inline int tg_load(tg_context *skb, __u32 offset, void *to, __u32 len)
{
#ifdef TG_XDP
	return bpf_xdp_load_bytes(skb, offset, to, len);
#else
	return bpf_skb_load_bytes(skb, offset, to, len);
#endif
}

/* A pointer to `len` bytes at `offset` of the linear data, or NULL. */
tg_inline void *tg_at(tg_context *skb, __u32 offset, __u32 len)
{
	void *end = (void *)(long)skb->data_end;
	void *at;

#ifdef TG_XDP
	/* Else the compiler, which knows more of it than Linux 6.1's verifier, leaves
	 * the next comparison out. */
	asm volatile("" : "+r"(offset));
#endif
	if (offset > TG_MAX_L4)
		return NULL;
	at = (void *)(long)skb->data + offset;
	return at + len > end ? NULL : at;
}

/* From the Ethernet header on. */
tg_inline __u32 tg_length(const tg_context *skb)
{
#ifdef TG_XDP
	return skb->data_end - skb->data;
#else
	return skb->len;
#endif
}

/* Headers may lie in fragments of the skb: bring the first bytes together. XDP
 * without fragments has all of a frame in one piece. */
tg_inline void tg_linearise(tg_context *skb)
{
#ifdef TG_XDP
	(void)skb;
#else
	__u32 want = skb->len < 128 ? skb->len : 128;

	if ((long)skb->data_end - (long)skb->data < want)
		bpf_skb_pull_data(skb, want);
#endif
}

/* Whether a VLAN's tag was taken out of the frame, where the hook can tell. */
tg_inline int tg_has_tag(const tg_context *skb)
{
#ifdef TG_XDP
	(void)skb;
	return 0;
#else
	return skb->vlan_present;
#endif
}

#endif
