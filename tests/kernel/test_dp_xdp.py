"""XDP at the uplink: what it sends on by itself, and what it leaves to tc as it came.

`test_dp_uplink` runs every fixture with and without it; here is who of the two does what.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator

import pytest
from support import edge as e
from support import frames as f
from support import town as t
from support.edge import LOCAL, NODE4, NODE6, OUTSIDE, RANGES, Edge
from support.frames import ACK, FIN, SYN
from support.lab import REDIRECT
from support.town import packet

pytestmark = pytest.mark.kernel
NODE = {4: NODE4, 6: NODE6}
CLIENT = {4: t.IP4["w"], 6: t.IP6["w"]}
PORT = 30080
ROUTER = "02:00:00:00:00:fe"


@pytest.fixture(scope="module")
def made() -> Iterator[Edge]:
    """Some backends lie behind another interface."""
    with e.edge(xdp=True) as found:
        for words in (
            "link add up1 type veth peer name wire1",
            f"link set up1 address {f.MAC_B} up",
            "addr add 172.19.0.1/16 dev up1",
            "neigh add 172.19.0.9 lladdr 02:00:00:00:00:09 dev up1",
            "route add 10.9.0.0/16 via 172.19.0.9",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        yield found


@pytest.fixture
def edge(made: Edge) -> Edge:
    made.open()
    made.turned = 0
    return made


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_sends_on_what_tc_would_send(edge: Edge, protocol: int, version: int) -> None:
    """Both ways of a flow; tc, given the same packet, makes the same of it, byte by byte."""
    w, n, r = CLIENT[version], NODE[version], t.ip_of("r", version)
    target = PORT if protocol == f.SCTP else 8080
    edge.service(n, PORT, protocol, [(r, target)])
    sent = packet(protocol, w, n, 40000, PORT)
    port = edge.send(sent).frame.sport
    for number, data in enumerate(
        (
            sent,
            packet(protocol, r, n, target, port, SYN | ACK, 0),
            packet(protocol, w, n, 40000, PORT, ACK, 600),
            packet(protocol, r, n, target, port, FIN | ACK, 1201),
        ),
        2,
    ):
        verdict, out = edge.run_xdp(data)
        assert verdict == e.XDP_TX
        assert f.parse(out).valid
        assert (f.parse(out).eth_dst, f.parse(out).eth_src) == (ROUTER, f.MAC_B)
        edge.xdp = False
        same = edge.send(data)
        edge.xdp = True
        assert (same.verdict, same.reason, same.data) == (REDIRECT, 0, out), number
    assert edge.nat() == 2


def test_a_checksum_of_zero_stays_none(edge: Edge) -> None:
    """UDP over IPv4 without one."""
    edge.service(NODE4, PORT, f.UDP, [(t.IP4["r"], 80)])
    bare = bytearray(packet(f.UDP, t.IP4["w"], NODE4, 40000, PORT))
    bare[40:42] = bytes(2)
    seen = edge.send(bytes(bare))
    assert edge.turned == 1
    assert (seen.frame.dst, seen.frame.l4_check) == (t.IP4["r"], "none")


def unfinished(version: int, protocol: int) -> bytes:
    """As the stack of a veth's other end leaves it: the sum of the pseudo header alone."""
    data = packet(protocol, CLIENT[version], NODE[version], 40000, PORT, SYN, 30)
    l4 = 34 if version == 4 else 54
    addresses = data[26:34] if version == 4 else data[22:54]
    pseudo = addresses + bytes([0, protocol]) + (len(data) - l4).to_bytes(2, "big")
    at = l4 + (16 if protocol == f.TCP else 6)
    return data[:at] + f.ones_sum(pseudo).to_bytes(2, "big") + data[at + 2 :]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP])
def test_an_unfinished_checksum_is_left_to_tc(edge: Edge, protocol: int, version: int) -> None:
    edge.service(NODE[version], PORT, protocol, [(t.ip_of("r", version), 80)])
    data = unfinished(version, protocol)
    assert edge.run_xdp(data) == (e.XDP_PASS, data)
    assert edge.nat() == 0
    assert (
        edge.run_xdp(packet(protocol, CLIENT[version], NODE[version], 40000, PORT))[0] == e.XDP_TX
    )


def without_hops(data: bytes) -> bytes:
    raw = bytearray(data)
    raw[22] = 1
    raw[24:26] = bytes(2)
    raw[24:26] = f.checksum(bytes(raw[14:34])).to_bytes(2, "big")
    return bytes(raw)


def test_leaves_the_rest_as_it_came(edge: Edge) -> None:
    """Whatever is refused, ended, or needs what only the stack has: unchanged, no entry made."""
    w, b, r = t.IP4["w"], t.IP4["b"], t.IP4["r"]
    edge.service(NODE4, PORT, f.TCP, [(b, 80)])
    edge.service(NODE4, PORT + 1, f.TCP, [(NODE4, 6443)], base=2)
    edge.service(NODE4, PORT + 2, f.TCP, [], base=3, elsewhere=False)
    edge.service(NODE4, PORT + 3, f.TCP, [], base=4, flags=OUTSIDE | LOCAL)
    edge.service(NODE4, PORT + 4, f.TCP, [(r, 80)], base=5, flags=OUTSIDE | RANGES)
    edge.service(NODE4, PORT + 5, f.TCP, [(r, 80)], base=6)
    edge.service(NODE4, PORT + 6, f.TCP, [("172.18.7.7", 80)], base=7)
    edge.service(NODE4, PORT + 7, f.TCP, [("10.9.0.1", 80)], base=8)
    edge.service(NODE4, PORT + 8, f.UDP, [(r, 80)], base=9)
    plain = packet(f.TCP, w, NODE4, 40000, PORT + 5)
    whole = f.IPv4(w, NODE4, f.UDP, f.udp(w, NODE4, 40000, PORT + 8, b"x" * 300))
    segment = f.tcp(w, NODE4, 40000, PORT + 5, SYN)
    options = f.eth(f.IPv4(w, NODE4, f.TCP, segment, options=b"\x94\x04\0\0").encode())
    for why, data in (
        ("a pod here", packet(f.TCP, w, NODE4, 40000, PORT)),
        ("the node itself", packet(f.TCP, w, NODE4, 40000, PORT + 1)),
        ("nobody", packet(f.TCP, w, NODE4, 40000, PORT + 2)),
        ("nobody here", packet(f.TCP, w, NODE4, 40000, PORT + 3)),
        ("a client out of range", packet(f.TCP, w, NODE4, 40000, PORT + 4)),
        ("no hop left", without_hops(plain)),
        ("another host's", b"\x02\0\0\0\0\x77" + plain[6:]),
        ("broadcast", b"\xff" * 6 + plain[6:]),
        ("a neighbour not known", packet(f.TCP, w, NODE4, 40000, PORT + 6)),
        ("another interface", packet(f.TCP, w, NODE4, 40000, PORT + 7)),
        ("larger than the link", packet(f.TCP, w, NODE4, 40000, PORT + 5, size=1500)),
        ("IP options", options),
        ("a first fragment", f.eth(f.fragment4(whole, 104)[0])),
        ("a later fragment", f.eth(f.fragment4(whole, 104)[1])),
        ("no service", packet(f.TCP, w, NODE4, 40000, PORT + 99)),
        ("cut short", plain[:40]),
        ("a VLAN's", plain[:12] + b"\x81\0\0\x07" + plain[12:]),
    ):
        assert edge.run_xdp(data) == (e.XDP_PASS, data), why
        assert edge.nat() == 0, why
    assert edge.run_xdp(plain)[0] == e.XDP_TX


def test_flows_change_between_the_two(edge: Edge) -> None:
    """One map of translations: who sees a flow's next packet has its entry."""
    w, r = t.IP4["w"], t.IP4["r"]
    edge.service(NODE4, PORT, f.TCP, [(r, 80)])
    edge.xdp = False
    port = edge.send(packet(f.TCP, w, NODE4, 40000, PORT)).frame.sport
    edge.xdp = True
    back = edge.send(packet(f.TCP, r, NODE4, 80, port, SYN | ACK))
    assert (back.frame.dst, back.frame.dport) == (w, 40000)
    assert edge.send(packet(f.TCP, w, NODE4, 40000, PORT, ACK)).frame.sport == port
    assert edge.turned == 2
    # The flow of a pod here is tc's, though the Service's backends are elsewhere now.
    edge.service(NODE4, PORT + 1, f.TCP, [(t.IP4["b"], 80)], base=2)
    edge.send(packet(f.TCP, w, NODE4, 40001, PORT + 1))
    edge.town.send("b>", packet(f.TCP, t.IP4["b"], w, 80, 40001, SYN | ACK))
    edge.send(packet(f.TCP, w, NODE4, 40001, PORT + 1, ACK))
    edge.service(NODE4, PORT + 1, f.TCP, [(r, 80)], base=3)
    edge.turned = 0
    assert edge.send(packet(f.TCP, w, NODE4, 40001, PORT + 1, ACK)).frame.dst == t.IP4["b"]
    assert edge.turned == 0


def test_mutated_frames(edge: Edge) -> None:
    """None is half changed: sent on whole and valid, or left as it came."""
    rng = random.Random(6)
    seeds = []
    for number, (version, protocol) in enumerate(((4, f.TCP), (4, f.UDP), (6, f.TCP), (6, f.UDP))):
        n = NODE[version]
        edge.service(n, PORT, protocol, [(t.ip_of("r", version), 80)], base=number + 1)
        seeds.append(packet(protocol, CLIENT[version], n, 40000, PORT))
    sent = 0
    for _ in range(4000):
        data = f.mutate(rng.choice(seeds), rng)
        if len(data) < 14:
            continue
        verdict, out = edge.run_xdp(data)
        if verdict == e.XDP_PASS:
            assert out == data
            continue
        assert verdict == e.XDP_TX
        sent += 1
        before, after = f.parse(data), f.parse(out)
        assert after.problem == before.problem, data.hex()
        assert after.l4_check == before.l4_check, data.hex()
        assert after.ip_check in ("ok", "none") or before.ip_check == "bad", data.hex()
    assert sent > 50
