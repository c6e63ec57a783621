"""One rule set as map entries: peer sets to numbers, CIDRs to classes, ranges to prefixes.

Pure: a function of the RuleSet and the peer sets it names. No ids, slots,
kernel, clock or I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import UNSET
from tidegate_api.state import AnyPeer, CIDRPeer, PeerSet, RuleSet, SetPeer, Term

from tidegate_loader import addresses
from tidegate_loader.addresses import Prefix

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}

PEER_IDENTITY, PEER_CLASS, PEER_ANY = 0, 1, 2
WORD_CLASS, WORD_ANY = 0x01000000, 0x02000000
DENY, ALLOW = 0, 1

MAX_SHAPES = 10
"""TG_MAX_SHAPES: key shapes a rule set may have."""
MAX_ENTRIES = 200_000
"""Entries of one rule set; a larger one is refused whole, never cut."""

RuleKey = tuple[int, int, int, int]
"""(peer word, protocol, port, prefix bits of (protocol, port))."""
RuleValue = tuple[int, int, int]
"""(precedence, rule, action)."""
PortKey = tuple[int, int, int]
"""(protocol, port, prefix bits)."""

_PORT_LENGTHS = tuple(
    map(frozenset[int], (range(17), range(0, 17, 4), range(0, 17, 8), range(0, 17, 16)))
)
"""Port prefix lengths allowed, coarser from left to right: fewer lengths are
fewer shapes to probe, paid for with more entries."""

_MAPPED_ROOT: Prefix = (addresses.MAPPED_BITS, addresses.MAPPED + bytes(4))


class RuleSetError(Exception):
    """This rule set cannot be put into maps; the previous state stays in force."""


class Expanded(msgspec.Struct, frozen=True):
    """The map entries of one rule set."""

    name: str
    entries: dict[RuleKey, RuleValue]
    cidr: dict[Prefix, int]
    """Prefix -> class; empty: the rule set names no CIDR."""
    shapes: tuple[int, ...]
    """Shape bytes in use, most specific first."""
    content: str
    """Hash of entries and cidr; the same as `content_of` of a read-back."""


def content_of(entries: Mapping[RuleKey, RuleValue], cidr: Mapping[Prefix, int]) -> str:
    text = repr((sorted(entries.items()), sorted(cidr.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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


def _port_keys(term: Term, lengths: frozenset[int]) -> list[PortKey]:
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
    numbers: dict[tuple[Block, ...], int] = {(): 0}
    table: dict[Prefix, int] = {}
    lengths: set[int] = set()
    for region in sorted(regions):
        members = tuple(
            b
            for b in wanted
            if _covers(b.cidr, region) and not any(_covers(e, region) for e in b.excepts)
        )
        number = numbers.setdefault(members, len(numbers))
        if number != _longest(table, lengths, region):
            table[region] = number
            lengths.add(region[0])
    used = set(table.values())
    classes: dict[Block, list[int]] = {block: [] for block in wanted}
    for members, number in numbers.items():
        for block in members:
            if number in used:
                classes[block].append(number)
    return table, classes


def _longest(table: Mapping[Prefix, int], lengths: Iterable[int], region: Prefix) -> int:
    """What the longest-prefix match of the table says of a region; 0: nothing."""
    for bits in sorted(lengths, reverse=True):
        found = table.get((bits, addresses.mask(region[1], bits))) if bits <= region[0] else None
        if found is not None:
            return found
    return 0


def _peer_words(
    terms: Iterable[Term], peers: Mapping[str, PeerSet]
) -> tuple[list[tuple[Term, list[int]]], dict[Prefix, int]]:
    """Each term with the peer words it is stored under, and the class table."""
    terms = list(terms)
    blocks = {id(t): block_of(t.peer) for t in terms if isinstance(t.peer, CIDRPeer)}
    table, classes = cidr_classes(b for b in blocks.values() if b is not None)
    found: list[tuple[Term, list[int]]] = []
    for term in terms:
        match term.peer:
            case AnyPeer():
                found.append((term, [WORD_ANY]))
            case SetPeer(name=name):
                # 0 is "unknown": it matches terms for any peer only.
                found.append((term, [i for i in peers[name].identities if i]))
            case CIDRPeer():
                block = blocks[id(term)]
                found.append(
                    (term, [WORD_CLASS | c for c in classes[block]] if block is not None else [])
                )
    return found, table


def _fill(
    name: str, pairs: list[tuple[Term, list[int]]], lengths: frozenset[int]
) -> dict[RuleKey, RuleValue]:
    entries: dict[RuleKey, RuleValue] = {}
    for term, words in pairs:
        action = ALLOW if term.action == "Allow" else DENY
        value = (term.precedence, term.rule, action)
        rank = (term.precedence, -term.rule)
        for protocol, port, bits in _port_keys(term, lengths):
            for word in words:
                key = (word, protocol, port, bits)
                held = entries.get(key)
                if held is None or rank > (held[0], -held[1]):
                    entries[key] = value
        if len(entries) > MAX_ENTRIES:
            raise RuleSetError(f"rule set {name} needs more than {MAX_ENTRIES} map entries")
    return entries


def _shapes(entries: Iterable[RuleKey]) -> tuple[int, ...]:
    found = {(word >> 24, bits) for word, _, _, bits in entries}
    return tuple(kind << 5 | bits for kind, bits in sorted(found, key=lambda s: (-s[1], s[0])))


def expand(rule_set: RuleSet, peers: Mapping[str, PeerSet]) -> Expanded:
    """The entries of a rule set. KeyError cannot be: the source checked that
    every peer set it names is there. RuleSetError: too large, or malformed."""
    name = rule_set.metadata.name
    pairs, table = _peer_words(rule_set.spec.terms, peers)
    for lengths in _PORT_LENGTHS:
        entries = _fill(name, pairs, lengths)
        shapes = _shapes(entries)
        if len(shapes) <= MAX_SHAPES:
            return Expanded(name, entries, table, shapes, content_of(entries, table))
    raise RuleSetError(f"rule set {name} has more than {MAX_SHAPES} key shapes")
