"""Pods' packets to the world as they leave by the uplink, and what comes back for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import MASQUERADED, NAT_FULL, NODE4, NODE6, SNAT, Edge
from support.frames import ACK, FIN, RST, SYN
from support.lab import DROP, PASS, U32
from support.town import ends, packet

pytestmark = pytest.mark.kernel
NODE = {4: NODE4, 6: NODE6}
WORLD = {4: t.IP4["w"], 6: t.IP6["w"]}
OUT = (PASS, MASQUERADED)


@pytest.fixture(scope="module")
def made() -> Iterator[Edge]:
    with e.edge() as found:
        yield found


@pytest.fixture
def edge(made: Edge) -> Edge:
    made.open()
    made.masquerade()
    return made


def leave(edge: Edge, data: bytes) -> e.Out:
    return edge.send(data, program="to_net")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_there_and_back(edge: Edge, protocol: int, version: int) -> None:
    a, n, w = t.ip_of("a", version), NODE[version], WORLD[version]
    port = None
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False), (ACK, True), (FIN, False)):
        if not back:
            seen = leave(edge, packet(protocol, a, w, 40000, 443, flags))
            src, sport, *rest = ends(seen.frame)
            assert (src, *rest) == (n, w, 443)
            assert port in (None, sport), "the flow keeps its port"
            port = sport
            assert port == 40000 if protocol == f.SCTP else port in SNAT
        else:
            seen = edge.send(packet(protocol, w, n, 443, port or 0, flags))
            assert ends(seen.frame) == (w, 443, a, 40000)
        assert (seen.verdict, seen.reason) == OUT, "the stack carries it on"
        assert seen.frame.ttl == 64
    assert edge.nat() == 2


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ident", [0, 7, 40000])
def test_echo(edge: Edge, ident: int, version: int) -> None:
    protocol = f.ICMP if version == 4 else f.ICMPV6
    a, n, w = t.ip_of("a", version), NODE[version], WORLD[version]
    seen = leave(edge, f.eth(f.ip(a, w, protocol, f.echo(a, w, ident))))
    assert (seen.verdict, seen.reason, seen.frame.valid) == (*OUT, True)
    assert (seen.frame.src, seen.frame.dst) == (n, w)
    given = seen.frame.icmp_ident
    assert given in SNAT
    again = leave(edge, f.eth(f.ip(a, w, protocol, f.echo(a, w, ident, 2))))
    assert again.frame.icmp_ident == given
    back = edge.send(f.eth(f.ip(w, n, protocol, f.echo(w, n, given, reply=True))))
    assert (back.verdict, back.reason, back.frame.valid) == (*OUT, True)
    assert (back.frame.src, back.frame.dst, back.frame.icmp_ident) == (w, a, ident)
    other = f.eth(f.ip(w, n, protocol, f.echo(w, n, given ^ 1, reply=True)))
    assert edge.send(other).data == other, "the node's own"


def test_two_pods_with_one_port_are_two_flows(edge: Edge) -> None:
    ports = {}
    for name in "ab":
        for sport in (40000, 40001):
            seen = leave(edge, packet(f.TCP, t.IP4[name], t.IP4["w"], sport, 443))
            ports[seen.frame.sport] = (t.IP4[name], sport)
    assert len(ports) == 4
    for port, (address, sport) in ports.items():
        seen = edge.send(packet(f.TCP, t.IP4["w"], NODE4, 443, port, SYN | ACK))
        assert ends(seen.frame) == (t.IP4["w"], 443, address, sport)


def test_what_keeps_its_address(edge: Edge) -> None:
    """Within the cluster, into networks that are left out, what is nobody's here, and what
    has no ports."""
    edge.masquerade("198.51.100.0/24", "2001:db8:1::/48")
    a, w = t.IP4["a"], t.IP4["w"]
    for why, data in (
        ("a pod elsewhere", packet(f.TCP, a, t.IP4["r"], 1, 80)),
        ("a pod that nobody has published", packet(f.TCP, a, t.IP4["u"], 1, 80)),
        ("a node", packet(f.TCP, a, t.IP4["n"], 1, 80)),
        ("left out", packet(f.TCP, a, "198.51.100.7", 1, 80)),
        ("left out", packet(f.TCP, t.IP6["a"], "2001:db8:1::7", 1, 80)),
        ("not of a pod here", packet(f.TCP, t.IP4["r"], w, 1, 80)),
        ("the node's own", packet(f.TCP, NODE4, w, 1, 80)),
        ("an echo's answer", f.eth(f.ip(a, w, f.ICMP, f.echo(a, w, 5, reply=True)))),
        ("a timestamp", f.eth(f.ip(a, w, f.ICMP, f.icmp(13, 0)))),
        ("no ports", f.eth(f.ip(a, w, f.ESP, bytes(20)))),
        ("ARP", f.eth(f.arp(1, f.MAC_A, a, f.MAC_B, w), ethertype=f.ETH_ARP)),
        ("broken", f.eth(b"\x43" + bytes(30))),
    ):
        seen = leave(edge, data)
        assert (seen.verdict, seen.reason, seen.data) == (PASS, None, data), why
    assert edge.nat() == 0
    assert (leave(edge, packet(f.TCP, a, w, 1, 80)).reason) == MASQUERADED


def test_off(edge: Edge) -> None:
    for key in list(edge.maps["masquerade_v1"].keys()):
        edge.maps["masquerade_v1"].discard(key)
    data = packet(f.TCP, t.IP4["a"], t.IP4["w"], 1, 80)
    assert leave(edge, data).data == data


@pytest.mark.parametrize("settled", [False, True])
def test_who_asked_for_the_pod_is_answered_by_it(edge: Edge, settled: bool) -> None:
    """A client outside that reaches the pod's own address, from the first answer on."""
    a, w = t.IP4["a"], t.IP4["w"]
    assert edge.town.reason("a<", packet(f.TCP, w, a, 5000, 80)) == 0
    answer = packet(f.TCP, a, w, 80, 5000, SYN | ACK)
    assert edge.town.reason("a>", answer) == 0
    if settled:
        assert edge.town.reason("a<", packet(f.TCP, w, a, 5000, 80, ACK)) == 0
        answer = packet(f.TCP, a, w, 80, 5000, ACK)
        assert edge.town.reason("a>", answer) == 0
    assert leave(edge, answer).data == answer
    assert edge.town.reason("a>", packet(f.TCP, a, w, 5000, 80)) == 0
    assert leave(edge, packet(f.TCP, a, w, 5000, 80)).reason == MASQUERADED, "the other way"


def test_a_network_left_out_later_keeps_the_flows_there_are(edge: Edge) -> None:
    a, w = t.IP4["a"], t.IP4["w"]
    first = leave(edge, packet(f.TCP, a, w, 40000, 80)).frame.sport
    edge.masquerade("192.0.2.0/24")
    assert leave(edge, packet(f.TCP, a, w, 40000, 80, ACK)).frame.sport == first
    data = packet(f.TCP, a, w, 40001, 80)
    assert leave(edge, data).data == data


def test_ports_run_out_aloud_and_come_back(edge: Edge) -> None:
    edge.load(snat_first=20000, snat_last=20015)
    a, w = t.IP4["a"], t.IP4["w"]
    ports, refused = set(), 0
    for sport in range(1000, 1040):
        seen = leave(edge, packet(f.TCP, a, w, sport, 443))
        if seen.reason == NAT_FULL:
            assert seen.verdict == DROP
            refused += 1
            continue
        assert seen.frame.sport not in ports
        ports.add(seen.frame.sport)
    assert (ports, refused) == (set(range(20000, 20016)), 24)
    event = edge.town.events()[-1]
    assert (event.reason, event.direction, event.endpoint) == (NAT_FULL, t.EGRESS, 1)
    # Another destination has ports of its own.
    assert leave(edge, packet(f.TCP, a, "192.0.2.9", 1000, 443)).reason == MASQUERADED
    leave(edge, packet(f.TCP, a, w, 1000, 443, RST))
    edge.age(1000)
    assert leave(edge, packet(f.TCP, a, w, 5000, 443)).reason == MASQUERADED
    edge.load()


def test_without_an_address_of_the_node_nothing_leaves(edge: Edge) -> None:
    edge.maps["node_source_v1"].update(U32.pack(0), bytes(24))
    seen = leave(edge, packet(f.TCP, t.IP4["a"], t.IP4["w"], 1, 80))
    assert (seen.verdict, seen.reason) == (DROP, e.NO_ROUTE)


def test_a_pods_address_from_outside_is_not_taken_for_the_pod(edge: Edge) -> None:
    """The entry of the way out says nothing of what comes in."""
    a, w = t.IP4["a"], t.IP4["w"]
    leave(edge, packet(f.TCP, a, w, 40000, 20000))
    data = packet(f.TCP, a, w, 40000, 20000, ACK)
    assert edge.send(data).data == data


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.UDP, f.ICMP])
def test_fragments(edge: Edge, protocol: int, version: int) -> None:
    """Each has the node's address; the first one has port or identifier."""
    a, n, w = t.ip_of("a", version), NODE[version], WORLD[version]
    kind = protocol if protocol == f.UDP or version == 4 else f.ICMPV6
    if protocol == f.UDP:
        body = f.udp(a, w, 40000, 443, b"x" * 300)
    elif version == 4:
        body = f.icmp(8, 0, b"\0\7\0\1", b"x" * 300)
    else:
        body = f.icmpv6(a, w, 128, 0, b"\0\7\0\1", b"x" * 300)
    whole = together([leave(edge, p) for p in pieces(version, a, w, kind, body)], n, w, kind)
    port = whole.sport if protocol == f.UDP else whole.icmp_ident
    assert port in SNAT
    if protocol == f.UDP:
        body = f.udp(w, n, 443, port, b"y" * 300)
    elif version == 4:
        body = f.icmp(0, 0, port.to_bytes(2, "big") + b"\0\1", b"y" * 300)
    else:
        body = f.icmpv6(w, n, 129, 0, port.to_bytes(2, "big") + b"\0\1", b"y" * 300)
    whole = together([edge.send(p) for p in pieces(version, w, n, kind, body)], w, a, kind)
    assert whole.dport == 40000 if protocol == f.UDP else whole.icmp_ident == 7
    late = pieces(version, a, w, kind, body, 99)[1]
    assert leave(edge, late).reason == t.FRAGMENT, "without its first it has no port"


def together(found: list[e.Out], src: str, dst: str, protocol: int) -> f.Frame:
    """Of fragments that all go from `src` to `dst`; its checksum holds."""
    assert {(x.frame.src, x.frame.dst) for x in found} == {(src, dst)}
    joined = b"".join(x.data[x.frame.l4 :] for x in found)
    whole = f.parse(f.eth(f.ip(src, dst, protocol, joined)))
    assert whole.valid, whole.l4_check
    return whole


def pieces(
    version: int, src: str, dst: str, protocol: int, body: bytes, ident: int = 1
) -> list[bytes]:
    if version == 4:
        return [f.eth(p) for p in f.fragment4(f.IPv4(src, dst, protocol, body, ident=ident), 104)]
    whole = f.IPv6(src, dst, protocol, body)
    return [f.eth(p) for p in f.fragment6(whole, 104, ident)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.UDP, f.ICMP])
@pytest.mark.parametrize("router", [False, True])
def test_errors_about_what_was_sent(edge: Edge, protocol: int, version: int, router: bool) -> None:
    """Of its receiver or of a router on the way: the pod is told of what it sent."""
    a, n, w = t.ip_of("a", version), NODE[version], WORLD[version]
    kind = protocol if protocol == f.UDP or version == 4 else f.ICMPV6
    ask = f.udp(a, w, 40000, 443, b"x") if protocol == f.UDP else f.echo(a, w, 7)
    quoted = leave(edge, f.eth(f.ip(a, w, kind, ask))).data[14:]
    src = w if not router else ("203.0.113.1" if version == 4 else "2001:db8:9::1")
    seen = edge.send(error(version, src, n, quoted))
    assert (seen.verdict, seen.reason) == (PASS, 0)
    frame, q = seen.frame, seen.frame.inner
    assert q is not None
    assert (frame.src, frame.dst, frame.l4_check) == (src, a, "ok")
    assert (q.src, q.dst) == (a, w)
    assert q.ip_check == ("ok" if version == 4 else "none")
    assert (q.sport, q.dport) == (40000, 443) if protocol == f.UDP else q.icmp_ident == 7


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_what_came_back(edge: Edge, version: int) -> None:
    """The pod's own, as its port is closed: the other end hears of the node's port."""
    a, n, w = t.ip_of("a", version), NODE[version], WORLD[version]
    port = leave(edge, packet(f.UDP, a, w, 40000, 443)).frame.sport
    quoted = f.ip(w, a, f.UDP, f.udp(w, a, 443, 40000, b"x"))
    seen = leave(edge, error(version, a, w, quoted))
    frame, q = seen.frame, seen.frame.inner
    assert q is not None
    assert (seen.verdict, frame.src, frame.dst, frame.l4_check) == (PASS, n, w, "ok")
    assert (q.src, q.sport, q.dst, q.dport) == (w, 443, n, port)


def error(version: int, src: str, dst: str, quoted: bytes) -> bytes:
    if version == 4:
        return f.eth(f.ip(src, dst, f.ICMP, f.icmp_error(3, 3, quoted)))
    return f.eth(f.ip(src, dst, f.ICMPV6, f.icmpv6_error(src, dst, 1, 4, quoted)))
