"""What may be on the wire: senders, neighbours, tags, options, fragments, extension headers."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import SYN
from support.lab import PASS, Rules
from support.town import POLICY, VIP4, VIP6, Town

pytestmark = pytest.mark.kernel
A4, A6, B4, B6 = t.IP4["a"], t.IP6["a"], t.IP4["b"], t.IP6["b"]
LINK, ROUTERS, NODES = "fe80::a", "ff02::2", "ff02::1"
NOTHING = Rules()


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


@pytest.fixture
def quiet(town: Town) -> Town:
    """Nobody is isolated."""
    town.open()
    return town


# ---- ARP --------------------------------------------------------------------------------


def arp(operation: int, sender: str, target: str = "10.1.0.1") -> bytes:
    return f.eth(f.arp(operation, f.MAC_A, sender, f.BROADCAST, target), f.ETH_ARP)


def test_arp(town: Town) -> None:
    """Passed whatever the policy, if the sender is the pod."""
    town.open({"a>": NOTHING, "a<": NOTHING})
    rows = [
        ("asks", arp(1, A4), 0),
        ("answers", arp(2, A4), 0),
        ("announces itself", arp(1, A4, A4), 0),
        ("probes (RFC 5227)", arp(1, "0.0.0.0", A4), 0),
        ("asks as another", arp(1, B4), t.SENDER),
        ("answers as the gateway", arp(2, "10.1.0.1"), t.SENDER),
        ("cut short", arp(1, A4)[:-1], t.TRUNCATED),
        ("not Ethernet", _other_arp(14, b"\0\6"), t.SENDER),
        ("not IPv4", _other_arp(16, b"\x86\xdd"), t.SENDER),
        ("longer hardware addresses", _other_arp(18, b"\x08"), t.SENDER),
        ("longer protocol addresses", _other_arp(19, b"\x10"), t.SENDER),
    ]
    for why, sent, expected in rows:
        seen = town.send("a>", sent)
        assert seen.reason == expected, why
        assert seen.data == sent, why
    assert town.send("a<", arp(2, "10.1.0.1", A4)).verdict == PASS


def _other_arp(at: int, value: bytes) -> bytes:
    frame = bytearray(arp(1, A4))
    frame[at : at + len(value)] = value
    return bytes(frame)


# ---- neighbour discovery ------------------------------------------------------------------


def nd(src: str, dst: str, kind: int, target: str = "::", hops: int = 255) -> bytes:
    return f.eth(f.IPv6(src, dst, f.ICMPV6, f.nd(src, dst, kind, target), hops).encode())


ND_ROWS = [
    ("solicits", nd(A6, B6, f.NS, B6), 0),
    ("solicits from its link-local address", nd(LINK, NODES, f.NS, B6), 0),
    ("advertises its address", nd(A6, B6, f.NA, A6), 0),
    ("advertises a link-local address", nd(LINK, NODES, f.NA, LINK), 0),
    ("looks for routers", nd(LINK, ROUTERS, f.RS), 0),
    ("looks for routers without an address", nd("::", ROUTERS, f.RS), 0),
    ("detects duplicates", nd("::", "ff02::1:ff00:10", f.NS, A6), 0),
    ("advertises from ::", nd("::", NODES, f.NA, A6), t.SOURCE),
    ("solicits as another", nd(B6, NODES, f.NS, A6), t.SOURCE),
    ("advertises as another", nd(B6, NODES, f.NA, B6), t.SOURCE),
    ("advertises another's address", nd(A6, NODES, f.NA, B6), t.SENDER),
    ("advertises the gateway's address", nd(LINK, NODES, f.NA, "fd00:1::1"), t.SENDER),
    ("advertises a router", nd(LINK, NODES, f.RA), t.ND),
    ("redirects", nd(LINK, B6, f.REDIRECT, A6), t.ND),
    *(
        (f"hop limit 254, type {kind}", nd(A6, B6, kind, A6, 254), t.ND)
        for kind in (f.NS, f.NA, f.RS, f.RA, f.REDIRECT)
    ),
]


@pytest.mark.parametrize(("why", "sent", "expected"), ND_ROWS)
def test_neighbour_discovery_from_a_pod(town: Town, why: str, sent: bytes, expected: int) -> None:
    town.open({"a>": NOTHING})
    seen = town.send("a>", sent)
    assert (seen.reason, seen.data) == (expected, sent), why


def test_neighbour_discovery_into_a_pod(town: Town) -> None:
    """The node is the pod's router; one hop away it is not the node."""
    town.open({"a<": NOTHING})
    for kind in (f.NS, f.NA, f.RA, f.REDIRECT):
        assert town.reason("a<", nd("fe80::1", A6, kind, A6)) == 0
        assert town.reason("a<", nd("fe80::1", A6, kind, A6, 254)) == t.ND


def test_truncated_advertisement(quiet: Town) -> None:
    whole = nd(A6, NODES, f.NA, A6)
    assert quiet.reason("a>", whole[: 54 + 20]) == t.TRUNCATED


def test_neighbour_discovery_in_a_fragment(quiet: Town) -> None:
    """RFC 6980. An atomic fragment is one too."""
    body = f.nd(A6, B6, f.NS, B6)
    for ident, size in ((1, 8), (2, 1000)):
        for piece in f.fragment6(f.IPv6(A6, B6, f.ICMPV6, body, 255), size, ident):
            assert quiet.reason("a>", f.eth(piece)) == t.FRAGMENT


# ---- senders and link layer ---------------------------------------------------------------


def test_senders(quiet: Town) -> None:
    rows = [
        ("own IPv4", "a", A4, B4, 0),
        ("own IPv6", "a", A6, B6, 0),
        ("fe80::/10, first", "a", "fe80::", B6, 0),
        ("fe80::/10, last", "a", "febf:ffff::1", B6, 0),
        ("site-local", "a", "fec0::1", B6, t.SOURCE),
        ("another pod's IPv4", "a", B4, t.IP4["c"], t.SOURCE),
        ("another pod's IPv6", "a", B6, t.IP6["c"], t.SOURCE),
        ("the node's", "a", t.IP4["n"], B4, t.SOURCE),
        ("the world's", "a", t.IP4["w"], B4, t.SOURCE),
        ("unspecified IPv4", "a", "0.0.0.0", B4, t.SOURCE),
        ("unspecified IPv6", "a", "::", B6, t.SOURCE),
        ("loopback", "a", "127.0.0.1", B4, t.SOURCE),
        ("loopback IPv6", "a", "::1", B6, t.SOURCE),
        ("broadcast", "a", "255.255.255.255", B4, t.SOURCE),
        ("multicast", "a", "ff02::1", B6, t.SOURCE),
        ("mapped, as a source", "a", "::ffff:" + A4, B6, t.SOURCE),
        ("mapped, as a destination", "a", A6, "::ffff:" + B4, t.SOURCE),
        ("IPv4-compatible", "a", "::" + A4, B6, t.SOURCE),
    ]
    for why, who, src, dst, expected in rows:
        for protocol in (f.TCP, f.UDP, 47):
            assert quiet.reason(who + ">", f.packet(src, dst, protocol)) == expected, why
        ping = f.ICMPV6 if ":" in src else f.ICMP
        assert quiet.reason(who + ">", f.packet(src, dst, ping)) == expected, why


def test_a_pod_of_one_family_owns_nothing_of_the_other(town: Town) -> None:
    town.open()
    for pod in town.pods.values():
        pod.ip6 = ""
    town.lab.world(list(town.pods.values()))
    assert town.reason("a>", t.udp("::", B6, 1, 2)) == t.SOURCE
    assert town.reason("a>", t.udp(A6, B6, 1, 2)) == t.SOURCE
    assert town.reason("a>", t.udp(A4, B4, 1, 2)) == 0
    town.open()
    for pod in town.pods.values():
        pod.ip4 = ""
    town.lab.world(list(town.pods.values()))
    assert town.reason("a>", t.udp("0.0.0.0", B4, 1, 2)) == t.SOURCE
    assert town.reason("a>", arp(1, A4)) == t.SENDER
    assert town.reason("a>", arp(1, "0.0.0.0")) == 0


def test_mapped_address_into_a_pod(quiet: Town) -> None:
    assert quiet.reason("b<", t.udp("::ffff:" + A4, B6, 1, 2)) == t.SOURCE


@pytest.mark.parametrize("hook", ["a>", "b<"])
@pytest.mark.parametrize(
    ("why", "sent", "expected"),
    [
        ("802.1Q", f.eth(f.ip(A4, B4, f.UDP, f.udp(A4, B4, 1, 2)), vlans=[5]), t.VLAN),
        ("802.1ad", f.eth(f.ip(A4, B4, f.UDP, f.udp(A4, B4, 1, 2)), 0x0800, vlans=[5, 6]), t.VLAN),
        (
            "802.1Q, priority only",
            f.eth(f.ip(A6, B6, f.UDP, f.udp(A6, B6, 1, 2)), vlans=[0]),
            t.VLAN,
        ),
        (
            "ARP in a VLAN",
            f.eth(f.arp(1, f.MAC_A, A4, f.BROADCAST, B4), f.ETH_ARP, vlans=[1]),
            t.VLAN,
        ),
        ("LLDP", f.eth(bytes(46), 0x88CC), t.ETHERTYPE),
        ("MPLS", f.eth(bytes(46), 0x8847), t.ETHERTYPE),
        ("PPPoE", f.eth(bytes(46), 0x8864), t.ETHERTYPE),
        ("802.3 length", f.eth(bytes(46), 46), t.ETHERTYPE),
        (
            "IPv6 under IPv4's type",
            f.eth(f.ip(A6, B6, f.UDP, f.udp(A6, B6, 1, 2)), 0x0800),
            t.INVALID,
        ),
        (
            "IPv4 under IPv6's type",
            f.eth(f.IPv4(A4, B4, f.UDP, bytes(40)).encode(), 0x86DD),
            t.INVALID,
        ),
    ],
)
def test_link_layer(quiet: Town, why: str, sent: bytes, expected: int, hook: str) -> None:
    assert quiet.reason(hook, sent) == expected, why


# ---- IPv4 headers -------------------------------------------------------------------------


def with_options(options: bytes) -> bytes:
    return f.eth(f.IPv4(A4, B4, f.TCP, f.tcp(A4, B4, 40000, 80), options=options).encode())


ROUTE = b"\x07\x04" + bytes([10, 1, 0, 13])
OPTION_ROWS = [
    ("record route", b"\x07" + ROUTE, 0),
    ("router alert", b"\x94\x04\0\0", 0),
    ("timestamps", b"\x44\x04\x05\0", 0),
    ("no-operation, forty times", b"\1" * 40, 0),
    ("end of list hides what follows", b"\0\x83" + ROUTE, 0),
    ("loose source route", b"\x83" + ROUTE, t.SOURCE_ROUTE),
    ("strict source route", b"\x89" + ROUTE, t.SOURCE_ROUTE),
    ("source route behind others", b"\1\1\x94\x04\0\0\x83" + ROUTE, t.SOURCE_ROUTE),
    ("source route in the last byte", b"\1" * 39 + b"\x83", t.SOURCE_ROUTE),
    ("an option of no length", b"\x94\0\0\0", t.SOURCE_ROUTE),
    ("an option of length one", b"\x94\1\0\0", t.SOURCE_ROUTE),
]


@pytest.mark.parametrize(("why", "options", "expected"), OPTION_ROWS)
def test_ipv4_options(town: Town, why: str, options: bytes, expected: int) -> None:
    """The ports are where the header's length says."""
    town.open({"b<": t.rules(t.from_("a", f.TCP, 80))})
    assert town.reason("a>", with_options(options)) == expected, why
    town.open({"b<": t.rules(t.from_("a", f.TCP, 81))})
    assert town.reason("a>", with_options(options)) == (expected or POLICY), why


@pytest.mark.parametrize(
    ("why", "byte", "expected"),
    [
        ("version 5", 0x55, t.INVALID),
        ("header of 16 bytes", 0x44, t.INVALID),
        ("of 0", 0x40, t.INVALID),
    ],
)
def test_ipv4_first_byte(quiet: Town, why: str, byte: int, expected: int) -> None:
    frame = bytearray(t.udp(A4, B4, 1, 2))
    frame[14] = byte
    assert quiet.reason("a>", bytes(frame)) == expected, why


def test_icmp_redirect_from_a_pod(quiet: Town) -> None:
    body = f.icmp(5, 1, bytes([10, 1, 0, 13]), f.ip(B4, A4, f.UDP, f.udp(B4, A4, 1, 2)))
    assert quiet.reason("a>", f.eth(f.ip(A4, B4, f.ICMP, body))) == t.ND


@pytest.mark.parametrize("kind", [0, 8, 9, 10, 13, 17, 30, 31, 32, 40, 200, 255])
def test_other_icmp_is_a_flow(town: Town, kind: int) -> None:
    sent = f.eth(f.ip(A4, B4, f.ICMP, f.icmp(kind, 0)))
    town.open()
    assert town.reason("a>", sent) == 0
    town.open({"b<": t.rules(t.from_("a", f.TCP))})
    assert town.reason("a>", sent) == POLICY


@pytest.mark.parametrize("kind", [0, 8, 127, 128, 130, 200, 255])
def test_other_icmp6_is_judged_by_its_own_type(town: Town, kind: int) -> None:
    """Type 0 code 0, too, whose number is that of no port: it is neither an echo nor its answer."""
    sent = f.eth(f.ip(A6, B6, f.ICMPV6, f.icmpv6(A6, B6, kind, 0)))
    town.open({"b<": t.rules(t.from_("a", f.ICMPV6, kind << 8))})
    assert town.reason("a>", sent) == 0
    others = [t.from_("a", f.ICMPV6, other << 8) for other in (1, 128, 129) if other != kind]
    town.open({"b<": t.rules(*others)})
    assert town.reason("a>", sent) == POLICY


@pytest.mark.parametrize("ident", [0, 1, 0xFFFF])
def test_icmp6_of_type_0_answers_nothing(town: Town, ident: int) -> None:
    town.open({"b<": t.rules(t.from_("a", f.ICMPV6, 128 << 8)), "a<": t.rules()})
    asked = f.icmpv6(A6, B6, 128, 0, ident.to_bytes(2, "big") + bytes(2))
    assert town.reason("a>", f.eth(f.ip(A6, B6, f.ICMPV6, asked))) == 0
    sent = f.eth(f.ip(B6, A6, f.ICMPV6, f.icmpv6(B6, A6, 0, 0)))
    assert town.reason("b>", sent) == POLICY


# ---- fragments ------------------------------------------------------------------------------


def pieces(
    version: int, protocol: int, dport: int, size: int, ident: int = 7, dst: str = ""
) -> list[bytes]:
    """A datagram of a to b (or `dst`) as frames."""
    a, b = t.ip_of("a", version), dst or t.ip_of("b", version)
    data = bytes(range(200))
    body = (
        f.udp(a, b, 40000, dport, data)
        if protocol == f.UDP
        else f.tcp(a, b, 40000, dport, SYN, data)
    )
    if version == 4:
        found = f.fragment4(f.IPv4(a, b, protocol, body, ident=ident), size)
    else:
        found = f.fragment6(f.IPv6(a, b, protocol, body), size, ident)
    return [f.eth(piece) for piece in found]


ONLY_80 = {"b<": t.rules(t.from_("a", f.UDP, 80), t.from_("a", f.TCP, 80))}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.UDP, f.TCP])
def test_fragments(town: Town, protocol: int, version: int) -> None:
    town.open(ONLY_80)
    first, *later = pieces(version, protocol, 80, 64)
    assert [town.reason("a>", piece) for piece in later] == [t.FRAGMENT] * len(later), "before it"
    assert town.reason("a>", first) == 0
    assert [town.reason("a>", piece) for piece in later] == [0] * len(later)
    assert [town.reason("a>", piece) for piece in reversed(later)] == [0] * len(later)
    other = pieces(version, protocol, 80, 64, ident=8)[1]
    assert town.reason("a>", other) == t.FRAGMENT, "another datagram"


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_of_a_forbidden_datagram(town: Town, version: int) -> None:
    town.open(ONLY_80)
    for piece in pieces(version, f.UDP, 81, 64):
        assert town.reason("a>", piece) == POLICY


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_through_a_service(town: Town, version: int) -> None:
    """Put together again, they are the translated datagram, checksum and all."""
    a, b = t.ip_of("a", version), t.ip_of("b", version)
    vip = VIP4 if version == 4 else VIP6
    town.open(ONLY_80)
    town.lab.service(vip, 53, f.UDP, [(b, 80)])
    whole = b""
    for piece in pieces(version, f.UDP, 53, 64, dst=vip):
        seen = town.send("a>", piece).frame
        assert (seen.src, seen.dst) == (a, b)
        assert not seen.problem
        assert seen.ip_check in ("ok", "none")
        start = seen.l4
        whole += town.send("a>", piece).data[start:]
    assert f.parse(f.eth(f.ip(a, b, f.UDP, whole))).valid
    assert f.parse(f.eth(f.ip(a, b, f.UDP, whole))).dport == 80
    answer = f.udp(b, a, 80, 40000, bytes(100))
    back = b""
    for piece in (
        f.fragment4(f.IPv4(b, a, f.UDP, answer), 64)
        if version == 4
        else f.fragment6(f.IPv6(b, a, f.UDP, answer), 64)
    ):
        answered = town.send("b>", f.eth(piece))
        assert (answered.frame.src, answered.frame.dst) == (vip, a)
        back += answered.data[answered.frame.l4 :]
    found = f.parse(f.eth(f.ip(vip, a, f.UDP, back)))
    assert found.valid
    assert found.sport == 53


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("offset", [8, 16])
def test_tcp_header_in_a_second_fragment(town: Town, offset: int, version: int) -> None:
    """RFC 1858: flags must not be rewritten by a fragment that overlaps the first."""
    town.open()
    first, *_ = pieces(version, f.TCP, 80, 64)
    assert town.reason("a>", first) == 0
    overlap = pieces(version, f.TCP, 80, offset)[1]
    assert f.parse(overlap).offset == offset
    assert town.reason("a>", overlap) == t.FRAGMENT
    tiny = pieces(version, f.TCP, 80, offset)[0]
    assert town.reason("a>", tiny) == t.TRUNCATED, "a first fragment without the whole header"


@pytest.mark.parametrize("version", [4, 6])
def test_spoofed_first_fragment_names_no_ports(town: Town, version: int) -> None:
    """c says that a's datagram goes to port 80; a's goes to 81, and its head was dropped."""
    town.open(ONLY_80)
    assert town.reason("c>", pieces(version, f.UDP, 80, 64)[0]) == t.SOURCE
    assert town.reason("a>", pieces(version, f.UDP, 81, 64)[1]) == t.FRAGMENT


@pytest.mark.parametrize("version", [4, 6])
def test_a_second_first_fragment_is_judged_itself(town: Town, version: int) -> None:
    town.open(ONLY_80)
    assert town.reason("a>", pieces(version, f.UDP, 80, 64)[0]) == 0
    assert town.reason("a>", pieces(version, f.UDP, 81, 64)[0]) == POLICY
    assert town.reason("a>", pieces(version, f.UDP, 80, 64)[1]) == POLICY


def test_atomic_fragments(town: Town) -> None:
    """RFC 6946: offset 0 and no more; an ordinary packet."""
    town.open(ONLY_80)
    for port, expected in ((80, 0), (81, POLICY)):
        (piece,) = pieces(6, f.UDP, port, 1000)
        assert town.reason("a>", piece) == expected


def test_recycled_fragment_entry_is_a_miss(town: Town) -> None:
    town.open(ONLY_80)
    first, second, *_ = pieces(4, f.UDP, 80, 64)
    assert town.reason("a>", first) == 0
    table = town.lab.maps["frags_v1"]
    ((key, value),) = table.items()
    table.update(key, value[:4] + bytes([value[4] ^ 1]) + value[5:])
    assert town.reason("a>", second) == t.FRAGMENT


def test_fragments_of_a_protocol_without_ports(town: Town) -> None:
    town.open()
    a, b = A4, B4
    head = f.eth(f.IPv4(a, b, 47, bytes(64), more=True).encode())
    tail = f.eth(f.IPv4(a, b, 47, bytes(64), offset=64).encode())
    assert town.reason("a>", tail) == t.FRAGMENT
    assert town.reason("a>", head) == 0
    assert town.reason("a>", tail) == 0


# ---- IPv6 extension headers -----------------------------------------------------------------


def extended(
    *extensions: f.Ext, dport: int = 80, protocol: int = f.UDP, payload: bytes = b""
) -> bytes:
    body = payload or f.udp(A6, B6, 40000, dport, b"x")
    return f.eth(f.IPv6(A6, B6, protocol, body, extensions=extensions).encode())


HOPS, OPTS = f.hop_by_hop(), f.dest_opts()
LONG = f.dest_opts(b"\1\x7e" + bytes(126))
EXTENSION_ROWS = [
    ("hop-by-hop", (HOPS,), 0),
    ("destination options", (OPTS,), 0),
    ("authentication", (f.auth(),), 0),
    ("authentication of another length", (f.auth(icv=bytes(32)),), 0),
    ("a route that has ended", (f.routing(0, 0, [B6]),), 0),
    ("mobile IPv6's, ended", (f.routing(2, 0, [B6]),), 0),
    ("all of them", (HOPS, OPTS, f.routing(0, 0, [B6]), f.auth(), OPTS), 0),
    ("six", (HOPS, OPTS, OPTS, OPTS, OPTS, OPTS), 0),
    ("a long one", (LONG,), 0),
    ("seven", (HOPS, OPTS, OPTS, OPTS, OPTS, OPTS, OPTS), t.EXT_HEADER),
    ("a route with segments left", (f.routing(0, 1, [t.IP6["c"]]),), t.SOURCE_ROUTE),
    ("mobile IPv6's, one left", (f.routing(2, 1, [t.IP6["c"]]),), t.SOURCE_ROUTE),
    ("segment routing", (f.routing(4, 1, [t.IP6["c"]]),), t.SOURCE_ROUTE),
    ("a route behind others", (HOPS, OPTS, f.routing(0, 1, [t.IP6["c"]])), t.SOURCE_ROUTE),
    (
        "two fragment headers",
        (f.fragment_header(1, 0, True), f.fragment_header(2, 0, True)),
        t.EXT_HEADER,
    ),
    ("deeper than headers are walked", (LONG, LONG, LONG, LONG, LONG), t.EXT_HEADER),
]


@pytest.mark.parametrize(("why", "extensions", "expected"), EXTENSION_ROWS)
def test_extension_headers(
    town: Town, why: str, extensions: tuple[f.Ext, ...], expected: int
) -> None:
    town.open(ONLY_80)
    assert town.reason("a>", extended(*extensions)) == expected, why
    assert town.reason("a>", extended(*extensions, dport=81)) == (expected or POLICY), why


@pytest.mark.parametrize(("why", "extensions", "expected"), EXTENSION_ROWS)
def test_truncated_extension_headers(
    town: Town, why: str, extensions: tuple[f.Ext, ...], expected: int
) -> None:
    town.open(ONLY_80)
    whole = extended(*extensions)
    for cut in range(54, len(whole) - 9):
        assert town.reason("a>", whole[:cut]) != 0, why


def test_translated_behind_extension_headers(town: Town) -> None:
    town.open(ONLY_80)
    town.lab.service(VIP6, 53, f.UDP, [(B6, 80)])
    body = f.udp(A6, VIP6, 40000, 53, b"question")
    sent = f.IPv6(A6, VIP6, f.UDP, body, extensions=[HOPS, OPTS, f.auth()]).encode()
    found = town.send("a>", f.eth(sent)).frame
    assert found.valid
    assert (found.dst, found.dport) == (B6, 80)


@pytest.mark.parametrize("protocol", [f.NO_NEXT, f.ESP, 4, 41, 135, 139, 140, 253, 254, 255])
def test_unknown_next_header_is_a_protocol_without_ports(town: Town, protocol: int) -> None:
    payload = struct.pack("!HH", 40000, 80) + bytes(20)
    for extensions in ((), (OPTS,)):
        sent = extended(*extensions, protocol=protocol, payload=payload)
        for rules, expected in (
            (t.rules(t.from_("a")), 0),
            (t.rules((300, protocol, 0, 8)), 0),
            (t.rules((300, protocol, 80, 24)), POLICY),
            (ONLY_80["b<"], POLICY),
        ):
            town.open({"b<": rules})
            assert town.reason("a>", sent) == expected
