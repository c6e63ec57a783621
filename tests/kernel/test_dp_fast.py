"""The short way of an established flow's packets: who may take it, and that it leads to the same.

Without an entry for its interface in the node table the long way drops a packet; the short way
does not ask. So an empty table, without a new epoch, tells which way a packet took.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import ACK, FIN, RST, SYN
from support.lab import PASS, REDIRECT, U32, Rules
from support.town import PENDING, Town, segment
from tidegate_bpf import MapType

pytestmark = pytest.mark.kernel
NOTHING = Rules()
ONE_WAY = {"b<": t.rules(t.from_("a"), t.from_("r")), "a<": NOTHING, "b>": NOTHING}


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def no_table(town: Town) -> None:
    """The same epoch; the long way knows nobody."""
    empty = town.lab.inner(MapType.HASH, 20, town.lab.codecs["tg_endpoint"].size, 1)
    town.lab.maps["node_v2"].update(U32.pack(0), empty)


def took(town: Town, hook: str, frame: bytes) -> str:
    """By which way it goes if the flow was seen in this second: the one that now is by the coarse
    clock, which may still be the one before."""
    for behind in (0, 1):
        now = (time.monotonic_ns() >> 30) - behind
        town.edit(town.lab.maps["ct_v2"], seen=lambda _, now=now: now)
        if town.reason(hook, frame) != PENDING:
            return "short"
    return "long"


def changed(frame: bytes, at: int, value: bytes) -> bytes:
    return frame[:at] + value + frame[at + len(value) :]


def remote(town: Town, version: int) -> None:
    """r, of another node, and b."""
    town.open(ONE_WAY)
    for hook, flags, back in (("b<", SYN, 0), ("b>", SYN | ACK, 1), ("b<", ACK, 0)):
        assert town.reason(hook, segment("r", "b", version, flags, bool(back))) == 0


def udp(town: Town, version: int) -> tuple[bytes, bytes]:
    """An established flow of a and b: (there, back)."""
    a, b = t.ip_of("a", version), t.ip_of("b", version)
    there, back = t.udp(a, b, 40000, 80), t.udp(b, a, 80, 40000)
    town.open({"b<": t.rules((300, f.UDP, 80, 24))})
    for hook, frame in (("a>", there), ("b>", back), ("a>", there)):
        assert town.reason(hook, frame) == 0
    return there, back


# ---- who takes it ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_plain_packets_take_it(town: Town, version: int) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", version)
    no_table(town)
    assert took(town, "a>", segment("a", "b", version, ACK)) == "short"
    assert took(town, "b>", segment("a", "b", version, ACK, back=True)) == "short"


@pytest.mark.parametrize("version", [4, 6])
def test_udp_takes_it(town: Town, version: int) -> None:
    there, back = udp(town, version)
    no_table(town)
    assert took(town, "a>", there) == "short"
    assert took(town, "b>", back) == "short"


@pytest.mark.parametrize("version", [4, 6])
def test_a_flow_with_another_node_takes_it(town: Town, version: int) -> None:
    remote(town, version)
    no_table(town)
    assert took(town, "b<", segment("r", "b", version, ACK)) == "short"
    assert took(town, "b>", segment("r", "b", version, ACK, back=True)) == "short"


def _not_plain() -> dict[str, bytes]:
    a, b = t.IP4["a"], t.IP4["b"]
    a6, b6 = t.IP6["a"], t.IP6["b"]
    plain, plain6 = segment("a", "b", 4, ACK), segment("a", "b", 6, ACK)
    payload, payload6 = f.tcp(a, b, 40000, 80, ACK), f.tcp(a6, b6, 40000, 80, ACK)
    return {
        "opens": segment("a", "b", 4, SYN),
        "ends": segment("a", "b", 4, FIN | ACK),
        "resets": segment("a", "b", 4, RST),
        "opens, IPv6": segment("a", "b", 6, SYN),
        "is of another flow": segment("a", "b", 4, ACK, sport=40001),
        "is of another protocol": f.eth(f.ip(a, b, f.SCTP, f.sctp(40000, 80))),
        "has options": f.eth(f.IPv4(a, b, f.TCP, payload, options=b"\1\1\1\0").encode()),
        "has options that look like the flow's ports": f.eth(
            f.IPv4(a, b, f.TCP, payload, options=payload[:4]).encode()
        ),
        "is a first fragment": changed(plain, 20, b"\x20\0"),
        "is a later fragment": changed(plain, 20, b"\0\x08"),
        "is of another version": changed(plain, 14, b"\x65"),
        "is of another version, IPv6": changed(plain6, 14, b"\x40"),
        "is tagged": f.eth(f.ip(a, b, f.TCP, payload), vlans=[7]),
        "is cut short": plain[: 14 + 20 + 19],
        "is cut short, IPv6": plain6[: 14 + 40 + 19],
        "has an extension header": f.eth(
            f.IPv6(a6, b6, f.TCP, payload6, extensions=[f.hop_by_hop()]).encode(), f.ETH_IPV6
        ),
    }


@pytest.mark.parametrize("why", _not_plain())
def test_whatever_is_not_plain_goes_the_long_way(town: Town, why: str) -> None:
    town.open(ONE_WAY)
    for version in (4, 6):
        town.handshake("a", "b", version)
    no_table(town)
    assert took(town, "a>", _not_plain()[why]) == "long"


def test_another_epoch_goes_the_long_way(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    no_table(town)
    town.lab.bump()
    assert took(town, "a>", segment("a", "b", 4, ACK)) == "long"


def test_another_second_goes_the_long_way(town: Town) -> None:
    """It is there that a flow's last packet is noted, and that its life is found to have ended."""
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    before = town.established()[0].seen
    town.age(town.lab.maps["ct_v2"], 5)
    assert town.reason("a>", segment("a", "b", 4, ACK)) == 0
    assert town.established()[0].seen - before in (0, 1)
    town.age(town.lab.maps["ct_v2"], 5)
    no_table(town)
    assert town.reason("a>", segment("a", "b", 4, ACK)) == PENDING


def test_a_wrong_proof_goes_the_long_way(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    town.edit(town.lab.maps["ct_v2"], word=lambda word: word ^ 1)
    no_table(town)
    assert took(town, "a>", segment("a", "b", 4, ACK)) == "long"


def test_translated_flows_go_the_long_way(town: Town) -> None:
    town.open()
    town.lab.service(t.VIP4, 80, f.TCP, [(t.IP4["b"], 80)])
    asked = [segment("a", t.VIP4, 4, flags) for flags in (SYN, ACK)]
    answer = segment("a", "b", 4, SYN | ACK, back=True)
    for hook, frame in (("a>", asked[0]), ("b>", answer), ("a>", asked[1])):
        assert town.reason(hook, frame) == 0
    assert len(town.established()) == 2, "the client's side and the backend's"
    no_table(town)
    assert took(town, "a>", asked[1]) == "long"
    assert took(town, "b>", segment("a", "b", 4, ACK, back=True)) == "long"


# ---- at which interface ------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_another_pod_has_no_part_in_it(town: Town, version: int) -> None:
    """A pod that sends as another is caught, however well it knows the flow."""
    town.open(ONE_WAY)
    town.handshake("a", "b", version)
    for back in (False, True):
        frame = segment("a", "b", version, ACK, back)
        owner = "b>" if back else "a>"
        for hook in ("a>", "b>", "c>"):
            expected = 0 if hook == owner else t.SOURCE
            assert town.reason(hook, frame) == expected
    no_table(town)
    for hook in ("b>", "c>", "a<", "c<"):
        assert took(town, hook, segment("a", "b", version, ACK)) == "long"


def test_mapped_addresses_are_not_ipv4(town: Town) -> None:
    """On the wire ::ffff:10.1.0.10 is nobody's, though the tables hold IPv4 in that form."""
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    a, b = f"::ffff:{t.IP4['a']}", f"::ffff:{t.IP4['b']}"
    frame = f.eth(f.IPv6(a, b, f.TCP, f.tcp(a, b, 40000, 80, ACK)).encode(), f.ETH_IPV6)
    assert town.reason("a>", frame) == t.SOURCE


def test_what_strays_to_an_interface_gives_it_no_address(town: Town) -> None:
    """b's packet that strays to c's interface, just when the policy has moved, is judged there;
    c may not speak as b for that."""
    rules = {"b<": t.rules(t.from_("r")), "c<": t.rules(t.from_("r"))}
    town.open(rules)
    remote_open = (("b<", SYN, 0), ("b>", SYN | ACK, 1), ("b<", ACK, 0))
    for hook, flags, back in remote_open:
        assert town.reason(hook, segment("r", "b", 4, flags, bool(back))) == 0
    town.lab.bump()
    assert town.reason("c<", segment("r", "b", 4, ACK)) == 0
    assert town.reason("c>", segment("r", "b", 4, ACK, back=True)) == t.SOURCE
    assert town.reason("b>", segment("r", "b", 4, ACK, back=True)) == 0


# ---- where it leads ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("back", [False, True])
def test_both_ways_lead_to_the_same(town: Town, version: int, back: bool) -> None:
    frame = segment("a", "b", version, ACK, back)
    hook = "b>" if back else "a>"
    town.open(ONE_WAY)
    town.handshake("a", "b", version)
    seen, counts = [], []
    for age in (0, 1):
        town.age(town.lab.maps["ct_v2"], age)
        entry = town.established()[0]
        counted = ("packets", "bytes", "reply_packets", "reply_bytes")
        entry = entry._replace(**dict.fromkeys(("seen", "start", *counted), 0))
        seen.append((town.send(hook, frame), entry))
        after = town.established()[0]
        counts.append([getattr(after, name) for name in counted])
    assert seen[0] == seen[1]
    grown = [b - a for a, b in zip(*counts, strict=True)]
    assert grown == ([0, 0, 1, len(frame)] if back else [1, len(frame), 0, 0])
    assert seen[0][0].verdict == REDIRECT
    assert seen[0][0].data[:12] == town.pods["a" if back else "b"].mac + (
        town.pods["a" if back else "b"].host_mac
    )


def test_both_ways_pass_to_the_stack_alike(town: Town) -> None:
    remote(town, 4)
    for hook, back in (("b<", False), ("b>", True)):
        frame = segment("r", "b", 4, ACK, back)
        seen = []
        for age in (0, 1):
            town.age(town.lab.maps["ct_v2"], age)
            seen.append(town.send(hook, frame))
        assert seen[0] == seen[1]
        assert (seen[0].verdict, seen[0].data) == (PASS, frame)


def test_bytes_are_counted(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    frame = segment("a", "b", 4, ACK)

    def counted() -> int:
        parts = town.lab.maps["metrics_v1"].lookup_per_cpu(U32.pack(t.EGRESS))
        codec = town.lab.codecs["tg_counter"]
        return sum(codec.unpack(part).bytes for part in parts)

    before = counted()
    assert town.reason("a>", frame) == 0
    assert counted() - before == len(frame)
