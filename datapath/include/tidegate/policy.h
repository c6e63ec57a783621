/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who is at an address, and what a subject's rule set says of them. */
#ifndef TIDEGATE_POLICY_H
#define TIDEGATE_POLICY_H

#include <tidegate/parse.h>

struct tg_peer {
	__u32 identity;
	__u32 flags;                        /* enum tg_ipcache_flags */
	const struct tg_endpoint *endpoint; /* in this run's node table, or NULL */
};

/* What one end's policy said. */
struct tg_verdict {
	__u32 reason;   /* 0 or why not */
	__u32 rule_set; /* 0: no policy selects the subject */
	__u32 rule;     /* TG_RULE_NONE: default */
	__u32 shape;    /* the key shape that matched */
};

struct tg_question {
	struct tg_addr addr; /* the peer's */
	__u32 identity;      /* the peer's */
	__be16 port;         /* destination port of the flow */
	__u8 protocol;
	__u8 pad;
};

tg_inline __u64 tg_ipcache_word(const struct tg_addr *addr)
{
	__u64 *word = bpf_map_lookup_elem(&ipcache_v1, addr);

	return word ? *(volatile __u64 *)word : 0;
}

tg_inline const struct tg_endpoint *tg_local(void *node, const struct tg_addr *addr)
{
	struct tg_node_key key = { .kind = TG_NODE_ADDR, .addr = *addr };

	return bpf_map_lookup_elem(node, &key);
}

/* An element can be recycled for another address between look-up and read; a
 * wrong proof is looked up once more, then the entry counts as absent. */
tg_global int tg_peer_lookup(const struct tg_addr *addr, struct tg_ipcache *found)
{
	struct tg_prefix key = { .bits = 128 };
	__u32 proof;
	__u32 *identity;

	if (!addr || !found)
		return 0;
	/* Linux 6.1 takes no key from a global function's argument. */
	key.addr = *addr;
	proof = tg_addr_proof(&key.addr);
	*(__u64 *)found = tg_ipcache_word(&key.addr);
	if (*(__u64 *)found && found->proof != proof)
		*(__u64 *)found = tg_ipcache_word(&key.addr);
	if (*(__u64 *)found && found->proof == proof)
		return 0;
	identity = bpf_map_lookup_elem(&ipcache_lpm_v1, &key);
	found->identity = identity ? *(volatile __u32 *)identity : TG_ID_WORLD;
	return 0;
}

tg_inline void tg_find_peer(void *node, const struct tg_addr *addr, struct tg_peer *peer)
{
	struct tg_ipcache found = {};

	tg_peer_lookup(addr, &found);
	peer->flags = found.identity & ~TG_ID_MASK;
	peer->identity = found.identity & TG_ID_MASK;
	peer->endpoint = NULL;
	if (!(peer->flags & TG_IPCACHE_LOCAL))
		return;
	peer->endpoint = tg_local(node, addr);
	if (peer->endpoint)
		peer->identity = peer->endpoint->identity;
}

tg_inline int tg_better(const struct tg_rule *rule, const struct tg_rule *best)
{
	if (!best || rule->precedence > best->precedence)
		return 1;
	return rule->precedence == best->precedence && rule->rule < best->rule;
}

/* What a question's rule keys are made of, the same for each shape. */
struct tg_parts {
	__u32 identity; /* 0: matches terms for any peer only */
	__u32 class;    /* peer word; 0: none */
	__u32 ports;    /* (protocol, port) as a 24-bit number */
	__u32 bits;     /* how many of them this packet has: 24 or 8 */
};

tg_inline void tg_rule_parts(const struct tg_question *q, __u32 class, struct tg_parts *parts)
{
	int ports = q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP ||
		    q->protocol == IPPROTO_SCTP;

	parts->identity = q->identity;
	parts->class = class && q->identity ? TG_PEER_WORD_CLASS | class : 0;
	parts->ports = (__u32)q->protocol << 16 | bpf_ntohs(q->port);
	parts->bits = ports ? 24 : 8;
}

/* Written as two words, as the kernel's hash reads it: reading a word that was
 * just written in pieces stalls. 0: nothing under this shape can match. */
tg_inline int tg_rule_key(const struct tg_parts *parts, __u8 shape, struct tg_rule_key *key)
{
	__u32 bits = shape & 31, kind = shape >> 5;
	__u32 peer = kind == TG_PEER_IDENTITY ? parts->identity :
		     kind == TG_PEER_CLASS ? parts->class : TG_PEER_WORD_ANY;
	__u32 ports;

	/* A rule with ports never matches what has none. */
	if (!peer || bits > parts->bits)
		return 0;
	ports = parts->ports >> (24 - bits) << (24 - bits);
	((__u32 *)key)[0] = peer;
	/* As on the wire: port, protocol, prefix. */
	((__u32 *)key)[1] = bpf_htonl(ports << 16 | ports >> 16 << 8 | bits);
	return 1;
}

/* Probes the rule set's key shapes; the highest precedence wins, never the
 * first hit. */
tg_global int tg_policy_check(const struct tg_policy *policy,
				      const struct tg_question *q, struct tg_verdict *verdict)
{
	const struct tg_rule *best = NULL;
	struct tg_prefix prefix;
	struct tg_rule_key key;
	struct tg_parts parts;
	__u32 slot, class = 0;
	void *rules, *trie;
	__u32 *found;
	int i;

	if (!policy || !q || !verdict)
		return 0;
	verdict->reason = 0;
	verdict->rule = TG_RULE_NONE;
	verdict->rule_set = 0;
	verdict->shape = 0;
	if (!(policy->flags & TG_POLICY_ISOLATED))
		return 0;
	verdict->rule_set = policy->rule_set;
	slot = policy->slot;
	verdict->reason = TG_DROP_NO_RULE_SET;
	rules = bpf_map_lookup_elem(&rule_sets_v1, &slot);
	if (!rules)
		return 0;
	if (policy->flags & TG_POLICY_CIDR) {
		trie = bpf_map_lookup_elem(&cidrs_v1, &slot);
		if (!trie)
			return 0;
		prefix.bits = 128;
		prefix.addr = q->addr;
		found = bpf_map_lookup_elem(trie, &prefix);
		class = found ? *found : 0;
	}
	tg_rule_parts(q, class, &parts);
	for (i = 0; i < TG_MAX_SHAPES; i++) {
		const struct tg_rule *rule;
		__u8 shape;

		if (i >= policy->shape_count)
			break;
		shape = policy->shapes[i];
		if (!tg_rule_key(&parts, shape, &key))
			continue;
		rule = bpf_map_lookup_elem(rules, &key);
		if (rule && tg_better(rule, best)) {
			best = rule;
			verdict->shape = shape;
		}
	}
	verdict->reason = TG_DROP_POLICY;
	if (best) {
		verdict->rule = best->rule;
		verdict->reason = best->action == TG_ACTION_ALLOW ? 0 : TG_DROP_POLICY_DENY;
	}
	return 0;
}

#endif
