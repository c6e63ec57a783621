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
	__u32 reason;     /* 0 or why not */
	__u32 rule_set;   /* 0: no policy has a say */
	__u32 rule;       /* TG_RULE_NONE: default */
	__u32 audit_rule; /* with `audit`; TG_RULE_NONE: default deny */
	__u8 shape;       /* the key shape that matched */
	__u8 audit;       /* why not, if policies in audit mode counted; 0: they agree */
	__u8 log;         /* the rule asks for a report */
	__u8 pad;
};

/* What a question's rule keys are made of, the same for each shape. */
struct tg_parts {
	__u32 peers[4]; /* peer words by enum tg_peer_kind; 0: matches none of that kind */
	__u32 ports;    /* the key's second word, as it lies in memory, without its prefix */
	__u32 bits;     /* how many of protocol and port this packet has: 24 or 8 */
};

enum tg_found {
	TG_FOUND_NONE = 0,
	TG_FOUND = 1,
	TG_FOUND_NO_SET = 2, /* the rule set is missing */
};

/* The rule of a lane that wins. */
struct tg_match {
	__u32 precedence;
	__u32 rule;
	__u8 found;   /* enum tg_found */
	__u8 action;
	__u8 log;
	__u8 shape;
};

struct tg_question {
	struct tg_addr addr; /* the peer's */
	__u32 identity;      /* the peer's */
	__be16 port;         /* destination port of the flow; of ICMP type << 8 | code */
	__u8 protocol;
	__u8 entity;         /* enum tg_entity of the peer's address; 0: no node's */
	/* Room to work, which the stack has not. */
	struct tg_parts parts;
	struct tg_match match[2]; /* of the first verdict's lanes, of audit's */
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

static __noinline __attribute__((unused)) const struct tg_endpoint *
tg_at_interface(void *node, __u32 ifindex)
{
	struct tg_node_key key = { .kind = TG_NODE_IFINDEX };

	key.addr.w[0] = ifindex;
	return bpf_map_lookup_elem(node, &key);
}

/* Who has this address, or the network that it lies in; returns whether the address
 * has an entry of its own. An element can be recycled for another address between
 * look-up and read; a wrong proof is looked up once more, then it counts as absent. */
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
		return 1;
	identity = bpf_map_lookup_elem(&ipcache_lpm_v1, &key);
	found->identity = identity ? *(volatile __u32 *)identity : TG_ID_WORLD;
	return 0;
}

/* Whether it is nobody's of the cluster: a pod's network is there without identity. */
tg_inline int tg_is_outside(const struct tg_addr *addr)
{
	struct tg_ipcache who = {};

	tg_peer_lookup(addr, &who);
	return !(who.identity & TG_IPCACHE_PEER) && (who.identity & TG_ID_MASK) != TG_ID_UNKNOWN;
}

/* `found`: what tg_peer_lookup() says of the address. */
static __noinline __attribute__((unused)) int
tg_find_peer(void *node, const struct tg_addr *addr, const struct tg_ipcache *found,
	     struct tg_peer *peer)
{
	peer->flags = found->identity & ~TG_ID_MASK;
	peer->identity = found->identity & TG_ID_MASK;
	peer->endpoint = NULL;
	if (!(peer->flags & TG_IPCACHE_LOCAL))
		return 0;
	peer->endpoint = tg_local(node, addr);
	if (peer->endpoint)
		peer->identity = peer->endpoint->identity;
	return 0;
}

/* What an address is as a node's. This node's own are its own as destinations
 * only: a packet that comes from one was made here (and is not asked about), or
 * claims to. */
tg_inline __u8 tg_entity_of(const struct tg_peer *peer, int is_destination)
{
	return (is_destination && peer->flags & TG_IPCACHE_OWN ? TG_ENTITY_OWN : 0) |
	       (peer->flags & TG_IPCACHE_NODE ? TG_ENTITY_NODE : 0) |
	       (peer->identity == TG_ID_KUBE_APISERVER ? TG_ENTITY_API : 0);
}

/* What a prefix keeps of a key's second word: of the protocol, then of the port. */
#define TG_KEPT(bits) (0xffffffu << (24 - (bits)))
#define TG_KEPT_WORD(bits) \
	__bpf_constant_htonl((TG_KEPT(bits) & 0xffff) << 16 | (TG_KEPT(bits) >> 8 & 0xff00))
#define TG_KEPT_WORDS(bits) \
	TG_KEPT_WORD(bits), TG_KEPT_WORD((bits) + 1), TG_KEPT_WORD((bits) + 2), \
		TG_KEPT_WORD((bits) + 3)

static const __u32 tg_kept[32] = { /* none has more than 24 */
	TG_KEPT_WORDS(0),  TG_KEPT_WORDS(4),  TG_KEPT_WORDS(8),  TG_KEPT_WORDS(12),
	TG_KEPT_WORDS(16), TG_KEPT_WORDS(20), TG_KEPT_WORD(24),
};

tg_inline void tg_rule_parts(struct tg_question *q, __u32 class)
{
	struct tg_parts *parts = &q->parts;
	int ports = q->protocol == IPPROTO_TCP || q->protocol == IPPROTO_UDP ||
		    q->protocol == IPPROTO_SCTP || tg_is_icmp(q->protocol);

	parts->peers[TG_PEER_IDENTITY] = q->identity;
	parts->peers[TG_PEER_CLASS] = class && q->identity ? TG_PEER_WORD_CLASS | class : 0;
	parts->peers[TG_PEER_ENTITY] = q->entity ? TG_PEER_WORD_ENTITY | q->entity : 0;
	parts->peers[TG_PEER_ANY] = TG_PEER_WORD_ANY;
	parts->ports = bpf_htonl((__u32)bpf_ntohs(q->port) << 16 | (__u32)q->protocol << 8);
	parts->bits = ports ? 24 : 8;
}

/* Written as two words, as the kernel's hash reads it: reading a word that was
 * just written in pieces stalls. 0: nothing under this shape can match. */
tg_inline int tg_rule_key(const struct tg_parts *parts, __u32 lane, __u32 shape,
			  struct tg_rule_key *key)
{
	__u32 bits = shape & 31, peer;
	__u64 kind = shape >> 5;

	/* A table, not branches: the verifier would walk each, for each shape. */
	asm volatile("%0 &= 3" : "+r"(kind));
	peer = parts->peers[kind];
	/* A rule with ports never matches what has none. */
	if (!peer || bits > parts->bits)
		return 0;
	((__u32 *)key)[0] = peer;
	((__u32 *)key)[1] = (parts->ports & tg_kept[bits]) | bpf_htonl(lane << 5 | bits);
	return 1;
}

/* Among equals the lowest rule, so that the rule a verdict names never depends
 * on the order of look-ups. */
tg_inline int tg_better(__u32 precedence, __u32 rule, const struct tg_match *best)
{
	if (!best->found || precedence > best->precedence)
		return 1;
	return precedence == best->precedence && rule < best->rule;
}

/* Probes a lane's key shapes; the highest precedence wins, never the first hit.
 * As little as can be lives on the stack: Linux 6.1 adds up whole chains of calls. */
tg_global int tg_probe(const struct tg_policy *policy, struct tg_question *q, __u32 lane)
{
	struct tg_rule_key key;
	void *rules;
	__u32 at, end;

	if (!policy || !q)
		return 0;
	/* Bounds where the verifier sees them; no caller goes beyond them. */
	asm volatile("%0 &= 3" : "+r"(lane));
	q->match[lane >> 1].found = TG_FOUND_NO_SET;
	key.peer = policy->slot;
	rules = bpf_map_lookup_elem(&rule_sets_v2, &key.peer);
	if (!rules)
		return 0;
	q->match[lane >> 1].found = TG_FOUND_NONE;
	at = lane * TG_MAX_SHAPES;
	for (end = at + policy->counts[lane]; at < end; at++) {
		const struct tg_rule *rule;
		struct tg_match *best;

		/* No address is worth keeping. */
		asm volatile("" : "+r"(policy), "+r"(q), "+r"(lane), "+r"(at));
		if (at >= TG_LANES * TG_MAX_SHAPES)
			break;
		if (!tg_rule_key(&q->parts, lane, policy->shapes[at], &key))
			continue;
		rule = bpf_map_lookup_elem(rules, &key);
		asm volatile("" : "+r"(policy), "+r"(at));
		best = &q->match[lane >> 1];
		if (rule && tg_better(rule->precedence, rule->rule, best)) {
			best->precedence = rule->precedence;
			best->rule = rule->rule;
			best->found = TG_FOUND;
			best->action = rule->action;
			best->log = rule->flags & TG_RULE_LOG;
			best->shape = policy->shapes[at];
		}
	}
	return 0;
}

tg_inline int tg_decides(const struct tg_match *match)
{
	return match->found == TG_FOUND && match->action != TG_ACTION_PASS;
}

/* The second verdict on what passes: would it, if policies in audit mode
 * counted? They are of the developer tier: what the Admin tier has decided is
 * out of their reach, and the Baseline tier out of sight where they isolate. */
tg_inline int tg_second(const struct tg_policy *policy, struct tg_question *q,
			struct tg_verdict *verdict)
{
	const struct tg_match *first = &q->match[0], *audit = &q->match[1];
	int developer = tg_decides(first) && first->precedence >= TG_DEVELOPER;

	if (tg_decides(first) && first->precedence >= TG_ADMIN)
		return 0;
	tg_probe(policy, q, TG_LANE_AUDIT);
	if (audit->found == TG_FOUND_NO_SET)
		return TG_DROP_NO_RULE_SET;
	if (audit->found && (!developer || tg_better(audit->precedence, audit->rule, first))) {
		verdict->audit = audit->action == TG_ACTION_DENY ? TG_DROP_POLICY_DENY : 0;
		verdict->audit_rule = audit->rule;
	} else if (!developer && policy->flags & TG_POLICY_AUDITED) {
		verdict->audit = TG_DROP_POLICY;
	}
	return 0;
}

/* The class of the peer's address; below 0: the trie is missing. */
tg_inline int tg_class(const struct tg_policy *policy, const struct tg_question *q)
{
	struct tg_prefix prefix = { .bits = 128 };
	__u32 slot = policy->slot;
	__u32 *found;
	void *trie;

	if (!(policy->flags & TG_POLICY_CIDR))
		return 0;
	trie = bpf_map_lookup_elem(&cidrs_v1, &slot);
	if (!trie)
		return -1;
	prefix.addr = q->addr;
	found = bpf_map_lookup_elem(trie, &prefix);
	return found ? *found : 0;
}

/* One direction of one endpoint's policy about one flow. */
tg_global int tg_policy_check(const struct tg_policy *policy, struct tg_question *q,
			      struct tg_verdict *verdict)
{
	struct tg_match *first;
	int class;

	if (!policy || !q || !verdict)
		return 0;
	verdict->reason = 0;
	verdict->rule = verdict->audit_rule = TG_RULE_NONE;
	verdict->rule_set = 0;
	verdict->shape = verdict->audit = verdict->log = verdict->pad = 0;
	if (!(policy->flags & TG_POLICY_RULES))
		return 0;
	verdict->rule_set = policy->rule_set;
	verdict->reason = TG_DROP_NO_RULE_SET;
	class = tg_class(policy, q);
	if (class < 0)
		return 0;
	tg_rule_parts(q, class);
	first = &q->match[0];
	tg_probe(policy, q, TG_LANE_MAIN);
	if (!tg_decides(first) && policy->counts[TG_LANE_BELOW])
		tg_probe(policy, q, TG_LANE_BELOW);
	if (first->found == TG_FOUND_NO_SET)
		return 0;
	if (tg_decides(first)) {
		verdict->rule = first->rule;
		verdict->shape = first->shape;
		verdict->log = first->log;
		verdict->reason = first->action == TG_ACTION_ALLOW ? 0 : TG_DROP_POLICY_DENY;
	} else {
		verdict->reason = policy->flags & TG_POLICY_ISOLATED ? TG_DROP_POLICY : 0;
	}
	if (!verdict->reason && policy->flags & TG_POLICY_AUDIT)
		verdict->reason = tg_second(policy, q, verdict);
	return 0;
}

#endif
