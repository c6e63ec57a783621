/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every struct that the kernel's maps hold, defined once.
 *
 * Python binds to these layouts through the object's BTF: it names fields and
 * takes offsets and widths from here. __be16 and __be32 are network byte
 * order, every other integer is the machine's own.
 *
 * Addresses are always 128 bits; IPv4 is the mapped form ::ffff:a.b.c.d, so
 * that each table, key and lookup exists once for both families.
 *
 * Invariant (docs/architecture.md, "Torn reads"): HASH elements are recycled
 * under their readers. A value that decides a verdict is either immutable
 * (inner maps), or one eight-byte word that proves its own key.
 */
#ifndef TIDEGATE_TYPES_H
#define TIDEGATE_TYPES_H

#include <linux/types.h>

struct tg_addr {
	__be32 w[4];
};

/* Two checks of one fact: sizes here, fields again where Python binds. */
#define TG_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type)

/* ---- node table: ARRAY_OF_MAPS[0] -> immutable HASH -------------------- */

enum tg_node_kind {
	TG_NODE_IFINDEX = 1, /* key.addr.w[0] is the host-side ifindex */
	TG_NODE_ADDR = 2,    /* key.addr is an address of a local endpoint */
};

struct tg_node_key {
	__u32 kind;
	struct tg_addr addr;
};
TG_SIZE(struct tg_node_key, 20);

/* A key shape is which part of (peer, protocol, port) a rule names:
 * peer kind << 5 | prefix bits of (protocol, port): 0 any, 8 a protocol,
 * 8 + n a protocol and the first n bits of the port. The port of ICMP is
 * type << 8 | code. */
enum tg_peer_kind {
	TG_PEER_IDENTITY = 0,
	TG_PEER_CLASS = 1,
	TG_PEER_ANY = 2,
	TG_PEER_ENTITY = 3,
};

/* Rules that are ranked apart. One lane is enough, and the only one probed,
 * unless a rule of the Admin tier passes on or a policy is in audit mode. */
enum tg_lane {
	TG_LANE_MAIN = 0,  /* all that count; beside TG_LANE_BELOW: the Admin tier */
	TG_LANE_BELOW = 1, /* asked where the Admin tier passes on or says nothing */
	TG_LANE_AUDIT = 2, /* of policies in audit mode: of the second verdict only */
	TG_LANES = 3,
};

/* A tier is read from a rule's precedence: Baseline, developer, Admin. */
#define TG_DEVELOPER (1u << 30)
#define TG_ADMIN (1u << 31)

enum tg_limits {
	TG_MAX_SHAPES = 12, /* a lane */
	TG_MAX_ENDPOINTS = 1024, /* half-open shares a node */
	TG_MAX_RULE_SETS = 4096, /* rule sets in force at once, a node */
	TG_MAX_EXT_HEADERS = 6,  /* IPv6 extension headers walked */
	TG_MAX_STREAMS = 65536,  /* TCP sockets whose frontend is known; a power of two */
	TG_MAX_PROCESSES = 1024, /* sockets whose process is known; a power of two */
};

enum tg_policy_flags {
	TG_POLICY_RULES = 1,     /* there is a rule set; none: everything passes */
	TG_POLICY_CIDR = 2,      /* the rule set has an LPM trie of classes */
	TG_POLICY_ISOLATED = 4,  /* what no rule decides is denied, else it passes */
	TG_POLICY_AUDIT = 8,     /* what passes has a second verdict */
	TG_POLICY_AUDITED = 16,  /* a policy in audit mode isolates: the second denies */
};

/* One direction of one endpoint's policy. */
struct tg_policy {
	__u32 slot;     /* index into rule_sets and cidrs; reused after a switch */
	__u32 rule_set; /* id; never reused while the pins live */
	__u8 flags;     /* enum tg_policy_flags */
	__u8 counts[TG_LANES]; /* shapes in use, of each lane */
	__u8 shapes[TG_LANES * TG_MAX_SHAPES];
};
TG_SIZE(struct tg_policy, 48);

struct tg_endpoint {
	__u32 id; /* never reused while the pins live */
	__u32 identity;
	__u32 ifindex;   /* host side of the pod's veth pair */
	__u32 half_open; /* slot of its share in half_open */
	__u8 pod_mac[6];
	__u8 host_mac[6];
	__u32 flags;
	struct tg_addr ip4; /* all zero: none */
	struct tg_addr ip6;
	struct tg_policy ingress;
	struct tg_policy egress;
};
TG_SIZE(struct tg_endpoint, 160);

/* ---- rule sets: ARRAY_OF_MAPS[slot] -> immutable HASH ------------------ */

/* The peer word: an identity (24 bits), a CIDR class, any, or what a node's
 * address is (enum tg_entity). */
enum tg_peer_word {
	TG_PEER_WORD_CLASS = 0x01000000,
	TG_PEER_WORD_ANY = 0x02000000,
	TG_PEER_WORD_ENTITY = 0x03000000,
};

enum tg_entity {
	TG_ENTITY_OWN = 1,  /* an address of this node; of who is sent to only */
	TG_ENTITY_NODE = 2, /* of a node, this one or another */
	TG_ENTITY_API = 4,  /* the API is served there */
};

struct tg_rule_key {
	__u32 peer;
	__be16 port;    /* masked to the shape's prefix */
	__u8 protocol;  /* 0 where the shape names none */
	__u8 prefix;    /* lane << 5 | the shape's prefix bits: 0, 8 or 8 + n */
};
TG_SIZE(struct tg_rule_key, 8);

enum tg_action {
	TG_ACTION_DENY = 0,
	TG_ACTION_ALLOW = 1,
	TG_ACTION_PASS = 2, /* the rest of the rule's tier is skipped */
};

enum tg_rule_flags {
	TG_RULE_LOG = 1, /* a flow that it lets pass is reported */
};

/* The highest precedence wins; among equals the lowest rule, so that the
 * rule a verdict names never depends on the order of look-ups. */
struct tg_rule {
	__u32 precedence;
	__u32 rule; /* index into the RuleSet's spec.rules */
	__u32 action;
	__u32 flags; /* enum tg_rule_flags */
};
TG_SIZE(struct tg_rule, 16);

struct tg_prefix {
	__u32 bits; /* of 128: an IPv4 /24 is 120 */
	struct tg_addr addr;
};
TG_SIZE(struct tg_prefix, 20);

/* ---- ipcache ------------------------------------------------------------ */

enum tg_identity {
	TG_ID_UNKNOWN = 0,
	TG_ID_HOST = 1,
	TG_ID_WORLD = 2,
	TG_ID_KUBE_APISERVER = 3,
	TG_ID_REMOTE_NODE = 4,
	TG_ID_HEALTH = 5,
	TG_ID_MASK = 0x00ffffff,
};

enum tg_ipcache_flags {
	TG_IPCACHE_LOCAL = 0x01000000,    /* may be a local endpoint: ask the node table */
	TG_IPCACHE_FRONTEND = 0x02000000, /* a service has a frontend on this address */
	TG_IPCACHE_PEER = 0x04000000,     /* a pod or node has this address */
	TG_IPCACHE_NODE = 0x08000000,     /* a node has it */
	TG_IPCACHE_OWN = 0x10000000,      /* this node has it */
};

/* Read as one word. proof = tg_addr_proof(key). */
struct tg_ipcache {
	__u32 proof;
	__u32 identity; /* low 24 bits; above them enum tg_ipcache_flags */
} __attribute__((aligned(8)));
TG_SIZE(struct tg_ipcache, 8);

/* ---- services ------------------------------------------------------------ */

struct tg_frontend_key {
	struct tg_addr addr;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};
TG_SIZE(struct tg_frontend_key, 20);

/* Read as one word: slots[base .. base + count) hold the backends' ids, sorted
 * but for a ring's. proof = low 16 bits of tg_frontend_proof(key). */
struct tg_frontend {
	__u32 base;  /* low 24 bits; above them enum tg_frontend_flags */
	__u16 count; /* 0: the service has no ready backend */
	__u16 proof;
} __attribute__((aligned(8)));
TG_SIZE(struct tg_frontend, 8);

/* A frontend that asks for more than one of its backends has TG_SLOT_HEADER slots
 * before them, enum tg_slot_header, and what clients from outside get behind them. */
enum tg_frontend_flags {
	TG_FRONTEND_AFFINITY = 0x01,       /* a client keeps its backend */
	TG_FRONTEND_RANGES = 0x02,         /* clients from outside must be in source_ranges */
	TG_FRONTEND_OUTSIDE = 0x04,        /* clients outside the cluster may use it */
	TG_FRONTEND_LOCAL = 0x08,          /* those get this node's backends only */
	TG_FRONTEND_INTERNAL_LOCAL = 0x10, /* so do all others */
	TG_FRONTEND_TWO = 0x20,            /* those from outside have a list of their own */
	TG_FRONTEND_RING = 0x40,           /* the slots are a Maglev ring */
	TG_FRONTEND_HEADER = 0x80,
};

enum tg_frontend_base {
	TG_FRONTEND_SLOT = 0x00ffffff,
	TG_FRONTEND_FLAGS = 24, /* how far to shift */
};

enum tg_slot_header {
	TG_SLOT_SERVICE = 0,  /* number of the service port, for affinity and source_ranges */
	TG_SLOT_AFFINITY = 1, /* seconds */
	TG_SLOT_OUTSIDE = 2,  /* slots of the second list, with TG_FRONTEND_TWO */
	TG_SLOT_ELSEWHERE = 3, /* whether there are backends at all */
	TG_SLOT_HEADER = 4,
};

/* Written only while no slot names its id; ids rest before reuse. */
struct tg_backend {
	struct tg_addr addr;
	__be16 port;
	__u8 protocol;
	__u8 state;     /* enum tg_backend_state */
	__u32 freed_at; /* CLOCK_MONOTONIC seconds since which the id rests */
};
TG_SIZE(struct tg_backend, 24);

enum tg_backend_state {
	TG_BACKEND_FREE = 0,
	TG_BACKEND_ACTIVE = 1,
};

/* Which clients of a service come from where; in an LPM trie. */
struct tg_range {
	__u32 bits; /* 32 + those of 128 */
	__be32 service;
	struct tg_addr addr;
};
TG_SIZE(struct tg_range, 24);

struct tg_affinity_key {
	struct tg_addr client; /* of a socket: its network namespace's cookie */
	__u32 service;
	__u32 outside; /* the other list has other backends */
};
TG_SIZE(struct tg_affinity_key, 24);

/* One word: backend id, proof of the key, when it was last asked for. */
enum tg_affinity_word {
	TG_AFFINITY_PROOF = 24, /* bits; as many for the id */
	TG_AFFINITY_SEEN = 48,
	TG_AFFINITY_UNIT = 2,   /* 4 s: 16 bits are three days */
};

/* What was asked of one frontend, on one CPU. Made when it is first asked. */
struct tg_service_count {
	__u64 connections; /* flows and sockets that got a backend */
	__u64 refused;     /* those for which there was none */
};
TG_SIZE(struct tg_service_count, 16);

/* ---- translation at the uplink --------------------------------------------- */

/* A packet as it comes in. */
struct tg_nat_key {
	struct tg_addr src;
	struct tg_addr dst;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 pad[3];
};
TG_SIZE(struct tg_nat_key, 40);

enum tg_nat_word {
	TG_NAT_PROOF_BITS = 40, /* word = when it was made << 40 | 40 bits of the key's hash */
};

/* What becomes of it. The entry of the other direction has the same turned round:
 * its key is (dst, src) here. Never changed but for `seen` and `flags`. */
struct tg_nat {
	__u64 word;
	__u32 seen;
	__u32 flags; /* enum tg_ct_flags: TG_CT_REPLIED, _FIN_*, _RST; enum tg_nat_flags */
	struct tg_addr src;
	struct tg_addr dst;
	__be16 sport;
	__be16 dport;
	__u32 backend; /* id */
};
TG_SIZE(struct tg_nat, 56);

enum tg_nat_flags {
	TG_NAT_REPLY = 0x10000,  /* the entry is of the direction from the backend */
	TG_NAT_HOST = 0x20000,   /* the backend is this node itself: its source is kept */
	TG_NAT_MASQUERADE = 0x40000, /* a pod's flow that leaves with the node's address */
	TG_NAT_DSR = 0x80000,    /* the backend's node answers: the source is kept */
};

/* An address of this node. Its proof says that it is not torn. */
struct tg_node_addr {
	struct tg_addr addr;
	__u32 proof; /* tg_addr_proof(addr) */
	__u32 pad;
};
TG_SIZE(struct tg_node_addr, 24);

/* ---- conntrack ------------------------------------------------------------ */

/* Both directions of a flow have one key: (a, aport) is the smaller end.
 * Which end began is in the value. ICMP echo: the end that asked has the
 * identifier as its port, the other 0. */
struct tg_ct_key {
	struct tg_addr a;
	struct tg_addr b;
	__be16 aport;
	__be16 bport;
	__u8 protocol;
	__u8 pad[3];
};
TG_SIZE(struct tg_ct_key, 40);

enum tg_ct_flags {
	TG_CT_BEGAN_A = 0x01,   /* end a began the flow (else end b) */
	TG_CT_REPLIED = 0x02,   /* a reply was seen: the flow is established */
	TG_CT_FIN_ORIG = 0x04,
	TG_CT_FIN_REPLY = 0x08,
	TG_CT_RST = 0x10,
	TG_CT_NAT = 0x20,       /* nat_* is the frontend the client asked for */
	TG_CT_SERVICE = 0x40,   /* client -> frontend; nat_* is the backend chosen */
	TG_CT_HAIRPIN = 0x80,   /* client and backend are one pod */
	TG_CT_UPLINK = 0x100,   /* translated at an uplink: replies leave by to_src.ifindex */
};

/* Where to hand a packet that is bound for a local endpoint. */
struct tg_forward {
	__u32 ifindex; /* 0: not local, pass to the stack */
	__u8 pod_mac[6];
	__u8 host_mac[6];
};
TG_SIZE(struct tg_forward, 16);

enum tg_ct_word {
	TG_CT_PROOF_BITS = 24, /* word = epoch << 24 | 24 bits of the flow's hash */
};

/* Words that no flow has: a free way, and one that is being written. */
#define TG_CT_FREE 0ull
#define TG_CT_BUSY (1ull << 63)

struct tg_ct {
	__u64 word;  /* policy epoch and proof of the key, in one word */
	__u32 seen;  /* last packet: coarse CLOCK_MONOTONIC nanoseconds >> 30 */
	__u32 flags; /* enum tg_ct_flags */
	struct tg_addr nat_addr;
	__u32 src_endpoint; /* ids of the local ends; 0: not local */
	__u32 dst_endpoint;
	__u32 src_rule; /* rule that allowed it at either end; enum tg_rule_special */
	__u32 dst_rule;
	struct tg_forward to_dst;
	struct tg_forward to_src;
	__u32 backend; /* id, with TG_CT_NAT or TG_CT_SERVICE */
	__be16 nat_port;
	__u8 handshake;  /* from its first packet to the first answer, as tg_latency has it; 0: unknown */
	__u8 first_byte; /* to the first byte of TCP that came back */
	__u64 start; /* CLOCK_MONOTONIC, nanoseconds; 0: it is not told of */
	/* As its originator sent it, and what came back; GSO segments each. Not
	 * atomic: two CPUs that carry one direction at once may lose a packet. */
	__u64 packets;
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
};
TG_SIZE(struct tg_ct, 128);

struct tg_half_open {
	struct tg_ct_key key;
	struct tg_ct ct; /* its word says whether key and fields are there */
};
TG_SIZE(struct tg_half_open, 168);

enum tg_half_open_size {
	TG_HALF_OPEN_WAYS = 4,
	TG_HALF_OPEN_SETS = 256, /* a flow's set: the bits of its hash that are not its proof's */
};

struct tg_half_open_set {
	struct tg_half_open way[TG_HALF_OPEN_WAYS];
};
TG_SIZE(struct tg_half_open_set, 672);

enum tg_rule_special {
	TG_RULE_NONE = -1,      /* no policy selects the subject, or default deny */
	TG_RULE_HOST = -2,      /* generated on this node (kubelet probes) */
	TG_RULE_SELF = -3,      /* a pod reaching itself */
};

struct tg_frag_key {
	struct tg_addr src;
	struct tg_addr dst;
	__u32 id; /* as on the wire */
	__u8 protocol;
	__u8 pad[3];
};
TG_SIZE(struct tg_frag_key, 40);

struct tg_frag {
	__be16 sport;
	__be16 dport;
	__u32 proof;
} __attribute__((aligned(8)));
TG_SIZE(struct tg_frag, 8);

/* ---- socket load balancing -------------------------------------------------- */

/* A socket that sends datagrams has an entry of each for what it asked: by the
 * backend for answers, by the frontend for what it sends next. */
struct tg_sock_key {
	__u64 cookie;
	struct tg_addr addr; /* the backend; or the frontend */
	__be16 port;
	__u8 pad[6];
};
TG_SIZE(struct tg_sock_key, 32);

struct tg_sock {
	__u64 cookie; /* proves the key */
	struct tg_addr addr; /* the frontend that was asked for; or the backend */
	__be16 port;
	__u16 pad;
	__u32 backend; /* id; by the backend only of a connected socket, else 0 */
};
TG_SIZE(struct tg_sock, 32);

/* What a TCP socket was translated to; its place is its cookie's low bits. */
struct tg_stream {
	__u64 cookie; /* says whose the rest is; TG_STREAM_BUSY while it is written */
	struct tg_addr backend;
	struct tg_addr frontend; /* that was asked for */
	__be16 backend_port;
	__be16 frontend_port;
	__u32 pad;
};
TG_SIZE(struct tg_stream, 48);

#define TG_STREAM_BUSY (~0ull)

/* Who connected or sent through a socket; its place is its cookie's low bits. */
struct tg_process {
	__u64 word;    /* enum tg_process_word; TG_PROCESS_BUSY while the name is written */
	char name[16]; /* of the thread; ends at a zero */
};
TG_SIZE(struct tg_process, 24);

/* cookie's low half << TG_PROCESS_COOKIE | process */
enum tg_process_word {
	TG_PROCESS_COOKIE = 32,
};

#define TG_PROCESS_BUSY (~0ull)

/* ---- control, counters, events ------------------------------------------------ */

struct tg_control {
	__u64 epoch;   /* bumped after maps have changed; programs only read it */
	__u64 next_id; /* the loader's; endpoint and rule-set ids, never reused */
};
TG_SIZE(struct tg_control, 16);

enum tg_direction {
	TG_INGRESS = 0, /* into the pod */
	TG_EGRESS = 1,  /* out of the pod */
};

/* Where another system has a number for the same thing, it is that number
 * (docs/drop-reasons.md). Counter index = reason * 2 + direction. */
enum tg_reason {
	TG_FORWARDED = 0,
	TG_DROP_INVALID_SOURCE = 132,
	TG_DROP_POLICY = 133,
	TG_DROP_INVALID = 134,
	TG_DROP_TRUNCATED = 135,
	TG_DROP_ETHERTYPE = 140,
	TG_DROP_REWRITE = 142,
	TG_DROP_CT_INSERT = 155,
	TG_DROP_EXT_HEADER = 156,
	TG_DROP_NO_BACKEND = 158,
	TG_DROP_NO_ROUTE = 169,
	TG_DROP_SOURCE_RANGE = 177,
	TG_DROP_POLICY_DENY = 181,
	TG_DROP_TTL = 196,
	TG_DROP_PENDING = 203,
	TG_DROP_VLAN = 220,
	TG_DROP_ND = 221,
	TG_DROP_NO_RULE_SET = 222,
	TG_DROP_FRAGMENT = 223,
	TG_DROP_ICMP_ERROR = 224,
	TG_DROP_SCTP_PORT = 225,
	TG_DROP_SOURCE_ROUTE = 226,
	TG_DROP_NO_NODE_TABLE = 227,
	TG_DROP_L2_SENDER = 228,
	TG_DROP_NAT_FULL = 229,
	TG_REASON_NAT_LOST = 230,  /* counted, not a drop */
	TG_REASON_MASQUERADED = 231, /* counted, not a drop */
	TG_REASON_EVENT_LIMITED = 252, /* counted, not a drop: an event that its kind had too many of */
	TG_REASON_AUDIT = 253,      /* counted, not a drop: a policy in audit mode denies it */
	TG_REASON_EVENT_LOST = 254, /* counted, not a drop */
	TG_REASON_MAX = 256,
};

struct tg_counter {
	__u64 packets;
	__u64 bytes;
};
TG_SIZE(struct tg_counter, 16);

enum tg_event_flags {
	TG_EVENT_AUDIT = 1, /* it passed: `reason` and `rule` are the second verdict's */
	TG_EVENT_LOG = 2,   /* it passed, by a rule that asks for a report */
};

/* One denial, or what enum tg_event_flags says. Fixed size; the ring buffer's
 * records never split. */
struct tg_event {
	__u64 time; /* CLOCK_MONOTONIC, coarse, nanoseconds */
	__u32 ifindex;
	__u32 socket; /* low bits of the cookie of the socket that sent it; 0: unknown */
	struct tg_addr src;
	struct tg_addr dst;
	__be16 sport;
	__be16 dport;
	__u8 protocol;
	__u8 reason;
	__u8 direction;
	__u8 tcp_flags;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 endpoint; /* the subject whose policy decided */
	__u32 rule_set;
	__u32 rule;
	__u32 flags; /* enum tg_event_flags */
};
TG_SIZE(struct tg_event, 80);

/* What denials have in common that are counted together: the rule, both ends by
 * identity, the subject, and `what`: reason | direction << 8 | flags << 16. No
 * port and no address: whoever sends would choose how many kinds there are. */
struct tg_denial_kind {
	__u32 rule_set;
	__u32 rule;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 endpoint;
	__u32 what;
};
TG_SIZE(struct tg_denial_kind, 24);

/* One kind's allowance of events, and how many it went without. */
struct tg_limit {
	__u64 serial; /* counts the kinds that had this place; odd: being written; 0: none yet */
	struct tg_denial_kind kind;
	__u64 until;      /* coarse CLOCK_MONOTONIC ns: an event may be sent while this is near */
	__u64 suppressed; /* of this kind, since it has the place */
};
TG_SIZE(struct tg_limit, 48);

enum tg_limit_size {
	TG_LIMIT_WAYS = 4,
	TG_LIMIT_SETS = 512,
};

struct tg_limit_set {
	struct tg_limit way[TG_LIMIT_WAYS];
};
TG_SIZE(struct tg_limit_set, 192);

/* The reader's: how much of `suppressed` it has told. The programs do not look. */
struct tg_limit_said {
	__u64 serial;
	__u64 said;
};
TG_SIZE(struct tg_limit_said, 16);

/* Which packets are told of one by one. All zero: none. */
struct tg_trace_filter {
	__u64 until; /* CLOCK_MONOTONIC, nanoseconds: for no longer; 0: nothing is traced */
	struct tg_addr ip4;     /* one end has one of the two; both all zero: whatever they have */
	struct tg_addr ip6;
	__u32 identity;         /* one end has it; 0: whatever they have */
	__be16 port;            /* one end has it; 0 */
	__u8 protocol;          /* 0: any */
	__u8 pad;
};
TG_SIZE(struct tg_trace_filter, 48);

/* Where a packet was seen: numbers that people know as sub types of a trace. */
enum tg_trace_point {
	TG_TO_ENDPOINT = 0,
	TG_TO_STACK = 3,
	TG_FROM_ENDPOINT = 5,
	TG_FROM_NETWORK = 10,
	TG_TO_NETWORK = 11,
};

enum tg_trace_how {
	TG_HOW_UNSAID = 0, /* it was seen before anybody asked */
	TG_HOW_NEW = 1,
	TG_HOW_ESTABLISHED = 2,
	TG_HOW_REPLY = 3, /* against the way the flow began */
};

/* A packet, as it was there. */
struct tg_trace {
	__u64 time; /* CLOCK_MONOTONIC, nanoseconds */
	struct tg_addr src;
	struct tg_addr dst;
	__be16 sport; /* of ICMP: type << 8 | code */
	__be16 dport;
	__u8 protocol;
	__u8 point; /* enum tg_trace_point */
	__u8 how;   /* enum tg_trace_how */
	__u8 tcp_flags;
	__u32 ifindex;
	__u32 length;
};
TG_SIZE(struct tg_trace, 56);

enum tg_flow_kind {
	TG_FLOW_START = 0, /* it was judged and let through */
	TG_FLOW_END = 1,   /* both ends have closed it, or one has reset it */
};

#define TG_IDENTITY_UNSAID 0xffffffff

/* The start or the end of a flow. Source and destination are those of its first
 * packet, after translation to a backend. */
struct tg_flow_event {
	__u64 time;   /* CLOCK_MONOTONIC, nanoseconds: of a start `start`, of an end coarse */
	__u64 start;  /* not coarse; with the ports it names the flow */
	__u64 cookie; /* of this node's socket that began it, and its cgroup; 0: none, or an end */
	__u64 cgroup;
	__u64 packets; /* as in struct tg_ct */
	__u64 bytes;
	__u64 reply_packets;
	__u64 reply_bytes;
	struct tg_addr src;
	struct tg_addr dst;
	struct tg_addr frontend; /* that the client asked for; all zero: the destination itself */
	__be16 sport;
	__be16 dport;
	__be16 frontend_port;
	__u8 protocol;
	__u8 kind;      /* enum tg_flow_kind */
	__u8 direction; /* of the pod that began it, or, where that is not here, was sent to */
	__u8 tcp_flags; /* of the packet that began or ended it */
	__u8 handshake; /* as in struct tg_ct */
	__u8 first_byte;
	__u32 ifindex;
	__u32 src_identity; /* TG_IDENTITY_UNSAID in an end */
	__u32 dst_identity;
	__u32 src_endpoint; /* 0: not local */
	__u32 dst_endpoint;
	__u32 src_rule_set; /* 0: no policy, or an end */
	__u32 src_rule;
	__u32 dst_rule_set;
	__u32 dst_rule;
};
TG_SIZE(struct tg_flow_event, 160);

#endif
