"""One rule set as map entries: peer sets to numbers, CIDRs to classes, ranges to prefixes.

Pure: a function of the RuleSet and the peer sets it names. No ids, slots,
kernel, clock or I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET
from tidegate_api.state import (
    ADMIN_PRECEDENCE,
    DEVELOPER_PRECEDENCE,
    AnyPeer,
    CIDRPeer,
    EntityPeer,
    NamedPort,
    PeerSet,
    RuleSet,
    RuleSetSpec,
    SetPeer,
    Term,
)

from tidegate_loader import addresses
from tidegate_loader.addresses import Prefix

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
ICMP_PROTOCOLS = {"ICMP": 1, "ICMPv6": 58}
"""Their port is type << 8 | code."""

PEER_IDENTITY, PEER_CLASS, PEER_ANY, PEER_ENTITY = 0, 1, 2, 3
WORD_CLASS, WORD_ANY, WORD_ENTITY = 0x01000000, 0x02000000, 0x03000000
ENTITY_OWN, ENTITY_NODE, ENTITY_API = 1, 2, 4
"""What an address is as a node's; enum tg_entity."""
ENTITIES = {
    "host": [ENTITY_OWN | ENTITY_NODE, ENTITY_OWN | ENTITY_NODE | ENTITY_API],
    "remote-node": [ENTITY_NODE, ENTITY_NODE | ENTITY_API],
    "kube-apiserver": [
        ENTITY_API,
        ENTITY_NODE | ENTITY_API,
        ENTITY_OWN | ENTITY_NODE | ENTITY_API,
    ],
}
"""Entity -> every combination of bits that it stands for."""
DENY, ALLOW, PASS = 0, 1, 2
ACTIONS = {"Deny": DENY, "Allow": ALLOW, "Pass": PASS}
LOG = 1
"""A rule's flag; enum tg_rule_flags."""

HAS_RULES, HAS_CIDR, ISOLATED, AUDIT, AUDITED = 1, 2, 4, 8, 16
"""Flags of a policy; enum tg_policy_flags."""
MAIN, BELOW, IN_AUDIT = 0, 1, 2
LANES = 3
"""Lanes: terms that are ranked apart; enum tg_lane."""

MAX_SHAPES = 12
"""TG_MAX_SHAPES: key shapes a lane may have; the coarsest ports of four kinds of peer."""
PLAIN_SHAPES = 10
"""As many without entities: each is one more look-up for every new flow."""
MAX_ENTRIES = 200_000
"""Entries of one rule set; a larger one is refused whole, never cut."""
MAX_CLASSES = WORD_CLASS - 1
"""CIDR classes of one rule set: 24 bits of a peer word."""
MAX_RULES = 0xFFFFFF00
"""Rules of one rule set: 32 bits, without what enum tg_rule_special says."""

RuleKey = tuple[int, int, int, int]
"""(peer word, protocol, port, lane << 5 | prefix bits of (protocol, port))."""
RuleKeyRow = tuple[int, ...]
"""A key as its struct has it; the peer word comes first."""
RuleValue = tuple[int, int, int, int]
"""(precedence, rule, action, flags)."""
V = TypeVar("V")
PortKey = tuple[int, int, int]
"""(protocol, port, prefix bits)."""

_PORT_LENGTHS = tuple(
    map(frozenset[int], (range(17), range(0, 17, 4), range(0, 17, 8), range(0, 17, 16)))
)
"""Port prefix lengths allowed, coarser from left to right: fewer lengths are
fewer shapes to probe, paid for with more entries."""

_MAPPED_ROOT: Prefix = (addresses.MAPPED_BITS, addresses.MAPPED + bytes(4))


class RuleSetError(Exception):
    """This rule set cannot be put into maps: a limit, which it names, or nonsense. The previous
    state stays in force."""


class Expanded(msgspec.Struct, frozen=True):
    """The map entries of one rule set."""

    name: str
    entries: dict[RuleKey, RuleValue]
    cidr: dict[Prefix, int]
    """Prefix -> class; empty: the rule set names no CIDR."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each lane: shape bytes in use, most specific first."""
    flags: int
    """Of the policy that uses it: what becomes of a flow that no rule decides."""
    content: str
    """Hash of entries and cidr; the same as `content_of` of a read-back."""


def content_of(entries: Mapping[RuleKey, RuleValue], cidr: Mapping[Prefix, int]) -> str:
    text = repr((sorted(entries.items()), sorted(cidr.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def identities_of(entries: Iterable[RuleKey]) -> frozenset[int]:
    """The peers that entries name by their number."""
    return frozenset(key[0] for key in entries if key[0] < WORD_CLASS)


def copy_of(
    keys: Iterable[RuleKeyRow], values: Iterable[V], numbers: Mapping[int, int]
) -> dict[RuleKeyRow, V]:
    """Entries of a rule set with those of `numbers` made anew: new number -> the number that it is
    to be judged as. A key begins with its peer."""
    news: dict[int, list[int]] = {}
    for new, old in numbers.items():
        news.setdefault(old, []).append(new)
    found: dict[RuleKeyRow, V] = {}
    for key, value in zip(keys, values, strict=True):
        peer, *rest = key
        if peer not in numbers:
            found[tuple(key)] = value
        for new in news.get(peer, ()):
            found[new, *rest] = value
    return found


def port_prefixes(first: int, last: int) -> list[tuple[int, int]]:
    """The fewest (port, prefix length 0..16) that cover first..last, inclusive."""
    if not 0 <= first <= last <= 0xFFFF:
        raise RuleSetError(f"not a port range: {first}-{last}")
    found = []
    while first <= last:
        size = first & -first or 1 << 16
        while size > last - first + 1:
            size >>= 1
        found.append((first, 17 - size.bit_length()))
        first += size
    return found


def _split(port: int, length: int, lengths: frozenset[int]) -> Iterable[tuple[int, int]]:
    """The same ports as (port, length), in prefixes of an allowed length."""
    longer = min(n for n in lengths if n >= length)
    step = 1 << (16 - longer)
    return [(port + i * step, longer) for i in range(1 << (longer - length))]


def _icmp_keys(term: Term, number: int, lengths: frozenset[int]) -> list[PortKey]:
    if term.port is not UNSET:
        raise RuleSetError(f"a port of {term.protocol}")
    if term.icmp_type is UNSET:
        if term.icmp_code is not UNSET:
            raise RuleSetError(f"a code of {term.protocol} without a type")
        return [(number, 0, 8)]
    code, length = (0, 8) if term.icmp_code is UNSET else (term.icmp_code, 16)
    wide = (term.icmp_type << 8 | code, length)
    return [(number, port, 8 + bits) for port, bits in _split(*wide, lengths)]


def _port_keys(term: Term, lengths: frozenset[int]) -> list[PortKey]:
    if term.protocol is not UNSET and term.protocol in ICMP_PROTOCOLS:
        return _icmp_keys(term, ICMP_PROTOCOLS[term.protocol], lengths)
    if term.icmp_type is not UNSET or term.icmp_code is not UNSET:
        raise RuleSetError("a type or code of what is not ICMP")
    if term.protocol is UNSET and term.port is UNSET:
        return [(0, 0, 0)]
    names = PROTOCOLS if term.protocol is UNSET else (term.protocol,)
    if term.port is UNSET:
        return [(PROTOCOLS[name], 0, 8) for name in names]
    last = term.port if term.end_port is UNSET else term.end_port
    return [
        (PROTOCOLS[name], port, 8 + length)
        for name in names
        for wide in port_prefixes(term.port, last)
        for port, length in _split(*wide, lengths)
    ]


class Block(msgspec.Struct, frozen=True, order=True):
    """One CIDR peer as prefixes."""

    cidr: Prefix
    excepts: tuple[Prefix, ...]


def _family_v4(prefix: Prefix) -> bool:
    return prefix[0] >= addresses.MAPPED_BITS and addresses.is_v4(prefix[1])


def _covers(outer: Prefix, inner: Prefix) -> bool:
    """Containment within one family: ::/0 does not cover IPv4."""
    bits, address = outer
    return (
        bits <= inner[0]
        and _family_v4(outer) == _family_v4(inner)
        and addresses.mask(inner[1], bits) == address
    )


def _is_mapped_text(cidr: str) -> bool:
    """An IPv6 prefix inside ::ffff:0:0/96: on the wire it is nobody's address."""
    return ":" in cidr and _family_v4(addresses.parse_prefix(cidr))


def block_of(peer: CIDRPeer) -> Block | None:
    """None: it can match no packet. RuleSetError: a malformed CIDR."""
    try:
        if _is_mapped_text(peer.cidr):
            return None
        excepts = [addresses.parse_prefix(x) for x in peer.excepts if not _is_mapped_text(x)]
        return Block(addresses.parse_prefix(peer.cidr), tuple(sorted(excepts)))
    except ValueError as error:
        raise RuleSetError(str(error)) from error


def cidr_classes(blocks: Iterable[Block]) -> tuple[dict[Prefix, int], dict[Block, list[int]]]:
    """(longest-prefix table to classes, the classes in each block).

    Every prefix mentioned is a region; the blocks that hold a region are its
    class; equal sets share a number from 1. Class 0 (no block) is stored only
    where it cuts a hole, and a region that says what its cover says is left out.
    """
    wanted = sorted(set(blocks))
    regions = {p for block in wanted for p in (block.cidr, *block.excepts)}
    root = _MAPPED_ROOT[1]
    if any(bits < addresses.MAPPED_BITS and addresses.mask(root, bits) == a for bits, a in regions):
        regions.add(_MAPPED_ROOT)  # an LPM of ::/n would match mapped IPv4
    in_force = {region[0] for region in regions}
    of_cidr: dict[Prefix, list[Block]] = {}
    for block in wanted:
        of_cidr.setdefault(block.cidr, []).append(block)
    holes = {block: frozenset(block.excepts) for block in wanted}
    numbers: dict[tuple[Block, ...], int] = {(): 0}
    table: dict[Prefix, int] = {}
    lengths: set[int] = set()
    for region in sorted(regions):
        above = _above(region, regions, in_force)
        around = (block for cover in above for block in of_cidr.get(cover, ()))
        members = tuple(sorted(b for b in around if holes[b].isdisjoint(above)))
        number = numbers.setdefault(members, len(numbers))
        if number != _longest(table, lengths, region):
            table[region] = number
            lengths.add(region[0])
    if len(numbers) > MAX_CLASSES:
        raise RuleSetError(f"more than {MAX_CLASSES} CIDR classes")
    used = set(table.values())
    classes: dict[Block, list[int]] = {block: [] for block in wanted}
    for members, number in numbers.items():
        for block in members:
            if number in used:
                classes[block].append(number)
    return table, classes


def _above(region: Prefix, known: Container[Prefix], lengths: Iterable[int]) -> list[Prefix]:
    """Those of the known prefixes that hold the region, itself among them; of its family."""
    covers = ((bits, addresses.mask(region[1], bits)) for bits in lengths if bits <= region[0])
    return [cover for cover in covers if cover in known and _covers(cover, region)]


def _longest(table: Mapping[Prefix, int], lengths: Iterable[int], region: Prefix) -> int:
    """What the longest-prefix match of the table says of a region; 0: nothing."""
    for bits in sorted(lengths, reverse=True):
        found = table.get((bits, addresses.mask(region[1], bits))) if bits <= region[0] else None
        if found is not None:
            return found
    return 0


def _named(term: Term, peers: Mapping[str, PeerSet]) -> list[NamedPort]:
    """The numbers of a term's port name, and whose they are."""
    if not isinstance(term.peer, SetPeer) or term.port is not UNSET:
        raise RuleSetError("a port name beside a port, or of no peer set")
    named = peers[term.peer.name].ports
    return [n for n in named if term.protocol is UNSET or n.protocol == term.protocol]


def _blocks(term: Term, peers: Mapping[str, PeerSet]) -> list[Block]:
    """The networks that a term names, by itself or through its peer set."""
    match term.peer:
        case CIDRPeer():
            found = [block_of(term.peer)]
        case SetPeer(name=name) if term.port_name is UNSET:
            found = [block_of(CIDRPeer(cidr=cidr)) for cidr in peers[name].cidrs]
        case _:
            found = []
    return [block for block in found if block is not None]


class _Classed:
    """Terms against one table of classes: the peer words of each."""

    def __init__(self, terms: Iterable[Term], peers: Mapping[str, PeerSet]) -> None:
        self._peers = peers
        self._blocks = {id(term): _blocks(term, peers) for term in terms}
        found = {block for blocks in self._blocks.values() for block in blocks}
        self.table, self._classes = cidr_classes(found)

    def words(self, term: Term) -> list[int]:
        classes = {c for block in self._blocks[id(term)] for c in self._classes[block]}
        words = [WORD_CLASS | c for c in sorted(classes)]
        match term.peer:
            case AnyPeer():
                return [WORD_ANY]
            case SetPeer(name=name):
                # 0 is "unknown": it matches terms for any peer only.
                return words + [i for i in self._peers[name].identities if i]
            case EntityPeer(entity=entity):
                return [WORD_ENTITY | bits for bits in ENTITIES[entity]]
            case CIDRPeer():
                return words

    def keys(
        self, term: Term, lengths: frozenset[int]
    ) -> Iterator[tuple[Iterable[PortKey], Sequence[int]]]:
        """(ports, peer words) pairs that a term is stored under, each port with each word."""
        if term.port_name is UNSET:
            yield _port_keys(term, lengths), self.words(term)
            return
        for named in _named(term, self._peers):
            ports = [(PROTOCOLS[named.protocol], named.port, 24)]
            yield ports, [i for i in named.identities if i]


def _fill(
    name: str,
    lane: int,
    terms: Iterable[Term],
    classed: _Classed,
    lengths: frozenset[int],
    flags: Sequence[int],
) -> dict[RuleKey, RuleValue]:
    """One lane's entries; `flags`: of each rule."""
    entries: dict[RuleKey, RuleValue] = {}
    for term in terms:
        if term.rule >= min(len(flags), MAX_RULES):
            raise RuleSetError(f"rule set {name}: rule {term.rule} of {len(flags)}")
        if term.audit and not (_of_developers(term) and term.action != "Pass"):
            raise RuleSetError(f"rule set {name}: only developers' rules can be in audit mode")
        value = (term.precedence, term.rule, ACTIONS[term.action], flags[term.rule])
        rank = (term.precedence, -term.rule)
        for ports, words in classed.keys(term, lengths):
            for protocol, port, bits in ports:
                for word in words:
                    key = (word, protocol, port, lane << 5 | bits)
                    held = entries.get(key)
                    if held is None or rank > (held[0], -held[1]):
                        entries[key] = value
            if len(entries) > MAX_ENTRIES:
                raise RuleSetError(f"rule set {name} needs more than {MAX_ENTRIES} map entries")
    return entries


def _of_developers(term: Term) -> bool:
    return DEVELOPER_PRECEDENCE <= term.precedence < ADMIN_PRECEDENCE


def _shapes(entries: Iterable[RuleKey]) -> tuple[int, ...]:
    found = {(word >> 24, prefix & 31) for word, _, _, prefix in entries}
    return tuple(kind << 5 | bits for kind, bits in sorted(found, key=lambda s: (-s[1], s[0])))


def _lane(
    name: str, lane: int, terms: Sequence[Term], classed: _Classed, flags: Sequence[int]
) -> tuple[dict[RuleKey, RuleValue], tuple[int, ...]]:
    """(entries, shapes) of a lane, with as fine port prefixes as its number of shapes allows."""
    for lengths in _PORT_LENGTHS:
        entries = _fill(name, lane, terms, classed, lengths, flags)
        shapes = _shapes(entries)
        entities = any(shape >> 5 == PEER_ENTITY for shape in shapes)
        if len(shapes) <= (MAX_SHAPES if entities else PLAIN_SHAPES):
            return entries, shapes
    raise RuleSetError(f"rule set {name} has more than {MAX_SHAPES} key shapes")


def lanes_of(terms: Iterable[Term]) -> tuple[list[Term], ...]:
    """Terms by lane. The Admin tier stands apart only where one of its terms passes on: else the
    highest precedence of all says what tier after tier would."""
    terms = list(terms)
    apart = any(
        t.action == "Pass" and t.precedence >= ADMIN_PRECEDENCE for t in terms if not t.audit
    )
    lanes: tuple[list[Term], ...] = tuple([] for _ in range(LANES))
    for term in terms:
        below = BELOW if apart and term.precedence < ADMIN_PRECEDENCE else MAIN
        lanes[IN_AUDIT if term.audit else below].append(term)
    return lanes


def flags_of(spec: RuleSetSpec, lanes: Sequence[Sequence[Term]], cidr: bool) -> int:
    return (
        HAS_RULES
        | (HAS_CIDR if cidr else 0)
        | (ISOLATED if spec.policies else 0)
        | (AUDIT if lanes[IN_AUDIT] or spec.audited else 0)
        | (AUDITED if spec.audited else 0)
    )


def expand(rule_set: RuleSet, peers: Mapping[str, PeerSet]) -> Expanded:
    """The entries of a rule set. KeyError cannot be: the source checked that
    every peer set it names is there. RuleSetError: too large, or malformed."""
    name, spec = rule_set.metadata.name, rule_set.spec
    lanes = lanes_of(spec.terms)
    classed = _Classed(spec.terms, peers)
    flags = [LOG if rule.log else 0 for rule in spec.rules]
    entries: dict[RuleKey, RuleValue] = {}
    shapes = []
    for lane, terms in enumerate(lanes):
        found, in_use = _lane(name, lane, terms, classed, flags)
        entries.update(found)
        shapes.append(in_use)
    if len(entries) > MAX_ENTRIES:
        raise RuleSetError(f"rule set {name} needs more than {MAX_ENTRIES} map entries")
    return Expanded(
        name=name,
        entries=entries,
        cidr=classed.table,
        shapes=tuple(shapes),
        flags=flags_of(spec, lanes, bool(classed.table)),
        content=content_of(entries, classed.table),
    )
