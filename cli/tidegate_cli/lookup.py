"""The second answer: a verdict looked up in the kernel's maps, as the programs look it up.

Shares no code with the loader's expansion of rules nor with the programs; written from
docs/architecture.md, "Verdict". May not live here: what a policy means, printing, writing a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tidegate_loader import addresses

from tidegate_cli.live import INDEX, Endpoint, NodeMaps, get

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
"""Names of the protocols that can be asked about → numbers."""
_WITH_PORTS = frozenset((6, 17, 132, 1, 58))
"""The port of ICMP is type << 8 | code."""

IDENTITY, CLASS, ANY, ENTITY = 0, 1, 2, 3
WORD_CLASS, WORD_ANY, WORD_ENTITY = 0x01000000, 0x02000000, 0x03000000
HAS_RULES, HAS_CIDR, ISOLATED, HAS_AUDIT, AUDITED = 1, 2, 4, 8, 16
MAIN, BELOW, AUDIT = 0, 1, 2
"""Lanes: rules that are ranked apart."""
MAX_SHAPES = 12
DEVELOPER, ADMIN = 1 << 30, 1 << 31
IDENTITY_MASK, LOCAL, NODE, OWN = 0x00FFFFFF, 0x01000000, 0x08000000, 0x10000000
ENTITY_OWN, ENTITY_NODE, ENTITY_API = 1, 2, 4
WORLD, KUBE_APISERVER = 2, 3
DENY, ALLOW, PASS = 0, 1, 2
POLICY, POLICY_DENY = 133, 181
"""Reasons of a denial: none allows, a rule denies."""
NONE, HOST, SELF = -1, -2, -3
"""enum tg_rule_special."""

Get = Callable[[bytes], bytes | None]


class Codec(Protocol):
    def pack(self, **fields: Any) -> bytes: ...
    def unpack(self, data: bytes) -> Any: ...


@dataclass(frozen=True)
class Question:
    """What one end's policy is asked. `address` 16 bytes, `port` the flow's destination port, of
    ICMP type << 8 | code; `entity`: what the address is as a node's."""

    address: bytes
    identity: int
    protocol: int
    port: int
    entity: int = 0


@dataclass(frozen=True)
class Look:
    """One end's answer. `rule` is an index into the RuleSet's spec.rules, or enum
    tg_rule_special; `rule_set` its id, 0 when no policy has a say; `key` and `value` are the
    deciding entry's bytes, absent at a default. `audit`: the reason of the denial if policies in
    audit mode counted, 0: none; `audit_rule` its rule."""

    allowed: bool
    rule_set: int
    rule: int
    slot: int = 0
    shape: int = 0
    key: bytes | None = None
    value: bytes | None = None
    missing: bool = False
    """The rule set is not where the node table says."""
    audit: int = 0
    audit_rule: int = NONE


@dataclass(frozen=True)
class Rules:
    """A rule set's maps: `entry` and `prefix` look up bytes in them."""

    entry: Get
    prefix: Get | None
    rule_key: Codec
    rule: Codec
    prefix_key: Codec


@dataclass(frozen=True)
class _Hit:
    """The entry of a lane that wins."""

    shape: int
    key: bytes
    value: bytes
    row: Any

    @property
    def decides(self) -> bool:
        return bool(self.row.action != PASS)

    @property
    def rank(self) -> tuple[int, int]:
        return self.row.precedence, -self.row.rule


def check(policy: Any, rules: Rules | None, question: Question) -> Look:
    """What a policy row and its maps say: every key shape of a lane is looked up, the highest
    precedence wins, among equals the lowest rule."""
    if not policy.flags & HAS_RULES:
        return Look(True, 0, NONE)
    if rules is None or (policy.flags & HAS_CIDR and rules.prefix is None):
        return Look(False, policy.rule_set, NONE, policy.slot, missing=True)
    number = _class(rules, question.address) if policy.flags & HAS_CIDR else 0
    hits = [_probe(policy, rules, lane, number, question) for lane in (MAIN, BELOW, AUDIT)]
    first = next((hit for hit in hits[:AUDIT] if hit is not None and hit.decides), None)
    if first is None:
        found = Look(not policy.flags & ISOLATED, policy.rule_set, NONE, policy.slot)
    else:
        allowed = first.row.action == ALLOW
        found = Look(
            allowed,
            policy.rule_set,
            first.row.rule,
            policy.slot,
            first.shape,
            first.key,
            first.value,
        )
    audit, rule = _second(policy, first, hits[AUDIT]) if found.allowed else (0, NONE)
    return replace(found, audit=audit, audit_rule=rule)


def _second(policy: Any, first: _Hit | None, audit: _Hit | None) -> tuple[int, int]:
    """(reason, rule) of the second verdict on what passes; 0: it passes there too."""
    precedence = first.row.precedence if first is not None else 0
    if precedence >= ADMIN:
        return 0, NONE
    developer = first if precedence >= DEVELOPER else None
    if audit is not None and (developer is None or audit.rank > developer.rank):
        return (POLICY_DENY if audit.row.action == DENY else 0), audit.row.rule
    return (POLICY if developer is None and policy.flags & AUDITED else 0), NONE


def _probe(policy: Any, rules: Rules, lane: int, number: int, question: Question) -> _Hit | None:
    best: _Hit | None = None
    for shape in policy.shapes[lane * MAX_SHAPES :][: policy.counts[lane]]:
        key = _key(rules, lane, shape, number, question)
        value = rules.entry(key) if key is not None else None
        if key is None or value is None:
            continue
        hit = _Hit(shape, key, value, rules.rule.unpack(value))
        if best is None or hit.rank > best.rank:
            best = hit
    return best


def _class(rules: Rules, address: bytes) -> int:
    value = rules.prefix(rules.prefix_key.pack(bits=128, addr=address)) if rules.prefix else None
    return 0 if value is None else int(INDEX.unpack(value)[0])


def _key(rules: Rules, lane: int, shape: int, number: int, question: Question) -> bytes | None:
    """The key of one shape; None: the shape cannot match this question."""
    kind, bits = shape >> 5, shape & 31
    if kind in (IDENTITY, CLASS) and not question.identity:
        return None
    if (kind == CLASS and not number) or (kind == ENTITY and not question.entity):
        return None
    if bits > 8 and question.protocol not in _WITH_PORTS:
        return None
    words = {
        IDENTITY: question.identity,
        CLASS: WORD_CLASS | number,
        ANY: WORD_ANY,
        ENTITY: WORD_ENTITY | question.entity,
    }
    length = max(bits - 8, 0)
    return rules.rule_key.pack(
        peer=words[kind],
        port=question.port >> (16 - length) << (16 - length),
        protocol=question.protocol if bits else 0,
        prefix=lane << 5 | bits,
    )


# ---- over a node's pinned maps ----------------------------------------------------


def rules_of(maps: NodeMaps, policy: Any) -> Rules | None:
    """The maps that a policy row leads to; None: the slot is empty."""
    opened = maps.rule_set(policy)
    if opened is None:
        return None
    trie = maps.cidrs(policy) if policy.flags & HAS_CIDR else None
    return Rules(
        entry=lambda key: get(opened, key),
        prefix=None if trie is None else lambda key: get(trie, key),
        rule_key=maps.layouts.rule_key,
        rule=maps.layouts.rule,
        prefix_key=maps.layouts.prefix,
    )


@dataclass(frozen=True)
class Known:
    """Who has an address; `node`: it is a node's, `own`: this node's."""

    identity: int
    endpoint: Endpoint | None = None
    node: bool = False
    own: bool = False

    def entity(self, direction: str) -> int:
        """What the address is as a node's, to a subject that is asked in one direction."""
        return (
            (ENTITY_OWN if self.own and direction == "egress" else 0)
            | (ENTITY_NODE if self.node else 0)
            | (ENTITY_API if self.identity == KUBE_APISERVER else 0)
        )


def who(maps: NodeMaps, address: bytes) -> Known:
    """Who has an address, as a program on this node finds it."""
    value = get(maps.map("ipcache_v1"), address)
    row = maps.layouts.ipcache.unpack(value) if value is not None else None
    if row is not None and row.proof == addresses.addr_proof(address):
        word = row.identity
    else:
        key = maps.layouts.prefix.pack(bits=128, addr=address)
        found = get(maps.map("ipcache_lpm_v1"), key)
        word = INDEX.unpack(found)[0] if found is not None else WORLD
    endpoint = maps.endpoint_at(address) if word & LOCAL else None
    identity = endpoint.row.identity if endpoint is not None else word & IDENTITY_MASK
    return Known(identity, endpoint, bool(word & NODE), bool(word & OWN))


def ask(
    maps: NodeMaps, subject: Endpoint, direction: str, peer: bytes, flow: tuple[int, int]
) -> Look:
    """What the policy of a local endpoint says; `flow` is (protocol, destination port)."""
    known = who(maps, peer)
    if known.endpoint is not None and known.endpoint.row.id == subject.row.id:
        return Look(True, 0, SELF)
    policy = getattr(subject.row, direction.lower())
    # Slot 0 of a row without rules is somebody else's.
    rules = rules_of(maps, policy) if policy.flags & HAS_RULES else None
    question = Question(peer, known.identity, *flow, known.entity(direction.lower()))
    return check(policy, rules, question)
