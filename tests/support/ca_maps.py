"""What the maps of one node really hold, read as docs/architecture.md says they mean.

The opinion beside the program's: look-ups are scans over what was decoded, nothing is taken from
the loader, and key shapes are not used to find a rule (`problems` checks that they would). Bytes
are decoded by codecs bound to the object's BTF.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from support.lab import BUILD, addr, addr_proof, frontend_proof
from tidegate_bpf import Codec, Map, ObjectFile

IFINDEX, ADDR = 1, 2
HAS_RULES, HAS_CIDR, ISOLATED, HAS_AUDIT, AUDITED = 1, 2, 4, 8, 16
LANES, SHAPES = 3, 12
LOCAL, FRONTEND, PEER, NODE, OWN = (1 << n for n in range(24, 29))
ID_MASK = 0x00FFFFFF
WORLD = 2
API = 3
CLASS_WORD, ANY_WORD, ENTITY_WORD = 0x01000000, 0x02000000, 0x03000000
DENY, ALLOW, PASS = 0, 1, 2
DEVELOPER, ADMIN = 1 << 30, 1 << 31
POLICY, POLICY_DENY = 133, 181
NONE, HOST, SELF = -1, -2, -3
NOT_ASKED = (0, 0)
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
U32 = struct.Struct("=I")

Prefix = tuple[int, int]
"""(bits of 128, address as an integer)"""


@functools.cache
def codec(name: str) -> Codec:
    return Codec(_object().layout(name))


@functools.cache
def _object() -> ObjectFile:
    return ObjectFile(BUILD / "pod.o")


class Answer(NamedTuple):
    """`egress`, `ingress`: (rule-set id, rule); NOT_ASKED where no policy was. `audits`: the
    reasons of the second verdict's denials, in that order; `audit_rule`: the first one's rule."""

    allowed: bool
    egress: tuple[int, int]
    ingress: tuple[int, int]
    audits: tuple[int, int] = (0, 0)
    audit_rule: int = NONE


class Side(NamedTuple):
    """What one end's policy says: (rule-set id, rule), and the second verdict (reason, rule)."""

    allowed: bool
    by: tuple[int, int] = NOT_ASKED
    audit: tuple[int, int] = (0, NONE)


class Who(NamedTuple):
    """Who has an address: identity, the endpoint if it is local, the bits above the identity."""

    identity: int
    endpoint: Any = None
    flags: int = 0


def answer(egress: Side | None, ingress: Side | None) -> Answer:
    """None: not asked."""
    out, into = egress or Side(True), ingress or Side(True)
    first = out if out.audit[0] else into
    return Answer(
        out.allowed and into.allowed,
        out.by,
        into.by,
        (out.audit[0], into.audit[0]),
        first.audit[1],
    )


@dataclass
class NodeMaps:
    """Decoded maps of one node."""

    epoch: int = 0
    node: dict[tuple[int, bytes], Any] = field(default_factory=dict)
    rule_sets: dict[int, dict[Any, Any]] = field(default_factory=dict)
    """Slot -> {tg_rule_key: tg_rule}, of the slots that the node table names."""
    cidrs: dict[int, dict[Prefix, int]] = field(default_factory=dict)
    ipcache: dict[bytes, int] = field(default_factory=dict)
    networks: dict[Prefix, int] = field(default_factory=dict)
    frontends: dict[tuple[bytes, int, int], list[tuple[bytes, int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What no state of the maps may show."""

    def content(self) -> dict[str, Any]:
        """What is enforced, without what may differ between two nodes that enforce the same:
        ids, slots and the epoch."""
        return {
            "endpoints": {
                key: row._replace(
                    id=0,
                    half_open=0,
                    ingress=self.rules_of(row.ingress),
                    egress=self.rules_of(row.egress),
                )
                for key, row in self.node.items()
            },
            "ipcache": self.ipcache,
            "networks": self.networks,
            "frontends": self.frontends,
        }

    def rules_of(self, policy: Any) -> Any:
        """What one direction of an endpoint enforces; None: everything passes."""
        if not policy.flags:
            return None
        shapes = [lane_shapes(policy, lane) for lane in range(LANES)]
        return policy.flags, shapes, self.rule_sets[policy.slot], self.cidrs.get(policy.slot)

    # ---- questions ----------------------------------------------------------------

    def from_pod(self, ifindex: int, dst: str, port: int | None, protocol: str) -> Answer:
        """The pod at `ifindex` opens a flow to an address."""
        me = self.node[IFINDEX, U32.pack(ifindex) + bytes(12)]
        peer = self._who(addr(dst))
        if peer.endpoint is not None and peer.endpoint.id == me.id:
            return Answer(True, (0, SELF), (0, SELF))
        flow = (NUMBERS[protocol], port)
        out = self._ask(me.egress, peer, addr(dst), flow, OWN | NODE)
        if not out.allowed or peer.endpoint is None:
            return answer(out, None)
        mine = me.ip6 if ":" in dst else me.ip4
        return answer(out, self._ask(peer.endpoint.ingress, Who(me.identity), mine, flow))

    def to_pod(
        self, ifindex: int, src: str, port: int | None, protocol: str, *, host: bool = False
    ) -> Answer:
        """A flow from an address arrives at the pod; `host`: generated on this node."""
        me = self.node[IFINDEX, U32.pack(ifindex) + bytes(12)]
        if host:
            return Answer(True, NOT_ASKED, (0, HOST))
        flow = (NUMBERS[protocol], port)
        peer = self._who(addr(src))
        out = None
        if peer.endpoint is not None:
            mine = me.ip6 if ":" in src else me.ip4
            out = self._ask(peer.endpoint.egress, Who(me.identity), mine, flow)
            if not out.allowed:
                return answer(out, None)
        return answer(out, self._ask(me.ingress, peer, addr(src), flow, NODE))

    def _who(self, address: bytes) -> Who:
        word = self.ipcache.get(address)
        local = self.node.get((ADDR, address))
        if local is not None:
            return Who(local.identity, local, word or 0)
        if word is not None:
            return Who(word & ID_MASK, None, word)
        return Who(_longest(self.networks, address, WORLD))

    def _ask(
        self,
        policy: Any,
        peer: Who,
        address: bytes,
        flow: tuple[int, int | None],
        node_flags: int = 0,
    ) -> Side:
        """Every entry that matches, lane by lane; highest precedence, then lowest rule.
        `node_flags`: those that say what a node's address is here."""
        if not policy.flags & HAS_RULES:
            return Side(True, (0, NONE))
        words = self._words(policy, peer, address, node_flags)
        lanes: list[list[tuple[int, int, int]]] = [[] for _ in range(LANES)]
        for key, rule in self.rule_sets[policy.slot].items():
            if key.peer in words and _port_matches(key, flow[1], flow[0]):
                lanes[key.prefix >> 5].append((-rule.precedence, rule.rule, rule.action))
        best = [min(lane, default=None) for lane in lanes]
        by = next((hit for hit in best[:2] if hit is not None and hit[2] != PASS), None)
        allowed = by[2] == ALLOW if by is not None else not policy.flags & ISOLATED
        decided = policy.rule_set, NONE if by is None else by[1]
        return Side(allowed, decided, _second(policy, by, best[2]) if allowed else (0, NONE))

    def _words(self, policy: Any, peer: Who, address: bytes, node_flags: int) -> set[int]:
        words = {ANY_WORD}
        if peer.identity:
            words.add(peer.identity)
            if policy.flags & HAS_CIDR:
                number = _longest(self.cidrs[policy.slot], address, 0)
                words |= {CLASS_WORD | number} if number else set()
        flags = peer.flags & node_flags
        entity = (flags & OWN) >> 28 | (flags & NODE) >> 26 | (4 if peer.identity == API else 0)
        return words | ({ENTITY_WORD | entity} if entity else set())


def _second(
    policy: Any, by: tuple[int, int, int] | None, audit: tuple[int, int, int] | None
) -> tuple[int, int]:
    """What passes, if policies in audit mode counted: (reason, rule)."""
    if not policy.flags & HAS_AUDIT or (by is not None and -by[0] >= ADMIN):
        return 0, NONE
    rivals = [hit for hit in (by, audit) if hit is not None and -hit[0] >= DEVELOPER]
    if rivals:
        _, rule, action = min(rivals)
        return (POLICY_DENY, rule) if action == DENY else (0, NONE)
    return (POLICY if policy.flags & AUDITED else 0), NONE


def lane_shapes(policy: Any, lane: int) -> set[int]:
    return set(policy.shapes[lane * SHAPES :][: policy.counts[lane]])


def _port_matches(key: Any, port: int | None, protocol: int) -> bool:
    """ICMP without a port, which is its type and code, is an echo request."""
    bits = key.prefix & 31
    if bits == 0:
        return True
    if key.protocol != protocol:
        return False
    if bits == 8:
        return True
    shift = 24 - bits
    port = {1: 8 << 8, 58: 128 << 8}.get(protocol) if port is None else port
    return port is not None and port >> shift == key.port >> shift


def _longest(table: Mapping[Prefix, int], address: bytes, default: int) -> int:
    value, best, found = int.from_bytes(address, "big"), -1, default
    for (bits, network), number in table.items():
        if bits > best and value >> 128 - bits == network >> 128 - bits:
            best, found = bits, number
    return found


# ---- reading ------------------------------------------------------------------------


def read(pin_dir: Path) -> NodeMaps:
    """What a program of this node would find now. Nobody may be writing."""
    found = NodeMaps()
    row = codec("tg_control").unpack(_lookup(pin_dir, "control_v1", 0))
    found.epoch = row.epoch
    _read_policy(pin_dir, found)
    _read_ipcache(pin_dir, found)
    _read_services(pin_dir, found)
    return found


def _open(pin_dir: Path, name: str) -> Map:
    return Map.open_pinned(str(pin_dir / "maps" / name))


def _lookup(pin_dir: Path, name: str, index: int) -> bytes:
    with _open(pin_dir, name) as opened:
        return opened.lookup(U32.pack(index))


def _inner(outer: Map, index: int, key: str, value: str | None) -> dict[Any, Any]:
    """One inner map, decoded; `value` None: a number."""
    with Map.from_id(U32.unpack(outer.lookup(U32.pack(index)))[0]) as inner:
        items = list(inner.items())
    unpack = U32.unpack if value is None else codec(value).unpack
    decode = codec(key).unpack
    return {decode(k): unpack(v) for k, v in items}


def _read_policy(pin_dir: Path, found: NodeMaps) -> None:
    with _open(pin_dir, "node_v2") as outer:
        table = _inner(outer, 0, "tg_node_key", "tg_endpoint")
    found.node = {(key.kind, key.addr): row for key, row in table.items()}
    policies = [p for e in found.node.values() for p in (e.ingress, e.egress) if p.flags]
    with _open(pin_dir, "rule_sets_v2") as sets, _open(pin_dir, "cidrs_v1") as tries:
        for policy in policies:
            if policy.slot in found.rule_sets:
                continue
            rules = _inner(sets, policy.slot, "tg_rule_key", "tg_rule")
            found.rule_sets[policy.slot] = rules
            if policy.flags & HAS_CIDR:
                trie = _inner(tries, policy.slot, "tg_prefix", None)
                found.cidrs[policy.slot] = {
                    (k.bits, int.from_bytes(k.addr, "big")): v[0] for k, v in trie.items()
                }
    for policy in policies:
        shapes = {(lane, shape) for lane in range(LANES) for shape in lane_shapes(policy, lane)}
        wanted = {_shape(key) for key in found.rule_sets[policy.slot]}
        if shapes != wanted:
            found.problems.append(f"rule set {policy.rule_set}: shapes {shapes}, keys {wanted}")


def _shape(key: Any) -> tuple[int, int]:
    return key.prefix >> 5, key.peer >> 24 << 5 | key.prefix & 31


def _read_ipcache(pin_dir: Path, found: NodeMaps) -> None:
    with _open(pin_dir, "ipcache_v1") as opened:
        for key, value in opened.items():
            row = codec("tg_ipcache").unpack(value)
            if row.proof != addr_proof(key):
                found.problems.append(f"ipcache {key.hex()}: proof {row.proof:#x}")
            found.ipcache[key] = row.identity
    for (kind, address), _ in found.node.items():
        if kind == ADDR and not found.ipcache.get(address, 0) & LOCAL:
            found.problems.append(f"{address.hex()} is local and its ipcache entry does not say so")
    with _open(pin_dir, "ipcache_lpm_v1") as opened:
        for key, value in opened.items():
            prefix = codec("tg_prefix").unpack(key)
            number = U32.unpack(value)[0]
            found.networks[prefix.bits, int.from_bytes(prefix.addr, "big")] = number


def _read_services(pin_dir: Path, found: NodeMaps) -> None:
    with (
        _open(pin_dir, "frontends_v1") as frontends,
        _open(pin_dir, "slots_v1") as slots,
        _open(pin_dir, "backends_v1") as backends,
    ):
        for key, value in frontends.items():
            wanted = codec("tg_frontend_key").unpack(key)
            row = codec("tg_frontend").unpack(value)
            if row.proof != frontend_proof(wanted.addr, wanted.port, wanted.protocol):
                found.problems.append(f"frontend {wanted}: proof {row.proof:#x}")
            if not found.ipcache.get(wanted.addr, 0) & FRONTEND:
                found.problems.append(f"frontend {wanted}: its address is not flagged")
            listed = []
            for at in range(row.base, row.base + row.count):
                number = U32.unpack(slots.lookup(U32.pack(at)))[0]
                backend = codec("tg_backend").unpack(backends.lookup(U32.pack(number)))
                if backend.state != 1 or backend.protocol != wanted.protocol:
                    found.problems.append(f"frontend {wanted}: backend {number} is {backend}")
                listed.append((backend.addr, backend.port))
            found.frontends[wanted.addr, wanted.port, wanted.protocol] = listed
