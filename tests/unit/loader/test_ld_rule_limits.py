"""What a rule set may hold at most: it works, or is refused whole and says which limit; it never
wraps and never loses a part."""

from __future__ import annotations

import ipaddress
import itertools
import random

import pytest
from msgspec import UNSET
from support import loader_world as world
from support.lab import BUILD
from tidegate_api import state as api
from tidegate_bpf import Codec, ObjectFile
from tidegate_loader import addresses, rules
from tidegate_loader.rules import RuleSetError

ANY = rules.WORD_ANY


def test_more_rules_than_sixteen_bits_count() -> None:
    """65,537 rules, each for a peer of its own: the last is the last, in the map's bytes too."""
    count = 65_537
    peers = {f"p{i}": world.peer_set(f"p{i}", 256 + i) for i in range(count)}
    found = rules.expand(
        world.rule_set(
            *(world.term(api.SetPeer(name=f"p{i}"), i, "TCP", 80) for i in range(count))
        ),
        peers,
    )
    assert len(found.entries) == count
    last = found.entries[256 + count - 1, 6, 80, 24]
    assert last == (100, 65_536, rules.ALLOW, 0)
    codec = Codec(ObjectFile(BUILD / "pod.o").layout("tg_rule"))
    row = codec.unpack(codec.pack(precedence=last[0], rule=last[1], action=last[2], flags=last[3]))
    assert row.rule == 65_536


def test_every_port_is_few_prefixes() -> None:
    found = rules.expand(world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 1, end_port=65535)), {})
    covered = [(port, port + (1 << 24 - prefix)) for _, _, port, prefix in sorted(found.entries)]
    assert sorted(covered)[0][0] == 1
    assert sorted(covered)[-1][1] == 65536
    assert all(a[1] == b[0] for a, b in itertools.pairwise(sorted(covered)))
    assert len(covered) <= 60
    few = rules.port_prefixes(1, 65535)
    assert len(few) == 16
    assert rules.port_prefixes(0, 65535) == [(0, 0)]
    assert rules.port_prefixes(65535, 65535) == [(65535, 16)]


@pytest.mark.parametrize("entity", ["host", "remote-node", "kube-apiserver"])
def test_the_most_key_shapes_fit(entity: api.Entity) -> None:
    """Four kinds of peer, each with any port, a protocol, a port and ragged ranges."""
    peers: list[api.Peer] = [api.AnyPeer(), api.SetPeer(name="a"), api.CIDRPeer(cidr="10.0.0.0/8")]
    peers.append(api.EntityPeer(entity=entity))
    ports = [(UNSET, UNSET, UNSET), ("TCP", UNSET, UNSET), ("TCP", 80, UNSET), ("UDP", 1, 999)]
    terms = [
        world.term(peer, i, protocol, port, end_port=end)  # type: ignore[arg-type]
        for peer in peers
        for i, (protocol, port, end) in enumerate(ports)
    ]
    found = rules.expand(world.rule_set(*terms), {"a": world.peer_set("a", 300)})
    assert len(found.shapes[rules.MAIN]) == rules.MAX_SHAPES
    ports_of = {port for word, protocol, port, _ in found.entries if (word, protocol) == (ANY, 17)}
    assert ports_of == set(range(1, 1000))


def test_each_lane_has_its_own_shapes() -> None:
    """What is coarse in one lane stays fine in another."""
    fine = world.term(api.AnyPeer(), 0, "UDP", 1024, end_port=2047)
    terms = [msg(fine, action="Pass", precedence=api.ADMIN_PRECEDENCE)]
    terms += [
        msg(world.term(peer, 1, "TCP", 1, end_port=65534), precedence=api.DEVELOPER_PRECEDENCE)
        for peer in (api.AnyPeer(), api.SetPeer(name="a"))
    ]
    found = rules.expand(world.rule_set(*terms), {"a": world.peer_set("a", 300)})
    length = {shape & 31 for lane in found.shapes for shape in lane}
    assert found.entries[ANY, 17, 1024, 8 + 6][2] == rules.PASS
    assert [len(lane) <= rules.PLAIN_SHAPES for lane in found.shapes] == [True] * 3
    assert {8 + n for n in (4, 8, 12, 16)} | {8 + 6} == length


def msg(term: api.Term, **fields: object) -> api.Term:
    kept = {name: getattr(term, name) for name in term.__struct_fields__}
    return api.Term(**kept | fields)


def test_a_thousand_blocks_with_nested_excepts() -> None:
    """Every address is of the classes of just those blocks that hold it."""
    r = random.Random(1)
    blocks = []
    for _ in range(1000):
        bits = r.choice([8, 12, 16, 20, 24])
        net = ipaddress.ip_network((r.getrandbits(16) << 16 & 0xFF070000, bits), strict=False)
        inner = [
            str(ipaddress.ip_network((int(net[0]) + r.randrange(net.num_addresses), b), False))
            for b in r.sample(range(bits, 33), min(4, 33 - bits))
        ]
        blocks.append(api.CIDRPeer(cidr=str(net), excepts=sorted(set(inner))))
    terms = [world.term(peer, i, "TCP", 1 + i) for i, peer in enumerate(blocks)]
    found = rules.expand(world.rule_set(*terms), {})
    probes = [ipaddress.ip_network(r.choice(r.choice(blocks).excepts))[0] for _ in range(150)]
    probes += [p + 1 for p in probes[:50]]
    for probe in probes:
        number = _longest(found.cidr, addresses.pack(str(probe)))
        for i, peer in enumerate(blocks):
            inside = probe in ipaddress.ip_network(peer.cidr) and not any(
                probe in ipaddress.ip_network(e) for e in peer.excepts
            )
            key = (rules.WORD_CLASS | number, 6, 1 + i, 24)
            assert (key in found.entries) == (inside and bool(number)), (probe, peer)


def _longest(table: dict[addresses.Prefix, int], address: bytes) -> int:
    for bits in range(128, -1, -1):
        found = table.get((bits, addresses.mask(address, bits)))
        if found is not None:
            return found
    return 0


def test_what_is_too_large_says_which_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    members = world.peer_set("a", *range(256, 256 + 4001))
    wide = world.term(api.SetPeer(name="a"), 0, "TCP", 1, end_port=50)
    monkeypatch.setattr(rules, "_PORT_LENGTHS", (frozenset({16}),))
    with pytest.raises(RuleSetError, match="more than 200000 map entries"):
        rules.expand(world.rule_set(wide), {"a": members})
    monkeypatch.setattr(rules, "MAX_CLASSES", 2)
    blocks = [world.term(api.CIDRPeer(cidr=f"10.{i}.0.0/16"), 0) for i in range(3)]
    with pytest.raises(RuleSetError, match="more than 2 CIDR classes"):
        rules.expand(world.rule_set(*blocks), {})


@pytest.mark.parametrize(
    ("why", "term"),
    [
        ("no such rule", {"rule": 9}),
        ("a port of ICMP", {"protocol": "ICMP", "port": 8}),
        ("a code without a type", {"protocol": "ICMP", "icmp_code": 0}),
        ("a type of TCP", {"protocol": "TCP", "icmp_type": 8}),
        ("a type of every protocol", {"icmp_type": 8}),
        ("a port name of anybody", {"port_name": "http"}),
        ("audit of the Admin tier", {"audit": True, "precedence": api.ADMIN_PRECEDENCE}),
        ("audit that passes on", {"audit": True, "action": "Pass", "precedence": 1 << 30}),
    ],
)
def test_what_makes_no_sense_is_refused_whole(why: str, term: dict[str, object]) -> None:
    spec = world.rule_set(world.term(api.AnyPeer())).spec
    made = msg(spec.terms[0], **term)
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__} | {"terms": [made]}
    with pytest.raises(RuleSetError):
        rules.expand(api.rule_set(api.RuleSetSpec(**fields)), {})
