"""Every translation of packets to Services and its reverse, as one table: each way that a Service
is reached, in IPv4 and IPv6, over TCP, UDP and SCTP, whole, in fragments, and as ICMP errors quote
it from either side. Checksums are those of a second implementation (`support/frames.py`).

The ways of docs/services.md; translation at sockets is in test_dp_sock, masquerade in
test_dp_masquerade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import NODE4, NODE6, OUTSIDE, RANGES, SNAT, Edge
from support.frames import ACK, SYN
from support.lab import DROP, HAIRPIN4, HAIRPIN6

pytestmark = pytest.mark.kernel
NODE = (NODE4, NODE6)
HAIRPIN = (HAIRPIN4, HAIRPIN6)
BALANCER = ("198.51.100.9", "2001:db8:100::9")
EXTERNAL = ("198.51.100.77", "2001:db8:100::77")
CLUSTER = (t.VIP4, t.VIP6)
ROUTER = ("203.0.113.1", "2001:db8:9::1")
SPORT = 40000
PROTOCOLS = {f.TCP: "TCP", f.UDP: "UDP", f.SCTP: "SCTP"}


@dataclass(frozen=True)
class Seen:
    verdict: int
    reason: int | None
    data: bytes

    @property
    def frame(self) -> f.Frame:
        return f.parse(self.data)


Hook = Callable[[Edge, bytes], Seen]


def at_pod(hook: str) -> Hook:
    def send(edge: Edge, data: bytes) -> Seen:
        found = edge.town.send(hook, data)
        return Seen(found.verdict, found.reason, found.data)

    return send


def at_uplink(program: str = "from_net", host: bool = False) -> Hook:
    def send(edge: Edge, data: bytes) -> Seen:
        found = edge.send(data, program=program, host=host)
        return Seen(found.verdict, found.reason, found.data)

    return send


@dataclass(frozen=True)
class Way:
    """`client` and `backend`: letters of the town, or "node". `vip`: the address asked, of each
    family. `seen`: whom the backend takes for the client; None: the client. `snat`: from a port of
    the node's. `asks`, `answers`: where packets of each side come in."""

    name: str
    client: str
    vip: tuple[str, str]
    backend: str
    asks: Hook
    answers: Hook
    seen: tuple[str, str] | None = None
    snat: bool = False
    flags: int | None = OUTSIDE
    routers: tuple[Hook | None, Hook | None] = (None, None)
    """Where a router's errors come in, about what is asked and about answers; None: there is none
    that could have seen the packet."""
    errors: bool = True

    def target(self, protocol: int) -> int:
        """SCTP's port is not translated: its CRC could not be patched."""
        return self.port if protocol == f.SCTP else 8080

    @property
    def port(self) -> int:
        return 30080 if self.vip == NODE else 80

    def open(self, edge: Edge, protocol: int, family: int) -> Ends:
        edge.open()
        backend = address(self.backend, family)
        behind = [(backend, self.target(protocol))]
        if self.flags is None:
            edge.town.lab.service(self.vip[family], self.port, protocol, behind)
        else:
            if self.flags & RANGES:
                edge.allow("192.0.2.0/24")
                edge.allow("2001:db8::/64")
            edge.service(self.vip[family], self.port, protocol, behind, flags=self.flags)
        client = address(self.client, family)
        source = client if self.seen is None else self.seen[family]
        return Ends(client, (self.vip[family], self.port), source, behind[0])


@dataclass
class Ends:
    """`sport`: of the client as the backend sees it."""

    client: str
    front: tuple[str, int]
    source: str
    back: tuple[str, int]
    sport: int = SPORT

    @property
    def asked(self) -> tuple[str, int, str, int]:
        return self.client, SPORT, *self.front

    @property
    def led(self) -> tuple[str, int, str, int]:
        return self.source, self.sport, *self.back


OUTER = (None, at_uplink())
BOTH = (at_uplink(), at_uplink())
WAYS = [
    Way("ClusterIP, a pod here", "a", CLUSTER, "b", at_pod("a>"), at_pod("b>"), flags=None),
    Way(
        "ClusterIP, a pod elsewhere", "a", CLUSTER, "r", at_pod("a>"), at_pod("a<"),
        flags=None, routers=(at_pod("a<"), None),
    ),
    Way(
        "ClusterIP, the pod itself", "b", CLUSTER, "b", at_pod("b>"), at_pod("b>"),
        seen=HAIRPIN, flags=None, errors=False,
    ),
    Way("NodePort of a pod's own node", "a", NODE, "b", at_pod("a>"), at_pod("b>")),
    Way("NodePort, a pod here", "w", NODE, "b", at_uplink(), at_pod("b>"), routers=OUTER),
    Way(
        "NodePort, elsewhere", "w", NODE, "r", at_uplink(), at_uplink(),
        seen=NODE, snat=True, routers=BOTH,
    ),
    Way(
        "NodePort, the node", "w", NODE, "node", at_uplink(), at_uplink("to_net", host=True),
        routers=OUTER,
    ),
    Way(
        "LoadBalancer, a pod here", "w", BALANCER, "b", at_uplink(), at_pod("b>"),
        flags=OUTSIDE | RANGES, routers=OUTER,
    ),
    Way(
        "LoadBalancer, elsewhere", "w", BALANCER, "r", at_uplink(), at_uplink(),
        seen=NODE, snat=True, flags=OUTSIDE | RANGES, routers=BOTH,
    ),
    Way("external IP, a pod here", "w", EXTERNAL, "b", at_uplink(), at_pod("b>"), routers=OUTER),
    Way(
        "external IP, elsewhere", "w", EXTERNAL, "r", at_uplink(), at_uplink(),
        seen=NODE, snat=True, routers=BOTH,
    ),
]  # fmt: skip


def address(name: str, family: int) -> str:
    return NODE[family] if name == "node" else t.ip_of(name, (4, 6)[family])


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with e.edge() as made:
        yield made


def each(*ways: Way) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", ways, ids=lambda way: way.name)


ALL = each(*WAYS)
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
TRANSPORTS = pytest.mark.parametrize("protocol", PROTOCOLS, ids=PROTOCOLS.get)


def segment(protocol: int, ends: tuple[str, int, str, int], flags: int, size: int = 9) -> bytes:
    """The transport's part of a packet from the first end to the second."""
    src, sport, dst, dport = ends
    if protocol == f.TCP:
        return f.tcp(src, dst, sport, dport, flags, b"x" * size)
    if protocol == f.UDP:
        return f.udp(src, dst, sport, dport, b"x" * size)
    # A DATA chunk (RFC 9260, 3.3.1).
    data = b"\0\3" + (16 + size).to_bytes(2, "big") + bytes(12) + b"x" * size
    return f.sctp(sport, dport, 7, data + bytes(-len(data) % 4))


def whole(protocol: int, ends: tuple[str, int, str, int], flags: int = SYN) -> bytes:
    return f.eth(f.ip(ends[0], ends[2], protocol, segment(protocol, ends, flags)))


def back(ends: tuple[str, int, str, int]) -> tuple[str, int, str, int]:
    return ends[2], ends[3], ends[0], ends[1]


def begin(way: Way, edge: Edge, protocol: int, family: int, packets: int = 3) -> Ends:
    """A flow, established by three packets; `sport` is learnt of the first one."""
    ends = way.open(edge, protocol, family)
    seen = way.asks(edge, whole(protocol, ends.asked))
    assert seen.reason in (0, None)
    if way.snat and protocol != f.SCTP:
        ends.sport = seen.frame.sport
        assert ends.sport in SNAT
    assert t.ends(seen.frame) == ends.led
    answer = way.answers(edge, whole(protocol, back(ends.led), SYN | ACK))
    assert t.ends(answer.frame) == back(ends.asked)
    if packets > 2:
        assert t.ends(way.asks(edge, whole(protocol, ends.asked, ACK)).frame) == ends.led
    return ends


@ALL
@FAMILIES
@TRANSPORTS
def test_there_and_back(edge: Edge, way: Way, family: int, protocol: int) -> None:
    """Ends are translated, and nothing else of the transport's part."""
    ends = begin(way, edge, protocol, family)
    for _ in range(2):
        for sent, hook, expected in (
            (ends.asked, way.asks, ends.led),
            (back(ends.led), way.answers, back(ends.asked)),
        ):
            data = whole(protocol, sent, ACK)
            seen = hook(edge, data)
            assert seen.verdict != DROP
            assert t.ends(seen.frame) == expected
            assert bare(seen.data, protocol) == bare(data, protocol)
        edge.lab.bump()


def bare(data: bytes, protocol: int) -> bytes:
    """The transport's part, without ports and checksum."""
    body = bytearray(data[f.parse(data).l4 :])
    at, size = {f.TCP: (16, 2), f.UDP: (6, 2), f.SCTP: (8, 4)}[protocol]
    body[:4] = bytes(4)
    body[at : at + size] = bytes(size)
    return bytes(body)


@ALL
@FAMILIES
@TRANSPORTS
def test_fragments(edge: Edge, way: Way, family: int, protocol: int) -> None:
    """Put together again they are the translated packet; both ways."""
    ends = begin(way, edge, protocol, family)
    for ident, (sent, hook, expected) in enumerate(
        (
            (ends.asked, way.asks, ends.led),
            (back(ends.led), way.answers, back(ends.asked)),
        ),
        start=11,
    ):
        body = segment(protocol, sent, ACK, 300)
        found = [hook(edge, data) for data in pieces(sent, protocol, body, ident)]
        assert len(found) > 2
        assert DROP not in {seen.verdict for seen in found}
        assert all(seen.frame.ip_check == ("none" if family else "ok") for seen in found)
        assert {(s.frame.src, s.frame.dst) for s in found} == {(expected[0], expected[2])}
        joined = b"".join(seen.data[seen.frame.l4 :] for seen in found)
        data = f.eth(f.ip(expected[0], expected[2], protocol, joined))
        assert t.ends(f.parse(data)) == expected
        assert len(joined) == len(body)


def pieces(
    ends: tuple[str, int, str, int], protocol: int, body: bytes, ident: int
) -> Sequence[bytes]:
    src, _, dst, _ = ends
    if ":" in src:
        return [f.eth(p) for p in f.fragment6(f.IPv6(src, dst, protocol, body), 104, ident)]
    return [f.eth(p) for p in f.fragment4(f.IPv4(src, dst, protocol, body, ident=ident), 104)]


@each(*(way for way in WAYS if way.errors))
@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("router", [False, True], ids=["the end", "a router"])
@pytest.mark.parametrize("packets", [3, 2], ids=["established", "answered once"])
def test_icmp_errors(
    edge: Edge, way: Way, family: int, protocol: int, router: bool, packets: int
) -> None:
    """About a packet as its receiver, or a router on its way, has seen it: whoever sent it is told
    of the packet that it sent. A router behind the node stays itself."""
    ends = begin(way, edge, protocol, family, packets)
    hooks = way.routers if router else (way.answers, way.asks)
    abouts = ((ends.led, ends.asked), (back(ends.asked), back(ends.led)))
    for (quoted, expected), hook in zip(abouts, hooks, strict=True):
        if hook is None:
            continue
        src = ROUTER[family] if router else quoted[2]
        packet = f.ip(quoted[0], quoted[2], protocol, segment(protocol, quoted, ACK))
        seen = hook(edge, error(src, quoted[0], packet))
        assert seen.verdict != DROP, (seen.reason, quoted)
        frame, q = seen.frame, seen.frame.inner
        assert q is not None
        assert frame.l4_check == "ok"
        assert (frame.ip_check, q.ip_check) == (("ok", "ok"), ("none", "none"))[family]
        assert (frame.src, frame.dst) == (src if router else expected[2], expected[0])
        assert (q.src, q.sport, q.dst, q.dport) == expected


def error(src: str, dst: str, quoted: bytes) -> bytes:
    """Destination unreachable: the port."""
    if ":" in src:
        return f.eth(f.ip(src, dst, f.ICMPV6, f.icmpv6_error(src, dst, 1, 4, quoted)))
    return f.eth(f.ip(src, dst, f.ICMP, f.icmp_error(3, 3, quoted)))
