"""Direct server return: what the node that is asked sends on, what the backend's node opens, whom
it believes, and whose address answers have."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import NODE4, NODE6, SNAT, Edge
from support.frames import ACK, FIN, RST, SYN
from support.lab import DROP, PASS, REDIRECT, U32, Rules
from support.town import ends, packet

pytestmark = pytest.mark.kernel
NODE = {4: NODE4, 6: NODE6}
OTHER = {4: t.IP4["n"], 6: t.IP6["n"]}
"""Another node."""
CLIENT = {4: t.IP4["w"], 6: t.IP6["w"]}
PORT = 30080
GENEVE = 6081
ROOM = {4: 44, 6: 64}


@pytest.fixture(scope="module", params=["tc", "xdp"])
def made(request: pytest.FixtureRequest) -> Iterator[Edge]:
    with e.edge(xdp=request.param == "xdp") as found:
        found.load(dsr=1)
        yield found


@pytest.fixture
def edge(made: Edge) -> Edge:
    made.open()
    for version in (4, 6):
        made.lab.ipcache(OTHER[version], 4, peer=True, node=True)
        made.lab.ipcache(NODE[version], 4, peer=True, node=True, own=True)
    return made


def geneve(port: int, version: int, **more: int) -> bytes:
    """RFC 8926, with one option of one word. `more`: fields that are not as they should be."""
    fields = {
        "words": 2,
        "flags": 0x40,
        "ethertype": 0x0800 if version == 4 else 0x86DD,
        "network": 0,
        "kind": 0xFFF1,
        "type": 0x81,
        "length": 1,
    } | more
    return struct.pack("!BBHIHBBHH", *fields.values(), port, 0)


def carried(
    inner: bytes, src: str, dst: str, port: int = 8080, version: int = 4, **more: int
) -> bytes:
    """An IP packet inside a datagram from a node to a pod; without a checksum."""
    header = geneve(port, version, **more)
    udp = struct.pack("!HHHH", 50000, GENEVE, 8 + len(header) + len(inner), 0)
    return f.eth(f.ip(src, dst, f.UDP, udp + header + inner))


def unwrap(data: bytes, version: int) -> tuple[f.Frame, int, bytes]:
    """(the carrier, the port it names, what is inside), all of it as it should be."""
    frame = f.parse(data)
    assert frame.ip_check in ("ok", "none")
    assert (frame.protocol, frame.dport) == (f.UDP, GENEVE)
    header, inner = frame.payload[:16], frame.payload[16:]
    port = int.from_bytes(header[12:14], "big")
    assert header == geneve(port, version)
    assert len(data) == 14 + ROOM[version] + len(inner)
    return frame, port, inner


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_the_node_that_is_asked(edge: Edge, protocol: int, version: int) -> None:
    """What opens a flow goes whole, of TCP the rest bare; no answer is expected here."""
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    edge.service(n, PORT, protocol, [(r, 8080)])
    for flags in (SYN, SYN, ACK, FIN | ACK):
        sent = packet(protocol, w, n, 40000, PORT, flags)
        seen = edge.send(sent)
        assert (seen.verdict, seen.reason) == (REDIRECT, 0)
        assert seen.frame.ttl == 63
        if protocol == f.TCP and flags != SYN:
            assert ends(seen.frame) == (w, 40000, r, 8080)
            continue
        outer, port, inner = unwrap(seen.data, version)
        assert (outer.src, outer.dst, port) == (n, r, 8080)
        frame = f.parse_ip(inner)
        assert ends(frame) == (w, 40000, n, PORT), "as the client sent it"
        assert frame.ttl == 63
        assert frame.payload == f.parse(sent).payload
    assert edge.nat() == 2


def test_backends_here_and_clients_of_the_cluster_as_ever(edge: Edge) -> None:
    w, b, r = t.IP4["w"], t.IP4["b"], t.IP4["r"]
    edge.service(NODE4, PORT, f.TCP, [(b, 8080)])
    assert ends(edge.send(packet(f.TCP, w, NODE4, 40000, PORT)).frame) == (w, 40000, b, 8080)
    edge.service(NODE4, PORT + 1, f.TCP, [(NODE4, 6443)], base=2)
    seen = edge.send(packet(f.TCP, w, NODE4, 40000, PORT + 1))
    assert (seen.verdict, ends(seen.frame)) == (PASS, (w, 40000, NODE4, 6443))
    edge.service(NODE4, PORT + 2, f.TCP, [(r, 8080)], base=3)
    edge.lab.ipcache("10.2.0.30", 305, peer=True)
    edge.lab.network("10.3.0.0/16", 0)
    for src in ("10.2.0.30", OTHER[4], "10.3.0.1"):  # a pod, a node, a pod nobody knows yet
        source = ends(edge.send(packet(f.TCP, src, NODE4, 40000, PORT + 2)).frame)
        assert (source[0], *source[2:]) == (NODE4, r, 8080)
        assert source[1] in SNAT


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP])
def test_the_backends_node(edge: Edge, protocol: int, version: int) -> None:
    """The pod sees the client, the client the address and port that it asked."""
    w, n, b = CLIENT[version], OTHER[version], t.ip_of("b", version)
    inner = packet(protocol, w, n, 40000, PORT)[14:]
    for _ in range(2):
        seen = edge.send(carried(inner, n, b, version=version))
        assert (seen.verdict, seen.reason) == (REDIRECT, 0)
        assert seen.data[:6] == edge.town.pods["b"].mac
        assert ends(seen.frame) == (w, 40000, b, 8080)
    for flags, back in ((SYN | ACK, True), (ACK, False), (ACK, True), (FIN | ACK, False)):
        if back:
            answer = edge.town.send("b>", packet(protocol, b, w, 8080, 40000, flags))
            assert answer.verdict == REDIRECT, "out of the uplink, past the stack"
            assert ends(answer.frame) == (n, PORT, w, 40000)
        else:
            bare = packet(protocol, w, b, 40000, 8080, flags)
            assert edge.send(bare).data == bare
            assert edge.town.send("b<", bare).reason == 0
    assert edge.nat() == 0, "it remembers where it judges"
    edge.lab.bump()
    answer = edge.town.send("b>", packet(protocol, b, w, 8080, 40000, ACK))
    assert (answer.verdict, ends(answer.frame)) == (REDIRECT, (n, PORT, w, 40000))


def test_policy_sees_the_client_and_cuts(edge: Edge) -> None:
    w, n, b = CLIENT[4], OTHER[4], t.IP4["b"]
    sent = carried(packet(f.TCP, w, n, 40000, PORT)[14:], n, b)
    for why, rules, expected in (
        ("nobody may", Rules(), t.POLICY),
        ("the client's network may", t.rules((t.CLASS | 1, 0, 0, 0), cidr={"192.0.2.0/24": 1}), 0),
        ("the node may", t.rules((t.CLASS | 1, 0, 0, 0), cidr={f"{n}/32": 1}), t.POLICY),
        ("pods may", t.rules(t.from_("a")), t.POLICY),
        ("anybody, on the backend's port", t.rules((t.ANY, f.TCP, 8080, 24)), 0),
        ("anybody, on the node's port", t.rules((t.ANY, f.TCP, PORT, 24)), t.POLICY),
    ):
        edge.town.switch({"b<": rules})
        assert edge.send(sent).reason == expected, why
    edge.town.switch()
    assert edge.send(sent).reason == 0
    edge.town.send("b>", packet(f.TCP, b, w, 8080, 40000, SYN | ACK))
    assert edge.town.reason("b<", packet(f.TCP, w, b, 40000, 8080, ACK)) == 0
    edge.town.switch({"b<": Rules()})
    assert edge.town.reason("b<", packet(f.TCP, w, b, 40000, 8080, ACK)) == t.POLICY
    assert edge.town.reason("b>", packet(f.TCP, b, w, 8080, 40000, ACK)) == t.POLICY


def test_whom_it_believes(edge: Edge) -> None:
    """Only another node of the cluster, about a pod of this one: else it is a pod's datagram."""
    w, n, b, r = CLIENT[4], OTHER[4], t.IP4["b"], t.IP4["r"]
    inner = packet(f.TCP, w, n, 40000, PORT)[14:]
    whole = f.IPv4(n, b, f.UDP, carried(inner, n, b)[34:])
    for why, data in (
        ("from outside", carried(inner, w, b)),
        ("from a pod elsewhere", carried(inner, r, b)),
        ("as if from this node", carried(inner, NODE4, b)),
        ("to no pod of this node", carried(inner, n, r)),
        ("to this node", carried(inner, n, NODE4)),
        ("another class of options", carried(inner, n, b, kind=0x0102)),
        ("another option", carried(inner, n, b, type=0x80)),
        ("another length", carried(inner, n, b, length=2)),
        ("more options", carried(inner, n, b, words=3)),
        ("another version", carried(inner, n, b, words=0x42)),
        ("a control packet", carried(inner, n, b, flags=0xC0)),
        ("a network's", carried(inner, n, b, network=256)),
        ("Ethernet inside", carried(inner, n, b, ethertype=0x6558)),
        ("the other family inside", carried(inner, n, b, ethertype=0x86DD)),
        ("cut", f.eth(f.fragment4(whole, 48)[0])),
        ("the rest of it", f.eth(f.fragment4(whole, 48)[1])),
        ("too short", carried(inner, n, b)[:50]),
    ):
        seen = edge.send(data)
        assert (seen.verdict, seen.data) == (PASS, data), why
    assert edge.send(carried(inner, n, b)).reason == 0


def test_what_may_be_inside(edge: Edge) -> None:
    """From outside the cluster, for an address of a node or a Service, and no ICMP."""
    w, n, b = CLIENT[4], OTHER[4], t.IP4["b"]
    edge.lab.ipcache("198.51.100.1", 2, frontend=True)
    for why, inner, reason in (
        ("a Service's own address", packet(f.TCP, w, "198.51.100.1", 40000, 80), 0),
        ("of a pod here", packet(f.TCP, t.IP4["a"], n, 40000, PORT), t.SOURCE),
        ("of a pod elsewhere", packet(f.TCP, t.IP4["r"], n, 40000, PORT), t.SOURCE),
        ("of a pod nobody knows", packet(f.TCP, t.IP4["u"], n, 40000, PORT), t.SOURCE),
        ("of a node", packet(f.TCP, n, n, 40000, PORT), t.SOURCE),
        ("for anybody's address", packet(f.TCP, w, "203.0.113.7", 40000, 80), t.SOURCE),
        ("for a pod's", packet(f.TCP, w, b, 40000, 80), t.SOURCE),
        ("an echo", f.eth(f.ip(w, n, f.ICMP, f.icmp(8, 0))), t.INVALID),
        ("cut short", packet(f.TCP, w, n, 40000, PORT)[:40], t.TRUNCATED),
    ):
        seen = edge.send(carried(inner[14:], n, b))
        assert (seen.verdict == DROP, seen.reason) == (reason != 0, reason), why


def test_without_the_option_it_is_a_datagram(edge: Edge) -> None:
    """And what was begun with it goes on: of TCP nothing is carried any more."""
    w, n, b, r = CLIENT[4], OTHER[4], t.IP4["b"], t.IP4["r"]
    edge.service(NODE4, PORT, f.TCP, [(r, 8080)])
    edge.send(packet(f.TCP, w, NODE4, 40000, PORT))
    edge.load()
    data = carried(packet(f.TCP, w, n, 40000, PORT)[14:], n, b)
    assert edge.send(data).data == data
    bare = edge.send(packet(f.TCP, w, NODE4, 40000, PORT, ACK))
    assert ends(bare.frame) == (w, 40000, r, 8080)
    edge.load(dsr=1)


@pytest.mark.parametrize("version", [4, 6])
def test_too_large_to_be_carried(edge: Edge, version: int) -> None:
    """Who sent it is told how large it may be; what just fits goes."""
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    edge.service(n, PORT, f.UDP, [(r, 8080)])
    head, limit = (28, 1500 - ROOM[4]) if version == 4 else (48, 1500 - ROOM[6])
    fits = edge.send(packet(f.UDP, w, n, 40000, PORT, size=limit - head))
    assert (fits.reason, len(fits.data)) == (0, 1514)
    seen = edge.send(packet(f.UDP, w, n, 40000, PORT, size=limit - head + 1))
    assert (seen.verdict, seen.reason) == (REDIRECT, e.NO_ROUTE)
    frame = seen.frame
    assert frame.valid
    assert (frame.src, frame.dst) == (n, w)
    assert (frame.icmp_type, frame.icmp_code) == ((3, 4) if version == 4 else (2, 0))
    assert struct.unpack("!I", seen.data[frame.l4 + 4 : frame.l4 + 8])[0] == limit
    assert frame.inner is not None
    assert (frame.inner.src, frame.inner.sport, frame.inner.dport) == (w, 40000, PORT)


def test_fragments(edge: Edge) -> None:
    """Each is carried, and each is opened."""
    w, n, b, r = CLIENT[4], OTHER[4], t.IP4["b"], t.IP4["r"]
    edge.service(NODE4, PORT, f.UDP, [(r, 8080)])
    whole = f.IPv4(w, NODE4, f.UDP, f.udp(w, NODE4, 40000, PORT, b"x" * 300))
    for piece in f.fragment4(whole, 104):
        outer, port, inner = unwrap(edge.send(f.eth(piece)).data, 4)
        assert (outer.dst, port) == (r, 8080)
        assert inner[:8] == piece[:8]
        assert inner[12:] == piece[12:]
    whole = f.IPv4(w, n, f.UDP, f.udp(w, n, 40000, PORT, b"x" * 300))
    for piece in f.fragment4(whole, 104):
        seen = edge.send(carried(piece, n, b))
        assert (seen.verdict, seen.frame.dst) == (REDIRECT, b)
        assert seen.frame.ip_check == "ok"


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_answers_go_on_to_the_backend(edge: Edge, version: int) -> None:
    """They come to the address that the answers had, at the node that was asked."""
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    edge.service(n, PORT, f.UDP, [(r, 8080)])
    edge.send(packet(f.UDP, w, n, 40000, PORT))
    quoted = f.ip(n, w, f.UDP, f.udp(n, w, PORT, 40000, b"x" * 5))
    if version == 4:
        sent = f.eth(f.ip(w, n, f.ICMP, f.icmp_error(3, 4, quoted, mtu=1400)))
    else:
        sent = f.eth(f.ip(w, n, f.ICMPV6, f.icmpv6_error(w, n, 2, 0, quoted, 1400)))
    seen = edge.send(sent)
    frame, inner = seen.frame, seen.frame.inner
    assert (seen.verdict, seen.reason) == (REDIRECT, 0)
    assert inner is not None
    assert (frame.ip_check, frame.l4_check) == (("ok" if version == 4 else "none"), "ok")
    assert (frame.src, frame.dst) == (w, r)
    assert (inner.src, inner.sport, inner.dst, inner.dport) == (r, 8080, w, 40000)


def test_a_flow_lives_although_no_answer_is_seen(edge: Edge) -> None:
    """Once the client has gone on; one that has only opened it is soon forgotten."""
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 8080)])
    for sport in (40000, 40001):
        edge.send(packet(f.TCP, t.IP4["w"], NODE4, sport, PORT))
    edge.send(packet(f.TCP, t.IP4["w"], NODE4, 40000, PORT, ACK))
    edge.service(NODE4, PORT, f.TCP, [("10.2.0.21", 8080)], base=2)
    edge.age(1000)
    found = [
        edge.send(packet(f.TCP, t.IP4["w"], NODE4, sport, PORT, ACK)).frame.dst
        for sport in (40000, 40001)
    ]
    assert found == [t.IP4["r"], "10.2.0.21"]
    edge.send(packet(f.TCP, t.IP4["w"], NODE4, 40000, PORT, RST))
    outer, _, _ = unwrap(edge.send(packet(f.TCP, t.IP4["w"], NODE4, 40000, PORT)).data, 4)
    assert outer.dst == "10.2.0.21"


def test_two_flows_never_become_one(edge: Edge) -> None:
    """By two addresses a client's port may lead to one backend only once at a time."""
    for base, vip in ((1, NODE4), (2, "198.51.100.1")):
        edge.service(vip, PORT, f.TCP, [(t.IP4["r"], 8080)], base=base)
    sent = [packet(f.TCP, t.IP4["w"], vip, 40000, PORT) for vip in (NODE4, "198.51.100.1")]
    assert [edge.send(data).reason for data in sent] == [0, e.NAT_FULL]


def test_datagrams_leave_a_backend_that_is_gone(edge: Edge) -> None:
    edge.service(NODE4, PORT, f.UDP, [(t.IP4["r"], 80)])
    sent = packet(f.UDP, t.IP4["w"], NODE4, 40000, PORT)
    assert edge.send(sent).frame.dst == t.IP4["r"]
    edge.service(NODE4, PORT, f.UDP, [("10.2.0.21", 80)], base=2)
    assert edge.send(sent).frame.dst == t.IP4["r"], "while it lives"
    edge.lab.maps["backends_v1"].update(U32.pack(1), bytes(24))
    assert edge.send(sent).frame.dst == "10.2.0.21"
