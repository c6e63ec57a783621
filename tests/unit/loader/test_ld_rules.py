"""A rule set's map entries say what its terms say, whatever the packet."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import loader_world as world
from tidegate_api import state as api
from tidegate_loader import addresses, rules

_V4 = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "10.1.2.128/25"]
_V6 = ["::/0", "::/1", "::/90", "fd00::/8", "fd00:1::/32", "fd00:1::5/128"]
_PROBES = ["10.1.2.3", "10.1.2.200", "10.1.9.9", "10.9.9.9", "11.0.0.1", "0.0.0.0"]
_PROBES += ["::", "fd00::1", "fd00:1::5", "fd00:1::6", "fe00::1", "8000::1"]


@st.composite
def cidr_peers(draw: st.DrawFn) -> api.CIDRPeer:
    family = draw(st.sampled_from([_V4, _V6]))
    cidr = draw(st.sampled_from(family))
    inside = [
        c
        for c in family
        if ipaddress.ip_network(c).subnet_of(ipaddress.ip_network(cidr))  # type: ignore[arg-type]
    ]
    excepts = draw(st.lists(st.sampled_from(inside), max_size=3, unique=True))
    return api.CIDRPeer(cidr=cidr, excepts=sorted(excepts))


def _contains(peer: api.CIDRPeer, address: str) -> bool:
    found = ipaddress.ip_address(address)
    if found not in ipaddress.ip_network(peer.cidr):
        return False
    return not any(found in ipaddress.ip_network(e) for e in peer.excepts)


def _lpm(table: dict[addresses.Prefix, int], address: bytes) -> int:
    """As the kernel does it: bits only, no families."""
    for bits in range(128, -1, -1):
        if (bits, addresses.mask(address, bits)) in table:
            return table[bits, addresses.mask(address, bits)]
    return 0


@given(st.lists(cidr_peers(), min_size=1, max_size=6))
@example([api.CIDRPeer(cidr="::/0", excepts=[]), api.CIDRPeer(cidr="0.0.0.0/0", excepts=[])])
@example([api.CIDRPeer(cidr="10.0.0.0/8", excepts=["10.0.0.0/8"])])
def test_an_address_is_of_the_class_of_the_blocks_that_contain_it(
    peers: list[api.CIDRPeer],
) -> None:
    blocks = [rules.block_of(peer) for peer in peers]
    table, classes = rules.cidr_classes([b for b in blocks if b is not None])
    for probe in _PROBES:
        number = _lpm(table, addresses.pack(probe))
        for peer, block in zip(peers, blocks, strict=True):
            assert block is not None
            assert (number in classes[block]) == _contains(peer, probe), (peer, probe)


def test_a_mapped_prefix_matches_nothing() -> None:
    assert rules.block_of(api.CIDRPeer(cidr="::ffff:10.0.0.0/104")) is None


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_prefixes_cover_exactly_the_range(one: int, two: int) -> None:
    first, last = min(one, two), max(one, two)
    found = rules.port_prefixes(first, last)
    covered = [(p, p + (1 << (16 - n)) - 1) for p, n in found]
    assert covered[0][0] == first
    assert covered[-1][1] == last
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(covered))
    assert all(port % (1 << (16 - n)) == 0 for port, n in found)
    assert len(found) <= 30


def test_a_reversed_range_is_refused() -> None:
    with pytest.raises(rules.RuleSetError):
        rules.port_prefixes(5, 4)


# ---- whole rule sets against their terms --------------------------------------------

_PEERS = {"a": world.peer_set("a", 300, 301), "b": world.peer_set("b", 301, 302)}
_PORTS = [0, 1, 79, 80, 81, 1023, 4096, 8080, 65535]


@st.composite
def terms(draw: st.DrawFn) -> api.Term:
    peer = draw(
        st.one_of(
            st.just(api.AnyPeer()),
            st.sampled_from([api.SetPeer(name="a"), api.SetPeer(name="b")]),
            cidr_peers(),
        )
    )
    fields: dict[str, object] = {}
    protocol = draw(st.sampled_from(["TCP", "UDP", None]))
    if protocol:
        fields["protocol"] = protocol
        port = draw(st.one_of(st.none(), st.sampled_from(_PORTS)))
        if port is not None:
            fields["port"] = port
            end = draw(st.one_of(st.none(), st.sampled_from([p for p in _PORTS if p >= port])))
            if end is not None:
                fields["end_port"] = end
    fields["action"] = draw(st.sampled_from(["Allow", "Deny"]))
    fields["precedence"] = draw(st.integers(1, 3))
    return world.term(peer, draw(st.integers(0, 5)), **fields)  # type: ignore[arg-type]


def _distinct(found: Iterable[api.Term]) -> list[api.Term]:
    """One action for a (precedence, rule), as one rule of one policy has."""
    kept: dict[tuple[int, int], api.Term] = {}
    for term in found:
        held = kept.setdefault((term.precedence, term.rule), term)
        if held.action != term.action:
            continue
    return [t for t in found if kept[t.precedence, t.rule].action == t.action]


def _says(
    found: list[api.Term], identity: int, address: str, protocol: str, port: int
) -> tuple[int, int, int] | None:
    best: tuple[int, int, int] | None = None
    for term in found:
        match term.peer:
            case api.SetPeer(name=name):
                hit = identity in _PEERS[name].identities
            case api.CIDRPeer():
                hit = _contains(term.peer, address)
            case _:
                hit = True
        if term.protocol is not api.UNSET:
            hit = hit and term.protocol == protocol
            if term.port is not api.UNSET:
                last = term.port if term.end_port is api.UNSET else term.end_port
                hit = hit and term.port <= port <= last
        if hit and (best is None or (term.precedence, -term.rule) > (best[0], -best[1])):
            action = rules.ALLOW if term.action == "Allow" else rules.DENY
            best = (term.precedence, term.rule, action)
    return best


def _probe(
    found: rules.Expanded, identity: int, address: str, protocol: int, port: int
) -> tuple[int, int, int] | None:
    """As tg_policy_check does it."""
    number = _lpm(found.cidr, addresses.pack(address))
    best: tuple[int, int, int] | None = None
    for shape in found.shapes[0]:
        kind, bits = shape >> 5, shape & 31
        word = {0: identity, 1: rules.WORD_CLASS | number, 2: rules.WORD_ANY}[kind]
        if kind == rules.PEER_CLASS and not number:
            continue
        masked = port & (0xFFFF << (24 - bits)) & 0xFFFF if bits > 8 else 0
        hit = found.entries.get((word, protocol if bits else 0, masked, bits))
        if hit is not None and (best is None or (hit[0], -hit[1]) > (best[0], -best[1])):
            best = hit[:3]
    return best


@given(st.lists(terms(), max_size=8).map(_distinct))
def test_probing_the_shapes_says_what_the_terms_say(found: list[api.Term]) -> None:
    expanded = rules.expand(world.rule_set(*found), _PEERS)
    assert len(expanded.shapes[0]) <= rules.PLAIN_SHAPES
    for identity, address in ((300, "10.1.2.3"), (301, "fd00:1::5"), (302, "10.1.2.200")):
        for name, protocol in (("TCP", 6), ("UDP", 17)):
            for port in _PORTS:
                expected = _says(found, identity, address, name, port)
                assert expected == _probe(expanded, identity, address, protocol, port)


def test_every_kind_of_peer_and_port_at_once_still_fits() -> None:
    """Three kinds of peer, with any port, a protocol's, one, a range: at least nine shapes."""
    peers = [api.AnyPeer(), api.SetPeer(name="a"), api.CIDRPeer(cidr="10.0.0.0/8")]
    terms = [
        term
        for peer in peers
        for term in (
            world.term(peer, 0),
            world.term(peer, 1, "UDP"),
            world.term(peer, 2, "TCP", 80),
            world.term(peer, 3, "TCP", 256, end_port=1023),
        )
    ]
    found = rules.expand(world.rule_set(*terms), _PEERS)
    assert len(found.shapes[0]) == 9
    assert {entry[2] for entry in found.entries} == {0, 80, *range(256, 1024)}


def test_many_lengths_become_few_shapes_and_the_same_ports() -> None:
    wide = rules.expand(world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 1, end_port=65534)), {})
    assert len(wide.shapes[0]) <= rules.PLAIN_SHAPES
    odd = [
        world.term(peer, i, "TCP", 1, end_port=65534)
        for i, peer in enumerate([api.AnyPeer(), api.SetPeer(name="a"), api.CIDRPeer(cidr="::/0")])
    ]
    found = rules.expand(world.rule_set(*odd), _PEERS)
    assert len(found.shapes[0]) <= rules.PLAIN_SHAPES
    for port in (0, 1, 2, 255, 256, 65534, 65535):
        assert (_probe(found, 300, "10.0.0.1", 6, port) is not None) == (1 <= port <= 65534)


def test_too_many_entries_are_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_ENTRIES", 3)
    with pytest.raises(rules.RuleSetError, match="more than 3"):
        rules.expand(
            world.rule_set(*(world.term(api.AnyPeer(), 0, "TCP", p) for p in range(4))), {}
        )


def test_the_more_specific_shape_is_probed_first() -> None:
    found = rules.expand(
        world.rule_set(
            world.term(api.AnyPeer(), 0),
            world.term(api.SetPeer(name="a"), 0, "TCP", 80),
            world.term(api.SetPeer(name="a"), 0, "TCP"),
        ),
        _PEERS,
    )
    assert found.shapes == ((0 << 5 | 24, 0 << 5 | 8, 2 << 5 | 0), (), ())


def test_a_copy_judges_numbers_as_others_and_all_else_as_before() -> None:
    entries = {
        (300, 6, 80, 24): "allow",
        (300, 6, 83, 24): "deny",
        (301, 6, 80, 24): "deny",
        (302, 6, 84, 24): "allow",
    }
    found = rules.copy_of(entries.keys(), entries.values(), {302: 300, 303: 300, 304: 999})
    assert found == {
        (300, 6, 80, 24): "allow",
        (300, 6, 83, 24): "deny",
        (301, 6, 80, 24): "deny",
        (302, 6, 80, 24): "allow",
        (302, 6, 83, 24): "deny",
        (303, 6, 80, 24): "allow",
        (303, 6, 83, 24): "deny",
    }
