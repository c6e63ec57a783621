"""NodePorts and other outer addresses: what comes in at a node's uplink, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import LOCAL, NODE4, NODE6, OUTSIDE, RANGES, SNAT, Edge
from support.frames import ACK, FIN, RST, SYN
from support.lab import DROP, PASS, REDIRECT, U32, Rules
from support.town import ends, packet

pytestmark = pytest.mark.kernel
NODE = {4: NODE4, 6: NODE6}
PORT = 30080
CLIENT = {4: t.IP4["w"], 6: t.IP6["w"]}


@pytest.fixture(scope="module", params=["tc", "xdp"])
def made(request: pytest.FixtureRequest) -> Iterator[Edge]:
    """At tc alone, and with XDP before it: the same packets have the same fate."""
    with e.edge(xdp=request.param == "xdp") as found:
        yield found


@pytest.fixture
def edge(made: Edge) -> Edge:
    made.open()
    return made


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_backend_here_sees_the_client(edge: Edge, protocol: int, version: int) -> None:
    w, n, b = CLIENT[version], NODE[version], t.ip_of("b", version)
    target = PORT if protocol == f.SCTP else 8080
    edge.service(n, PORT, protocol, [(b, target)])
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False), (ACK, True), (ACK, False)):
        if not back:
            seen = edge.send(packet(protocol, w, n, 40000, PORT, flags))
            assert (seen.verdict, seen.reason) == (REDIRECT, 0)
            assert seen.data[:6] == edge.town.pods["b"].mac
            assert ends(seen.data) == (w, 40000, b, target)
        else:
            answer = edge.town.send("b>", packet(protocol, b, w, target, 40000, flags))
            assert answer.verdict == REDIRECT, "past the stack, which would not forward it"
            assert ends(answer.data) == (n, PORT, w, 40000)
    assert edge.nat() == 0
    edge.lab.bump()
    answer = edge.town.send("b>", packet(protocol, b, w, target, 40000, ACK))
    assert (answer.verdict, ends(answer.data)) == (REDIRECT, (n, PORT, w, 40000))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_backend_elsewhere_sees_this_node(edge: Edge, protocol: int, version: int) -> None:
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    target = PORT if protocol == f.SCTP else 8080
    edge.service(n, PORT, protocol, [(r, target)])
    port = None
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False), (ACK, True), (FIN, False)):
        if not back:
            seen = edge.send(packet(protocol, w, n, 40000, PORT, flags))
            source = ends(seen.data)
            assert (source[0], *source[2:]) == (n, r, target)
            assert port in (None, source[1]), "the flow keeps its port"
            port = source[1]
            assert port == 40000 if protocol == f.SCTP else port in SNAT
        else:
            seen = edge.send(packet(protocol, r, n, target, port or 0, flags))
            assert ends(seen.data) == (n, PORT, w, 40000)
        assert (seen.verdict, seen.reason) == (REDIRECT, 0)
        assert seen.data[:6] == f.mac_bytes("02:00:00:00:00:fe")
        assert seen.frame.ttl == 63
    assert edge.nat() == 2


@pytest.mark.parametrize("version", [4, 6])
def test_backend_that_is_the_node(edge: Edge, version: int) -> None:
    """A host-network pod: the stack gets it with the client's address, its answers go back."""
    w, n = CLIENT[version], NODE[version]
    edge.service(n, PORT, f.TCP, [(n, 6443)])
    seen = edge.send(packet(f.TCP, w, n, 40000, PORT))
    assert (seen.verdict, ends(seen.data)) == (PASS, (w, 40000, n, 6443))
    answer = packet(f.TCP, n, w, 6443, 40000, SYN | ACK)
    seen = edge.send(answer, program="to_net", host=True)
    assert (seen.verdict, ends(seen.data)) == (PASS, (n, PORT, w, 40000))
    seen = edge.send(answer, program="to_net")
    assert seen.data == answer, "what is forwarded is left alone"


def test_what_is_for_no_service_passes_untouched(edge: Edge) -> None:
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["b"], 80)])
    edge.town.lab.service(t.VIP4, 80, f.TCP, [(t.IP4["c"], 80)], base=9)
    w = t.IP4["w"]
    for why, data in (
        ("another port", packet(f.TCP, w, NODE4, 1, PORT + 1)),
        ("another protocol", packet(f.UDP, w, NODE4, 1, PORT)),
        ("a ClusterIP", packet(f.TCP, w, t.VIP4, 1, 80)),
        ("to a pod", packet(f.TCP, w, t.IP4["b"], 1, 80)),
        ("an echo", f.eth(f.ip(w, NODE4, f.ICMP, f.icmp(8, 0)))),
        ("ARP", f.eth(f.arp(1, f.MAC_A, w, f.MAC_B, NODE4), ethertype=f.ETH_ARP)),
        ("broken", f.eth(b"\x43" + bytes(30))),
        ("another host's", b"\x02\0\0\0\0\x77" + packet(f.TCP, w, NODE4, 1, PORT)[6:]),
    ):
        seen = edge.send(data)
        assert (seen.verdict, seen.reason, seen.data) == (PASS, None, data), why


@pytest.mark.parametrize("backend", ["b", "r"])
def test_what_is_asked_is_counted_once_a_flow(edge: Edge, backend: str) -> None:
    """Also where the backend is elsewhere."""
    edge.service(NODE4, PORT, f.UDP, [(t.IP4[backend], 80)])
    before = edge.lab.asked(NODE4, PORT, f.UDP)
    for sport in (40000, 40000, 40001):
        assert edge.send(packet(f.UDP, t.IP4["w"], NODE4, sport, PORT)).reason == 0
    edge.service(NODE4, PORT, f.UDP, [], elsewhere=False)
    assert edge.send(packet(f.UDP, t.IP4["w"], NODE4, 40002, PORT)).reason == t.NO_BACKEND
    connections, refused = edge.lab.asked(NODE4, PORT, f.UDP)
    assert (connections - before[0], refused - before[1]) == (2, 1)


def test_policy_sees_the_client(edge: Edge) -> None:
    """Of a backend here; a spoofed pod is none of them."""
    w, b = t.IP4["w"], t.IP4["b"]
    for why, rules, expected in (
        ("nobody may", Rules(), t.POLICY),
        ("the client's network may", t.rules((t.CLASS | 1, 0, 0, 0), cidr={"192.0.2.0/24": 1}), 0),
        ("pods may", t.rules(t.from_("a")), t.POLICY),
        ("anybody, on the backend's port", t.rules((t.ANY, f.TCP, 8080, 24)), 0),
        ("anybody, on the node's port", t.rules((t.ANY, f.TCP, PORT, 24)), t.POLICY),
    ):
        edge.open()
        edge.town.switch({"b<": rules})
        edge.service(NODE4, PORT, f.TCP, [(b, 8080)])
        assert edge.send(packet(f.TCP, w, NODE4, 40000, PORT)).reason == expected, why
    spoofed = edge.send(packet(f.TCP, t.IP4["a"], NODE4, 40000, PORT))
    assert (spoofed.verdict, spoofed.reason) == (DROP, t.SOURCE)


def test_revoked_while_established(edge: Edge) -> None:
    w, b = t.IP4["w"], t.IP4["b"]
    edge.service(NODE4, PORT, f.TCP, [(b, 8080)])
    edge.send(packet(f.TCP, w, NODE4, 40000, PORT))
    edge.town.send("b>", packet(f.TCP, b, w, 8080, 40000, SYN | ACK))
    assert edge.send(packet(f.TCP, w, NODE4, 40000, PORT, ACK)).reason == 0
    edge.town.switch({"b<": Rules()})
    assert edge.send(packet(f.TCP, w, NODE4, 40000, PORT, ACK)).reason == t.POLICY
    assert edge.town.reason("b>", packet(f.TCP, b, w, 8080, 40000, ACK)) == t.POLICY


@pytest.mark.parametrize("version", [4, 6])
def test_nobody_serves_it(edge: Edge, version: int) -> None:
    """Refused at once; in silence where only other nodes have backends."""
    w, n = CLIENT[version], NODE[version]
    sent = packet(f.TCP, w, n, 40000, PORT)
    edge.service(n, PORT, f.TCP, [], elsewhere=False)
    seen = edge.send(sent)
    assert (seen.verdict, seen.reason, seen.frame.tcp_flags) == (REDIRECT, t.NO_BACKEND, RST | ACK)
    assert ends(seen.data) == (n, PORT, w, 40000)
    edge.service(n, PORT, f.TCP, [], flags=OUTSIDE | LOCAL, elsewhere=True)
    assert (edge.send(sent).verdict, edge.send(sent).data) == (DROP, sent)


@pytest.mark.parametrize(
    ("inside", "outside", "flags", "reason"),
    [
        (["r"], [], OUTSIDE | LOCAL, t.NO_BACKEND),
        (["b", "r"], ["b"], OUTSIDE | LOCAL, 0),
        (["r"], None, OUTSIDE, 0),
    ],
)
def test_external_traffic_policy_local(
    edge: Edge, inside: list[str], outside: list[str] | None, flags: int, reason: int
) -> None:
    lists = [[(t.IP4[x], 80) for x in names or []] for names in (inside, outside)]
    edge.service(
        NODE4, PORT, f.TCP, lists[0], outside=None if outside is None else lists[1], flags=flags
    )
    for sport in range(40000, 40020):
        seen = edge.send(packet(f.TCP, t.IP4["w"], NODE4, sport, PORT))
        assert seen.reason == reason
        if not reason:
            assert seen.frame.dst == t.IP4[(outside or inside)[0]]
    # A pod here means every backend.
    found = {
        edge.town.send("a>", packet(f.TCP, t.IP4["a"], NODE4, sport, PORT)).frame.dst
        for sport in range(40000, 40040)
    }
    assert found == {t.IP4[name] for name in inside}


def test_source_ranges(edge: Edge) -> None:
    edge.service(t.VIP4, 80, f.TCP, [(t.IP4["b"], 80)], flags=OUTSIDE | RANGES)
    edge.allow("192.0.2.0/25")
    edge.allow("198.51.100.0/24", number=8)
    for src, reason in (
        ("192.0.2.8", 0),
        ("192.0.2.200", e.SOURCE_RANGE),
        ("198.51.100.1", e.SOURCE_RANGE),
    ):
        assert edge.send(packet(f.TCP, src, t.VIP4, 40000, 80)).reason == reason, src


@pytest.mark.parametrize("backend", [t.IP4["b"], t.IP4["r"], NODE4])
def test_a_range_that_is_narrowed_cuts_who_is_left_out(edge: Edge, backend: str) -> None:
    """Whose flow is established too, and nobody else's; so does a Service that gets ranges."""
    table = edge.maps["source_ranges_v1"]
    edge.service(t.VIP4, 80, f.TCP, [(backend, 80)])
    clients = ("192.0.2.8", "192.0.2.200")

    def reasons(flags: int) -> list[int | None]:
        return [edge.send(packet(f.TCP, c, t.VIP4, 40000, 80, flags)).reason for c in clients]

    assert reasons(SYN) == [0, 0]
    for client in clients:
        answer = packet(f.TCP, backend, client, 80, 40000, SYN | ACK)
        if backend == t.IP4["b"]:
            assert edge.town.reason("b>", answer) == 0
    assert reasons(ACK) == [0, 0]
    edge.allow("192.0.2.0/25")
    edge.service(t.VIP4, 80, f.TCP, [(backend, 80)], flags=OUTSIDE | RANGES)
    assert reasons(ACK) == [0, e.SOURCE_RANGE]
    for key in list(table.keys()):
        table.discard(key)
    assert reasons(ACK) == [e.SOURCE_RANGE] * 2
    edge.allow("192.0.2.0/24")
    assert reasons(ACK) == [0, 0], "and goes on where it is let in again"


@pytest.mark.parametrize("backend", [t.IP4["b"], t.IP4["r"]])
@pytest.mark.parametrize("port", [80, SNAT[0]])
def test_an_address_that_goes_takes_its_flows_with_it(edge: Edge, port: int, backend: str) -> None:
    """Also where its port is one of those that answers come back to."""
    edge.service(t.VIP4, port, f.TCP, [(backend, 80)])
    edge.send(packet(f.TCP, t.IP4["w"], t.VIP4, 40000, port))
    data = packet(f.TCP, t.IP4["w"], t.VIP4, 40000, port, ACK)
    if backend == t.IP4["b"]:
        edge.town.send("b>", packet(f.TCP, backend, t.IP4["w"], 80, 40000, SYN | ACK))
    assert edge.send(data).reason == 0
    table = edge.lab.maps["frontends_v1"]
    for key in list(table.keys()):
        table.discard(key)
    assert (edge.send(data).verdict, edge.send(data).data) == (PASS, data)


def test_affinity_outside_and_in_a_pod(edge: Edge) -> None:
    backends = [(f"10.2.1.{n}", 80) for n in range(1, 7)]
    edge.service(NODE4, PORT, f.TCP, backends, flags=OUTSIDE | e.AFFINITY, affinity=60)

    def where(src: str, sport: int) -> str:
        data = packet(f.TCP, src, NODE4, sport, PORT)
        return (
            edge.send(data).frame.dst if src != t.IP4["a"] else edge.town.send("a>", data).frame.dst
        )

    clients = [f"192.0.2.{n}" for n in range(1, 30)] + [t.IP4["a"]]
    chosen = {src: where(src, 1000) for src in clients}
    assert len(set(chosen.values())) > 3, "clients are spread"
    assert all(where(src, sport) == chosen[src] for src in clients for sport in range(2000, 2004))
    # A backend that is gone is no client's any more, and a list may shrink under them.
    gone = chosen[clients[0]]
    left = [b for b in backends if b[0] != gone]
    edge.service(NODE4, PORT, f.TCP, left, flags=OUTSIDE | e.AFFINITY, affinity=60, base=7)
    assert where(clients[0], 3000) != gone
    # An entry of another key, or too old, is none.
    table = edge.maps["affinity_v1"]
    for key, value in list(table.items()):
        word = int.from_bytes(value, "little")
        table.update(key, (word ^ 1 << 30).to_bytes(8, "little"))
    assert len({where(clients[1], sport) for sport in (5000, 5001)}) == 1
    for key, value in list(table.items()):
        word = int.from_bytes(value, "little")
        table.update(key, ((word - (16 << 48)) & (1 << 64) - 1).to_bytes(8, "little"))
    spread = set()
    for sport in range(6000, 6020):
        for key in list(table.keys()):
            table.discard(key)
        spread.add(where(clients[1], sport))
    assert len(spread) > 1


def test_on_a_ring_a_client_has_one_place(edge: Edge) -> None:
    """At whatever address of the Service: so every node finds the same backend."""
    backends = [(f"10.2.1.{n}", 80) for n in range(1, 9)]
    for base, vip in ((1, NODE4), (9, "198.51.100.1")):
        edge.service(vip, PORT, f.TCP, backends, flags=OUTSIDE | e.RING, base=base)
    seen = set()
    for sport in range(1000, 1040):
        one, other = (
            edge.send(packet(f.TCP, t.IP4["w"], vip, sport, PORT)).frame.dst
            for vip in (NODE4, "198.51.100.1")
        )
        assert one == other
        seen.add(one)
    assert len(seen) > 4


def flow(edge: Edge, sport: int, flags: int = SYN) -> tuple[str, int, str, int]:
    seen = edge.send(packet(f.TCP, t.IP4["w"], NODE4, sport, PORT, flags))
    assert seen.reason == 0
    return ends(seen.data)


def test_ports_never_collide_and_run_out_aloud(edge: Edge) -> None:
    """Every port of the range once, and then a reason of its own."""
    edge.load(snat_first=20000, snat_last=20015)
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 80)])
    ports, refused = set(), 0
    for sport in range(1000, 1040):
        seen = edge.send(packet(f.TCP, t.IP4["w"], NODE4, sport, PORT))
        if seen.reason:
            assert (seen.verdict, seen.reason) == (DROP, e.NAT_FULL)
            refused += 1
            continue
        port = seen.frame.sport
        assert port not in ports
        assert 20000 <= port <= 20015
        ports.add(port)
    assert len(ports) == 16
    assert refused == 24
    # A flow that has ended makes room: a reset, and time.
    edge.send(packet(f.TCP, t.IP4["w"], NODE4, 1000, PORT, RST))
    edge.age(1000)
    assert edge.send(packet(f.TCP, t.IP4["w"], NODE4, 5000, PORT)).reason == 0
    edge.load()


def test_a_port_rests_as_long_as_the_backend_may_keep_its_connection(edge: Edge) -> None:
    """A SYN of another client would meet it there and be dropped; after a reset nothing is kept."""
    edge.load(snat_first=20000, snat_last=20015)
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 80)])
    ports = {sport: flow(edge, sport)[1] for sport in range(1000, 1016)}
    for sport, port in ports.items():
        if sport == 1007:
            flow(edge, sport, RST)
            continue
        flow(edge, sport, FIN | ACK)
        answer = packet(f.TCP, t.IP4["r"], NODE4, 80, port, FIN | ACK)
        assert edge.send(answer).reason == 0
    edge.age(20)
    assert flow(edge, 2000)[1] == ports[1007], "the only one that nobody may keep"
    assert flow(edge, 2001)[1] in ports.values(), "rather one that rests than none"
    edge.load()


def test_a_closed_flow_chooses_anew(edge: Edge) -> None:
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 80)])
    first = flow(edge, 40000)
    assert flow(edge, 40000) == first, "a SYN sent again"
    flow(edge, 40000, RST)
    edge.service(NODE4, PORT, f.TCP, [("10.2.0.21", 80)], base=2)
    assert flow(edge, 40000, ACK)[2] == t.IP4["r"]
    assert flow(edge, 40000)[2] == "10.2.0.21"


def test_udp_leaves_a_backend_that_is_gone(edge: Edge) -> None:
    edge.service(NODE4, PORT, f.UDP, [(t.IP4["r"], 80)])
    sent = packet(f.UDP, t.IP4["w"], NODE4, 40000, PORT)
    assert edge.send(sent).frame.dst == t.IP4["r"]
    edge.service(NODE4, PORT, f.UDP, [("10.2.0.21", 80)], base=2)
    assert edge.send(sent).frame.dst == t.IP4["r"], "while it lives"
    edge.lab.maps["backends_v1"].update(U32.pack(1), bytes(24))
    assert edge.send(sent).frame.dst == "10.2.0.21"


def test_an_entry_of_another_flow_is_none(edge: Edge) -> None:
    """As when an element is recycled under its reader: the word proves the key."""
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 80)])
    port = flow(edge, 40000)[1]
    for key, value in list(edge.maps["nat_v1"].items()):
        edge.maps["nat_v1"].update(key, bytes([value[0] ^ 1]) + value[1:])
    answer = packet(f.TCP, t.IP4["r"], NODE4, 80, port, SYN | ACK)
    assert edge.send(answer).data == answer
    lost = edge.send(packet(f.TCP, t.IP4["r"], NODE4, 80, port, ACK))
    assert (lost.verdict, lost.reason) == (PASS, e.NAT_LOST), "counted, not hidden"


def test_no_room_to_live_and_no_way(edge: Edge) -> None:
    edge.service(NODE4, PORT, f.TCP, [(t.IP4["r"], 80)])
    sent = bytearray(packet(f.TCP, t.IP4["w"], NODE4, 40000, PORT))
    sent[22] = 1
    sent[24:26] = bytes(2)
    sent[24:26] = f.checksum(bytes(sent[14:34])).to_bytes(2, "big")
    assert edge.send(bytes(sent)).reason == e.TTL
    edge.maps["node_source_v1"].update(U32.pack(0), bytes(24))
    assert edge.send(packet(f.TCP, t.IP4["w"], NODE4, 40001, PORT)).reason == e.NO_ROUTE


@pytest.mark.parametrize("backend", ["b", "r"])
def test_fragments(edge: Edge, backend: str) -> None:
    edge.service(NODE4, PORT, f.UDP, [(t.IP4[backend], 80)])
    w = t.IP4["w"]
    whole = f.IPv4(w, NODE4, f.UDP, f.udp(w, NODE4, 40000, PORT, b"x" * 300))
    pieces = [f.eth(p) for p in f.fragment4(whole, 104)]
    found = [edge.send(p) for p in pieces]
    assert {p.verdict for p in found} == {REDIRECT}
    assert {p.frame.dst for p in found} == {t.IP4[backend]}
    assert {p.frame.src for p in found} == {w if backend == "b" else NODE4}
    assert all(p.frame.ip_check == "ok" for p in found)


@pytest.mark.parametrize("version", [4, 6])
def test_icmp_errors_find_their_way(edge: Edge, version: int) -> None:
    """From the client's side and from the backend's, about translated packets."""
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    edge.service(n, PORT, f.UDP, [(r, 80)])
    seen = edge.send(packet(f.UDP, w, n, 40000, PORT))
    port = seen.frame.sport
    forward, back = quote(n, r, port, 80), quote(n, w, PORT, 40000)
    for src, dst, quoted, outer, inner in (
        (r, n, forward, (n, w), (w, 40000, n, PORT)),
        (w, n, back, (n, r), (r, 80, n, port)),
    ):
        got = edge.send(error(version, src, dst, quoted))
        assert got.reason == 0
        frame = got.frame
        q = frame.inner
        assert q is not None
        # Nobody verifies the quoted transport checksum; it stays as it was sent.
        checks = (frame.ip_check, frame.l4_check, q.ip_check)
        assert checks == (("ok", "ok", "ok") if version == 4 else ("none", "ok", "none"))
        assert (frame.src, frame.dst) == outer
        assert (q.src, q.sport, q.dst, q.dport) == inner
    unknown = error(version, w, n, quote(n, w, PORT + 1, 40000))
    assert edge.send(unknown).data == unknown


def quote(src: str, dst: str, sport: int, dport: int) -> bytes:
    return f.ip(src, dst, f.UDP, f.udp(src, dst, sport, dport, b"x" * 5))


def error(version: int, src: str, dst: str, quoted: bytes) -> bytes:
    if version == 4:
        return f.eth(f.ip(src, dst, f.ICMP, f.icmp_error(3, 4, quoted, mtu=1400)))
    return f.eth(f.ip(src, dst, f.ICMPV6, f.icmpv6_error(src, dst, 2, 0, quoted, 1400)))
