"""Services per packet: what no socket hook has translated is translated at the pod's interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import ACK, RST, SYN
from support.lab import DROP, HAIRPIN4, HAIRPIN6, PASS, REDIRECT, U32, Rules
from support.town import EGRESS, POLICY, VIP4, VIP6, Town, ends, packet

pytestmark = pytest.mark.kernel
VIP = {4: VIP4, 6: VIP6}
HAIRPIN = {4: HAIRPIN4, 6: HAIRPIN6}
NOTHING = Rules()


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def plain(data: bytes) -> bytes:
    """Everything that translation leaves alone: not MACs, addresses, ports, checksums."""
    frame = f.parse(data)
    at = {f.TCP: 16, f.UDP: 6, f.SCTP: 8}[frame.protocol]
    head = bytearray(data[14 : frame.l4])
    body = bytearray(data[frame.l4 :])
    head[10:12] = bytes(2) if frame.version == 4 else head[10:12]
    head[12 if frame.version == 4 else 8 :] = b""
    body[:4] = bytes(4)
    if frame.protocol != f.SCTP:
        body[at : at + 2] = bytes(2)
    return bytes(head + body)


@pytest.mark.parametrize("size", [0, 5, 1000])
@pytest.mark.parametrize("backend", ["b", "r"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP])
def test_there_and_back(town: Town, protocol: int, version: int, backend: str, size: int) -> None:
    """The backend sees the client; the client sees the frontend. Here and on another node."""
    a, b, vip = t.ip_of("a", version), t.ip_of(backend, version), VIP[version]
    town.open()
    town.lab.service(vip, 80, protocol, [(b, 8080)])
    back_hook = "b>" if backend == "b" else "a<"
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False), (ACK, True), (ACK, False)):
        if back:
            sent = packet(protocol, b, a, 8080, 40000, flags, size)
            expected = (vip, 80, a, 40000)
        else:
            sent = packet(protocol, a, vip, 40000, 80, flags, size)
            expected = (a, 40000, b, 8080)
        seen = town.send(back_hook if back else "a>", sent)
        assert seen.verdict == (REDIRECT if backend == "b" else PASS)
        assert ends(seen.data) == expected
        assert plain(seen.data) == plain(sent)
    client = [flow for flow in town.established() if flow.flags & 0x40]
    assert len(town.established()) == 2
    assert len(client) == 1, "the client's side has an entry of its own"


@pytest.mark.parametrize("backend", ["b", "r"])
def test_udp_without_checksum_stays_without(town: Town, backend: str) -> None:
    town.open()
    a, b = t.IP4["a"], t.IP4[backend]
    town.lab.service(VIP4, 53, f.UDP, [(b, 5353)])
    sent = f.eth(f.ip(a, VIP4, f.UDP, f.udp(a, VIP4, 40000, 53, b"x", no_checksum=True)))
    seen = town.send("a>", sent)
    assert ends(seen.data) == (a, 40000, b, 5353)
    assert seen.frame.l4_check == "none"
    sent = f.eth(f.ip(b, a, f.UDP, f.udp(b, a, 5353, 40000, b"x", no_checksum=True)))
    seen = town.send("b>" if backend == "b" else "a<", sent)
    assert ends(seen.data) == (VIP4, 53, a, 40000)
    assert seen.frame.l4_check == "none"


def test_every_checksum_value(town: Town) -> None:
    """Payloads that drive the sum through every carry, among them the computed zero."""
    town.open()
    town.lab.service(VIP4, 53, f.UDP, [(t.IP4["b"], 5353)])
    for word in range(0, 65536, 257):
        payload = word.to_bytes(2, "big")
        seen = town.lab.run("from_pod", t.udp(t.IP4["a"], VIP4, 40000, 53, payload), 10)
        ends(seen[1])
    # The payload that makes the translated sum zero, which UDP writes as all ones.
    bare = t.udp(t.IP4["a"], t.IP4["b"], 40000, 5353, bytes(2))
    hole = int.from_bytes(bare[40:42], "big")
    sent = t.udp(t.IP4["a"], VIP4, 40000, 53, hole.to_bytes(2, "big"))
    _, data, _ = town.lab.run("from_pod", sent, 10)
    assert data[40:42] == b"\xff\xff"
    ends(data)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("port", "expected"), [(9000, 0), (9001, t.SCTP_PORT)])
def test_sctp(town: Town, version: int, port: int, expected: int) -> None:
    """Its CRC covers the ports but not the addresses, and cannot be patched."""
    town.open()
    a, b = t.ip_of("a", version), t.ip_of("b", version)
    town.lab.service(VIP[version], 9000, f.SCTP, [(b, port)])
    sent = packet(f.SCTP, a, VIP[version], 40000, 9000)
    seen = town.send("a>", sent)
    assert seen.reason == expected
    if expected:
        return
    assert ends(seen.data) == (a, 40000, b, 9000)
    assert plain(seen.data) == plain(sent)
    answer = town.send("b>", packet(f.SCTP, b, a, 9000, 40000))
    assert ends(answer.data) == (VIP[version], 9000, a, 40000)


def choices(town: Town, count: int, port: int = 80, first: int = 20000) -> list[str]:
    found = []
    for sport in range(first, first + count):
        _, data, _ = town.lab.run("from_pod", t.tcp(t.IP4["a"], VIP4, sport, port, SYN), 10)
        found.append(f.parse(data).dst)
    return found


def test_spread(town: Town) -> None:
    town.open()
    backends = [f"10.2.1.{number}" for number in range(1, 9)]
    town.lab.service(VIP4, 80, f.TCP, [(text, 80) for text in backends])
    found = Counter(choices(town, 4000))
    assert sorted(found) == sorted(backends)
    assert min(found.values()) > 400, found
    assert max(found.values()) < 600, found


def test_the_same_backend_while_half_open(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(f"10.2.1.{n}", 80) for n in range(1, 9)])
    assert choices(town, 50) == choices(town, 50)
    backend = choices(town, 1)[0]
    data = town.send("a>", t.tcp(t.IP4["a"], VIP4, 20000, 80, ACK)).data
    assert f.parse(data).dst == backend, "an ACK goes where its SYN went"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP, f.SCTP])
def test_empty_service_is_refused_at_once(town: Town, protocol: int, version: int) -> None:
    """Counted as a drop; the pod gets what a host without a listener would answer."""
    town.open()
    a, vip = t.ip_of("a", version), VIP[version]
    town.lab.service(vip, 80, protocol, [])
    sent = packet(protocol, a, vip, 40000, 80, size=100)
    seen = town.send("a>", sent)
    assert (seen.verdict, seen.reason, seen.direction) == (REDIRECT, t.NO_BACKEND, EGRESS)
    frame = seen.frame
    assert (frame.eth_dst, frame.eth_src) == (f.MAC_A, f.MAC_B), "back to its sender"
    assert (frame.src, frame.dst) == (vip, a)
    assert frame.l4_check == "ok"
    assert frame.ip_check == ("ok" if version == 4 else "none")
    if protocol == f.TCP:
        assert (frame.sport, frame.dport, frame.tcp_flags) == (80, 40000, RST | ACK)
        asked = f.parse(sent)
        assert frame.ack == (asked.seq + 100 + 1) & 0xFFFFFFFF, "of its SYN and its data"
    else:
        kinds = (3, 3) if version == 4 else (1, 4)
        assert (frame.icmp_type, frame.icmp_code) == kinds
        q = frame.inner
        assert q is not None
        assert (q.src, q.sport, q.dst, q.dport) == (a, 40000, vip, 80)
    assert not town.half_open("a")


def test_who_gets_no_refusal(town: Town) -> None:
    town.open()
    a = t.IP4["a"]
    town.lab.service(VIP4, 80, f.TCP, [])
    town.lab.service(VIP4, 80, f.UDP, [])
    options = f.IPv4(a, VIP4, f.TCP, f.tcp(a, VIP4, 40000, 80, SYN), options=b"\1\1\1\1")
    whole = f.IPv4(a, VIP4, f.UDP, f.udp(a, VIP4, 40000, 80, b"x" * 300))
    for why, sent in (
        ("a reset", t.tcp(a, VIP4, 40000, 80, RST)),
        ("options", f.eth(options.encode())),
        ("a fragment", f.eth(f.fragment4(whole, 104)[0])),
    ):
        seen = town.send("a>", sent)
        assert (seen.verdict, seen.reason) == (DROP, t.NO_BACKEND), why
    answered = town.send("a>", t.tcp(a, VIP4, 40000, 80, ACK)).frame
    assert (answered.tcp_flags, answered.seq) == (RST, f.parse(t.tcp(a, VIP4, 1, 2, ACK)).ack)


def test_freed_backend_is_not_used(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 80)])
    town.lab.maps["backends_v1"].update(U32.pack(0), bytes(24))
    assert town.reason("a>", packet(f.TCP, t.IP4["a"], VIP4, 40000, 80)) == t.NO_BACKEND


@pytest.mark.parametrize(
    ("why", "protocol", "port"), [("another port", f.TCP, 81), ("another protocol", f.UDP, 80)]
)
def test_unknown_port_of_a_frontend_is_ordinary(
    town: Town, why: str, protocol: int, port: int
) -> None:
    sent = packet(protocol, t.IP4["a"], VIP4, 40000, port)
    for rules, expected in (({}, 0), ({"a>": NOTHING}, POLICY)):
        town.open(rules)
        town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 80)])
        seen = town.send("a>", sent)
        assert (seen.reason, seen.data) == (expected, sent), why


def test_frontend_with_another_keys_proof_is_absent(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 80)])
    table = town.lab.maps["frontends_v1"]
    key, value = next(iter(table.items()))
    table.update(key, value[:6] + bytes([value[6] ^ 1, value[7]]))
    sent = packet(f.TCP, t.IP4["a"], VIP4, 40000, 80)
    assert town.send("a>", sent).data == sent


@pytest.mark.parametrize("version", [4, 6])
def test_policy_is_about_the_backend(town: Town, version: int) -> None:
    a, b, vip = t.ip_of("a", version), t.ip_of("b", version), VIP[version]
    for why, rules, expected in (
        ("the backend's port", {"b<": t.rules(t.from_("a", f.TCP, 8080))}, 0),
        ("the frontend's port", {"b<": t.rules(t.from_("a", f.TCP, 80))}, POLICY),
        ("egress to the backend", {"a>": t.rules(t.from_("b", f.TCP, 8080))}, 0),
        ("egress to the frontend", {"a>": t.rules((2, 0, 0, 0))}, POLICY),
    ):
        town.open(rules)
        town.lab.service(vip, 80, f.TCP, [(b, 8080)])
        assert town.reason("a>", packet(f.TCP, a, vip, 40000, 80)) == expected, why


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.TCP, f.UDP])
def test_hairpin(town: Town, protocol: int, version: int) -> None:
    """b reaches itself through its own service, whatever its policy: a pod reaches itself."""
    b, vip, hairpin = t.ip_of("b", version), VIP[version], HAIRPIN[version]
    town.open({"b<": NOTHING, "b>": NOTHING})
    town.lab.service(vip, 80, protocol, [(b, 8080)])
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False), (ACK, True), (ACK, False)):
        if back:
            sent = packet(protocol, b, hairpin, 8080, 40000, flags)
            expected = (vip, 80, b, 40000)
        else:
            sent = packet(protocol, b, vip, 40000, 80, flags)
            expected = (hairpin, 40000, b, 8080)
        seen = town.send("b>", sent)
        assert (seen.verdict, seen.data[:6]) == (REDIRECT, town.pods["b"].mac)
        assert ends(seen.data) == expected
        if flags == ACK and back:
            town.lab.bump()


def connect(town: Town, backend: str = "b", sport: int = 40000) -> None:
    """a to the service's port 80, established; every backend listens on 8080."""
    a, b = t.IP4["a"], t.IP4[backend]
    for flags, back in ((SYN, False), (SYN | ACK, True), (ACK, False)):
        if back:
            assert town.reason(backend + ">", t.tcp(b, a, 8080, sport, flags)) == 0
        else:
            assert f.parse(town.send("a>", t.tcp(a, VIP4, sport, 80, flags)).data).dst == b


def where(town: Town, protocol: int, flags: int, sport: int = 40000) -> str:
    sent = packet(protocol, t.IP4["a"], VIP4, sport, 80, flags)
    return f.parse(town.send("a>", sent).data).dst


@pytest.mark.parametrize("then", ["bump", "gone", "empty"])
def test_established_tcp_stays_on_its_backend(town: Town, then: str) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    connect(town)
    town.lab.service(VIP4, 80, f.TCP, [] if then == "empty" else [(t.IP4["c"], 8080)], base=1)
    if then == "gone":
        town.lab.maps["backends_v1"].update(U32.pack(0), bytes(24))
    if then == "bump":
        town.lab.bump()
    assert where(town, f.TCP, ACK) == t.IP4["b"]
    answer = town.send("b>", t.tcp(t.IP4["b"], t.IP4["a"], 8080, 40000, ACK))
    assert ends(answer.data) == (VIP4, 80, t.IP4["a"], 40000)


def test_a_port_used_again_goes_to_the_backend_of_now(town: Town) -> None:
    """The SYN chooses c; its ACK must not follow the old flow's choice."""
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    connect(town)
    assert town.reason("b>", t.tcp(t.IP4["b"], t.IP4["a"], 8080, 40000, f.RST)) == 0
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["c"], 8080)], base=1)
    connect(town, "c")
    assert where(town, f.TCP, ACK) == t.IP4["c"]


def test_udp_leaves_a_freed_backend(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.UDP, [(t.IP4["b"], 8080)])
    assert where(town, f.UDP, 0) == t.IP4["b"]
    assert town.reason("b>", t.udp(t.IP4["b"], t.IP4["a"], 8080, 40000)) == 0
    assert where(town, f.UDP, 0) == t.IP4["b"]
    assert len(town.established()) == 2
    town.lab.service(VIP4, 80, f.UDP, [(t.IP4["c"], 8080)], base=1)
    assert where(town, f.UDP, 0) == t.IP4["b"], "while its backend lives"
    town.lab.maps["backends_v1"].update(U32.pack(0), bytes(24))
    assert where(town, f.UDP, 0) == t.IP4["c"]
    assert town.reason("c>", t.udp(t.IP4["c"], t.IP4["a"], 8080, 40000)) == 0
    assert where(town, f.UDP, 0) == t.IP4["c"]


def test_revoked_through_a_service(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    connect(town)
    town.switch({"b<": NOTHING})
    for _ in range(2):
        assert town.reason("b>", t.tcp(t.IP4["b"], t.IP4["a"], 8080, 40000, ACK)) == POLICY
        assert town.reason("a>", t.tcp(t.IP4["a"], VIP4, 40000, 80, ACK)) == POLICY


def test_into_a_pod_nothing_is_translated(town: Town) -> None:
    town.open()
    town.lab.service(VIP4, 80, f.TCP, [(t.IP4["b"], 8080)])
    sent = t.tcp(t.IP4["r"], VIP4, 40000, 80, SYN)
    assert town.send("a<", sent).data == sent


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_asked_is_counted_once_a_flow(town: Town, version: int) -> None:
    """Not a packet of a flow that is known, nor what a policy denies; by the frontend's port."""
    a, vip = t.ip_of("a", version), VIP[version]

    def asked(number: int = 80) -> tuple[int, int]:
        return town.lab.asked(vip, number, f.UDP)

    town.open()
    town.lab.service(vip, 80, f.UDP, [(t.ip_of("r", version), 53)])
    town.lab.service(vip, 81, f.UDP, [], base=9)
    before = asked(), asked(81)
    for sport in (40000, 40000, 40001):
        assert town.reason("a>", packet(f.UDP, a, vip, sport, 80)) == 0
    assert town.reason("a>", packet(f.UDP, a, vip, 40000, 81)) == t.NO_BACKEND
    after = asked(), asked(81)
    assert after[0] == (before[0][0] + 2, before[0][1])
    assert after[1] == (before[1][0], before[1][1] + 1)
    town.switch({"a>": NOTHING})
    assert town.reason("a>", packet(f.UDP, a, vip, 40002, 80)) == POLICY
    assert asked() == after[0]
