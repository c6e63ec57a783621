"""The second answer: a verdict looked up in the kernel's maps, as the programs look it up.

Shares no code with the loader's expansion of rules nor with the programs; written from
docs/architecture.md, "Verdict". May not live here: what a policy means, printing, writing a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate_loader import addresses

from tidegate_cli.live import INDEX, Endpoint, NodeMaps, get

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
"""Names of the protocols that can be asked about → numbers."""
_WITH_PORTS = frozenset((6, 17, 132))

IDENTITY, CLASS, ANY = 0, 1, 2
WORD_CLASS, WORD_ANY = 0x01000000, 0x02000000
ISOLATED, HAS_CIDR = 1, 2
IDENTITY_MASK, LOCAL = 0x00FFFFFF, 0x01000000
WORLD, ALLOW = 2, 1
NONE, HOST, SELF = -1, -2, -3
"""enum tg_rule_special."""

Get = Callable[[bytes], bytes | None]


class Codec(Protocol):
    def pack(self, **fields: Any) -> bytes: ...
    def unpack(self, data: bytes) -> Any: ...


@dataclass(frozen=True)
class Question:
    """What one end's policy is asked. `address` 16 bytes, `port` the flow's destination port."""

    address: bytes
    identity: int
    protocol: int
    port: int


@dataclass(frozen=True)
class Look:
    """One end's answer. `rule` is an index into the RuleSet's spec.rules, or enum
    tg_rule_special; `rule_set` its id, 0 when no policy selects the subject; `key` and `value`
    are the deciding entry's bytes, absent at a default."""

    allowed: bool
    rule_set: int
    rule: int
    slot: int = 0
    shape: int = 0
    key: bytes | None = None
    value: bytes | None = None
    missing: bool = False
    """The rule set is not where the node table says."""


@dataclass(frozen=True)
class Rules:
    """A rule set's maps: `entry` and `prefix` look up bytes in them."""

    entry: Get
    prefix: Get | None
    rule_key: Codec
    rule: Codec
    prefix_key: Codec


def check(policy: Any, rules: Rules | None, question: Question) -> Look:
    """What a policy row and its maps say: every key shape is looked up, the highest precedence
    wins, among equals the lowest rule."""
    if not policy.flags & ISOLATED:
        return Look(True, 0, NONE)
    if rules is None or (policy.flags & HAS_CIDR and rules.prefix is None):
        return Look(False, policy.rule_set, NONE, policy.slot, missing=True)
    number = _class(rules, question.address) if policy.flags & HAS_CIDR else 0
    best: Look | None = None
    rank = (-1, 0)
    for shape in policy.shapes[: policy.shape_count]:
        key = _key(rules, shape, number, question)
        value = rules.entry(key) if key is not None else None
        if value is None:
            continue
        row = rules.rule.unpack(value)
        if (row.precedence, -row.rule) > rank:
            rank = row.precedence, -row.rule
            allowed = row.action == ALLOW
            best = Look(allowed, policy.rule_set, row.rule, policy.slot, shape, key, value)
    return best or Look(False, policy.rule_set, NONE, policy.slot)


def _class(rules: Rules, address: bytes) -> int:
    value = rules.prefix(rules.prefix_key.pack(bits=128, addr=address)) if rules.prefix else None
    return 0 if value is None else int(INDEX.unpack(value)[0])


def _key(rules: Rules, shape: int, number: int, question: Question) -> bytes | None:
    """The key of one shape; None: the shape cannot match this question."""
    kind, bits = shape >> 5, shape & 31
    if kind != ANY and (not question.identity or (kind == CLASS and not number)):
        return None
    if bits > 8 and question.protocol not in _WITH_PORTS:
        return None
    words = {IDENTITY: question.identity, CLASS: WORD_CLASS | number, ANY: WORD_ANY}
    length = max(bits - 8, 0)
    return rules.rule_key.pack(
        peer=words[kind],
        port=question.port >> (16 - length) << (16 - length),
        protocol=question.protocol if bits else 0,
        prefix=bits,
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


def who(maps: NodeMaps, address: bytes) -> tuple[int, Endpoint | None]:
    """(identity, the local endpoint) of an address, as a program on this node finds them."""
    word = WORLD
    value = get(maps.map("ipcache_v1"), address)
    row = maps.layouts.ipcache.unpack(value) if value is not None else None
    if row is not None and row.proof == addresses.addr_proof(address):
        word = row.identity
    else:
        key = maps.layouts.prefix.pack(bits=128, addr=address)
        found = get(maps.map("ipcache_lpm_v1"), key)
        word = INDEX.unpack(found)[0] if found is not None else WORLD
    endpoint = maps.endpoint_at(address) if word & LOCAL else None
    if endpoint is not None:
        return endpoint.row.identity, endpoint
    return word & IDENTITY_MASK, None


def ask(
    maps: NodeMaps, subject: Endpoint, direction: str, peer: bytes, flow: tuple[int, int]
) -> Look:
    """What the policy of a local endpoint says; `flow` is (protocol, destination port)."""
    identity, other = who(maps, peer)
    if other is not None and other.row.id == subject.row.id:
        return Look(True, 0, SELF)
    policy = getattr(subject.row, direction.lower())
    # Slot 0 of a row that isolates nobody is somebody else's.
    rules = rules_of(maps, policy) if policy.flags & ISOLATED else None
    return check(policy, rules, Question(peer, identity, *flow))
