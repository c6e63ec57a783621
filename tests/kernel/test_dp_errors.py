"""ICMP errors pass iff the flow they quote is known, translated as its packets are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import ACK, SYN
from support.lab import PASS, REDIRECT, Rules
from support.town import ERROR, POLICY, VIP4, VIP6, Town, segment

pytestmark = pytest.mark.kernel
VIP = {4: VIP4, 6: VIP6}
ROUTER = {4: "192.0.2.254", 6: "2001:db8::254"}
NOTHING = Rules()


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def error(src: str, dst: str, quoted: bytes, kind: int = 0, cut: int = 0) -> bytes:
    """Port unreachable (or `kind`) from `src` to `dst` about frame `quoted`."""
    packet = quoted[14 : cut or None]
    if ":" in src:
        body = f.icmpv6_error(src, dst, kind or 1, 4, packet)
        return f.eth(f.ip(src, dst, f.ICMPV6, body))
    return f.eth(f.ip(src, dst, f.ICMP, f.icmp_error(kind or 3, 3, packet)))


def addresses(version: int) -> tuple[str, str]:
    return t.ip_of("a", version), t.ip_of("b", version)


def datagram(version: int, *, back: bool = False) -> bytes:
    a, b = addresses(version)
    return t.udp(b, a, 53, 40000) if back else t.udp(a, b, 40000, 53)


def flow(town: Town, version: int, state: str) -> None:
    """UDP from a:40000 to b:53."""
    assert town.reason("a>", datagram(version)) == 0
    if state == "established":
        assert town.reason("b>", datagram(version, back=True)) == 0
        assert town.reason("a>", datagram(version)) == 0
    assert len(town.established()) == (state == "established")


ONE_WAY = {"b<": t.rules(t.from_("a", f.UDP, 53)), "a<": NOTHING, "b>": NOTHING}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("state", ["half open", "established"])
def test_known_flow(town: Town, state: str, version: int) -> None:
    """Nobody may open a flow to a; errors come as part of a's own. Both directions, both hooks."""
    a, b = addresses(version)
    town.open(ONE_WAY)
    flow(town, version, state)
    sent = error(b, a, datagram(version))
    seen = town.send("b>", sent)
    assert (seen.verdict, seen.data[:6]) == (REDIRECT, town.pods["a"].mac)
    assert seen.data[14:] == sent[14:]
    sent = error(ROUTER[version], a, datagram(version))
    seen = town.send("a<", sent)
    assert (seen.verdict, seen.data) == (PASS, sent), "a router on the way"
    sent = error(a, b, datagram(version, back=True))
    seen = town.send("a>", sent)
    assert (seen.verdict, seen.data[:6]) == (REDIRECT, town.pods["b"].mac)


@pytest.mark.parametrize("version", [4, 6])
def test_every_kind_of_error(town: Town, version: int) -> None:
    a, b = addresses(version)
    town.open(ONE_WAY)
    flow(town, version, "established")
    for kind in (3, 4, 11, 12) if version == 4 else (1, 2, 3, 4):
        assert town.reason("b>", error(b, a, datagram(version), kind)) == 0, kind
        assert town.reason("b>", error(b, a, segment("a", "b", version, SYN), kind)) == ERROR


@pytest.mark.parametrize("version", [4, 6])
def test_eight_bytes_of_transport_are_enough(town: Town, version: int) -> None:
    a, b = addresses(version)
    town.open(ONE_WAY)
    flow(town, version, "established")
    head = 14 + (20 if version == 4 else 40)
    for cut in range(15, head + 8):
        assert town.reason("b>", error(b, a, datagram(version), cut=cut)) == ERROR, cut
    assert town.reason("b>", error(b, a, datagram(version), cut=head + 8)) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_unknown_flows(town: Town, version: int) -> None:
    a, b = addresses(version)
    c = t.ip_of("c", version)
    quoted = datagram(version)
    other = t.udp(a, b, 40001, 53)
    town.open()
    for hook, sent in (("b>", error(b, a, quoted)), ("a<", error(ROUTER[version], a, quoted))):
        assert town.reason(hook, sent) == ERROR, "no flow yet"
    flow(town, version, "established")
    for why, hook, sent in (
        ("another port", "b>", error(b, a, other)),
        ("to somebody else than it quotes", "b>", error(b, c, quoted)),
        ("from a third pod", "c>", error(c, a, quoted)),
        ("about a tunnel", "b>", error(b, a, f.eth(f.ip(a, b, 47, b"12345678")))),
        ("about an error", "b>", error(b, a, error(a, b, datagram(version, back=True)))),
        ("the other family's type", "b>", _mixed(version)),
    ):
        assert town.reason(hook, sent) in (ERROR, t.INVALID), why


def _mixed(version: int) -> bytes:
    """ICMP in IPv6, ICMPv6 in IPv4."""
    a, b = addresses(version)
    body = f.icmp_error(3, 3, datagram(version)[14:])
    return f.eth(f.ip(b, a, f.ICMPV6 if version == 4 else f.ICMP, body))


def test_quoted_later_fragment(town: Town) -> None:
    a, b = addresses(4)
    town.open()
    flow(town, 4, "established")
    later = f.IPv4(a, b, f.UDP, datagram(4)[34:], offset=8).encode()
    assert town.reason("b>", error(b, a, f.eth(later))) == ERROR


def test_spoofed_sender(town: Town) -> None:
    town.open()
    flow(town, 4, "established")
    assert town.reason("b>", error(ROUTER[4], t.IP4["a"], datagram(4))) == t.SOURCE


@pytest.mark.parametrize("version", [4, 6])
def test_about_a_ping(town: Town, version: int) -> None:
    a, b = addresses(version)
    number = f.ICMP if version == 4 else f.ICMPV6
    ping = f.eth(f.ip(a, b, number, f.echo(a, b, 7)))
    town.open()
    assert town.reason("a<", error(ROUTER[version], a, ping)) == ERROR
    assert town.reason("a>", ping) == 0
    assert town.reason("a<", error(ROUTER[version], a, ping)) == 0


# ---- the policy moves -------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("state", ["half open", "established"])
@pytest.mark.parametrize(
    ("why", "hook", "of_reply"),
    [
        ("from the server", "b>", False),
        ("from a router to the client", "a<", False),
        ("from the client", "a>", True),
        ("from a router to the server", "b<", True),
    ],
)
def test_stale_flow_is_judged_again(
    town: Town, why: str, hook: str, of_reply: bool, state: str, version: int
) -> None:
    """In the direction the flow began, whichever way the error goes."""
    a, b = addresses(version)
    src = {"b>": b, "a>": a}.get(hook, ROUTER[version])
    sent = error(src, b if of_reply else a, datagram(version, back=of_reply))
    town.open(ONE_WAY)
    flow(town, version, state)
    town.lab.bump()
    assert town.reason(hook, sent) == 0, why
    flows = town.established() or town.half_open("a")
    assert [found.word >> 24 for found in flows] == [town.lab.epoch]
    town.switch({**ONE_WAY, "b<": NOTHING})
    assert town.reason(hook, sent) == POLICY, why
    assert town.reason("a>", datagram(version)) == POLICY


# ---- translated flows -------------------------------------------------------------------


def connect(town: Town, version: int, backend: str) -> None:
    """TCP of a through the service's port 80 to the backend's 8080, established."""
    a, b, vip = t.ip_of("a", version), t.ip_of(backend, version), VIP[version]
    town.lab.service(vip, 80, f.TCP, [(b, 8080)])
    answers = "b>" if backend == "b" else "a<"
    assert town.reason("a>", t.tcp(a, vip, 40000, 80, SYN)) == 0
    assert town.reason(answers, t.tcp(b, a, 8080, 40000, SYN | ACK)) == 0
    assert town.reason("a>", t.tcp(a, vip, 40000, 80, ACK)) == 0


def quoted_ends(data: bytes) -> tuple[str, str, tuple[str, int, str, int]]:
    """Outer source and destination, quoted tuple; of an error whose checksums are right."""
    frame = f.parse(data)
    assert frame.ip_check in ("ok", "none")
    assert frame.l4_check == "ok"
    inner = frame.inner
    assert inner is not None
    assert inner.ip_check in ("ok", "none")
    return frame.src, frame.dst, (inner.src, inner.sport, inner.dst, inner.dport)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("backend", ["b", "r"])
@pytest.mark.parametrize("stale", [False, True])
def test_translated_back(town: Town, backend: str, version: int, stale: bool) -> None:
    """The client learns of the flow it knows: from the frontend, about the frontend."""
    a, b, vip = t.ip_of("a", version), t.ip_of(backend, version), VIP[version]
    town.open()
    connect(town, version, backend)
    if stale:
        town.lab.bump()
    quoted = t.tcp(a, b, 40000, 8080, ACK, b"some payload")
    told = (a, 40000, vip, 80)
    seen = town.send("b>" if backend == "b" else "a<", error(b, a, quoted))
    assert quoted_ends(seen.data) == (vip, a, told)
    assert seen.verdict == (REDIRECT if backend == "b" else PASS)
    seen = town.send("a<", error(ROUTER[version], a, quoted))
    assert quoted_ends(seen.data) == (ROUTER[version], a, told), "a router stays itself"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("backend", ["b", "r"])
@pytest.mark.parametrize("stale", [False, True])
def test_translated_to_the_backend(town: Town, backend: str, version: int, stale: bool) -> None:
    """The client reports a reply that it saw come from the frontend."""
    a, b, vip = t.ip_of("a", version), t.ip_of(backend, version), VIP[version]
    town.open({"a>": t.rules(t.from_(backend))})
    connect(town, version, backend)
    if stale:
        town.lab.bump()
    sent = error(a, vip, t.tcp(vip, a, 80, 40000, ACK, b"some payload"))
    seen = town.send("a>", sent)
    assert quoted_ends(seen.data) == (a, b, (b, 8080, a, 40000))
    assert seen.verdict == (REDIRECT if backend == "b" else PASS)
    if backend == "b":
        assert seen.data[:6] == town.pods["b"].mac
    town.switch({"a>": NOTHING})
    assert town.reason("a>", sent) == POLICY


def test_about_the_untranslated_packet(town: Town) -> None:
    """Nobody beyond a's interface has seen a packet to the frontend."""
    a = t.IP4["a"]
    town.open()
    connect(town, 4, "b")
    quoted = t.tcp(a, VIP4, 40000, 80, ACK)
    assert town.reason("a<", error(ROUTER[4], a, quoted)) == ERROR


def test_hairpin_errors_are_not_passed(town: Town) -> None:
    b = t.IP4["b"]
    town.open()
    town.lab.service(VIP4, 80, f.UDP, [(b, 8080)])
    there = town.send("b>", t.udp(b, VIP4, 40000, 80))
    hairpin = there.frame.src
    assert town.reason("b>", error(b, hairpin, there.data)) == ERROR
