"""Flows: judged once, followed after, judged again when the policy moves."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from support import frames as f
from support import town as t
from support.frames import ACK, FIN, RST, SYN
from support.lab import PASS, REDIRECT, Rules
from support.town import ANY, POLICY, Town, segment

pytestmark = pytest.mark.kernel
FLOOD = 100_000
REPLIED, FIN_BOTH, RESET = 0x02, 0x0C, 0x10
NOTHING = Rules()
ONE_WAY = {"b<": t.rules(t.from_("a")), "a<": NOTHING, "b>": NOTHING}
"""a may open flows to b; nothing else passes, so an answer passes only as an answer."""


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


def between(protocol: int, version: int, *, back: bool = False) -> bytes:
    a, b = t.ip_of("a", version), t.ip_of("b", version)
    if protocol == f.ICMP:
        number = f.ICMP if version == 4 else f.ICMPV6
        return (
            f.eth(f.ip(b, a, number, f.echo(b, a, 7, reply=True)))
            if back
            else f.eth(f.ip(a, b, number, f.echo(a, b, 7)))
        )
    if protocol == f.UDP:
        return t.udp(b, a, 53, 40000) if back else t.udp(a, b, 40000, 53)
    payload = f.sctp(53, 40000) if back else f.sctp(40000, 53)
    return f.eth(f.ip(b, a, f.SCTP, payload) if back else f.ip(a, b, f.SCTP, payload))


@pytest.mark.parametrize("version", [4, 6])
def test_handshake(town: Town, version: int) -> None:
    town.open(ONE_WAY)
    assert town.reason("b>", segment("a", "b", version, SYN | ACK, back=True)) == POLICY
    assert town.reason("a>", segment("a", "b", version, SYN)) == 0
    assert [flow.flags & REPLIED for flow in town.half_open("a")] == [0], "in a's own share"
    assert not town.half_open("b")
    seen = town.send("b>", segment("a", "b", version, SYN | ACK, back=True))
    assert (seen.verdict, seen.data[:6]) == (REDIRECT, town.pods["a"].mac)
    assert not town.established(), "an answer alone does not take a place in the table"
    assert town.reason("a>", segment("a", "b", version, ACK)) == 0
    assert len(town.established()) == 1
    assert not town.half_open("a")
    flow = town.established()[0]
    assert (flow.src_endpoint, flow.dst_endpoint) == (1, 2)
    assert (flow.src_rule, flow.dst_rule) == (0xFFFFFFFF, 0)
    assert flow.word >> 24 == town.lab.epoch
    for flags, back in ((ACK, True), (ACK, False), (ACK | FIN, True)):
        hook = "b>" if back else "a>"
        assert town.reason(hook, segment("a", "b", version, flags, back)) == 0
    assert len(town.established()) == 1


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [f.UDP, f.SCTP, f.ICMP])
def test_other_protocols(town: Town, protocol: int, version: int) -> None:
    town.open(ONE_WAY)
    there = between(protocol, version)
    answer = between(protocol, version, back=True)
    assert town.reason("b>", answer) == POLICY
    assert town.reason("a>", there) == 0
    assert town.reason("b>", answer) == 0
    assert town.reason("a>", there) == 0
    assert (len(town.established()), len(town.half_open("a"))) == (1, 0)
    assert town.reason("b>", answer) == 0


def test_another_tuple_is_another_flow(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True, sport=40001)) == POLICY
    assert town.reason("b>", segment("c", "b", 4, ACK, back=True)) == POLICY
    assert town.reason("b>", segment("a", "b", 6, ACK, back=True)) == POLICY


@pytest.mark.parametrize("version", [4, 6])
def test_flow_of_a_remote_pod(town: Town, version: int) -> None:
    town.open({"b<": t.rules(t.from_("r")), "b>": NOTHING})
    assert town.reason("b>", segment("r", "b", version, SYN | ACK, back=True)) == POLICY
    assert town.reason("b<", segment("r", "b", version, SYN)) == 0
    assert len(town.half_open("b")) == 1, "in the share of the only end that lives here"
    seen = town.send("b>", segment("r", "b", version, SYN | ACK, back=True))
    assert (seen.verdict, seen.reason) == (PASS, 0)
    assert town.reason("b<", segment("r", "b", version, ACK)) == 0
    assert len(town.established()) == 1


def test_host_flow(town: Town) -> None:
    """A probe's answers pass; after a switch it is still the host's."""
    town.open({"b<": NOTHING, "b>": NOTHING})
    assert town.reason("b<", segment("n", "b", 4, SYN), host=True) == 0
    assert town.reason("b>", segment("n", "b", 4, SYN | ACK, back=True)) == 0
    assert town.reason("b<", segment("n", "b", 4, ACK), host=True) == 0
    town.lab.bump()
    assert town.reason("b>", segment("n", "b", 4, ACK, back=True)) == 0
    assert town.reason("b<", segment("n", "b", 4, ACK), host=True) == 0
    assert town.established()[0].dst_rule == 0xFFFFFFFE


CLOSINGS = [
    ("reset by the client", [(RST, False)], RESET),
    ("reset by the server", [(RST | ACK, True)], RESET),
    ("closed by both", [(FIN | ACK, False), (FIN | ACK, True)], FIN_BOTH),
]


@pytest.mark.parametrize(("why", "packets", "flag"), CLOSINGS)
def test_closing(town: Town, why: str, packets: list[tuple[int, bool]], flag: int) -> None:
    """A closed flow lives a little longer for its last packets; a SYN opens anew."""
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    for flags, back in packets:
        assert town.reason("b>" if back else "a>", segment("a", "b", 4, flags, back)) == 0
    assert town.established()[0].flags & flag == flag, why
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0
    assert town.reason("a>", segment("a", "b", 4, SYN)) == 0
    assert [flow.flags & REPLIED for flow in town.half_open("a")] == [0]
    assert town.reason("b>", segment("a", "b", 4, SYN | ACK, back=True)) == 0
    assert [flow.flags & REPLIED for flow in town.half_open("a")] == [REPLIED]
    assert [flow.word for flow in town.established()] == [0], "it would hide the new flow"
    assert town.reason("a>", segment("a", "b", 4, ACK)) == 0
    assert [flow.flags & flag for flow in town.established()] == [0]
    assert not town.half_open("a")


def test_one_fin_keeps_the_other_half(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    assert town.reason("a>", segment("a", "b", 4, FIN | ACK)) == 0
    town.age(town.lab.maps["ct_v2"], 1000)
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0


@pytest.mark.parametrize(
    ("why", "packets", "life"),
    [
        ("established", [], 20117),
        *((why, packets, 10) for why, packets, _ in CLOSINGS),
    ],
)
def test_expired_tcp(town: Town, why: str, packets: list[tuple[int, bool]], life: int) -> None:
    for late, expected in ((0, 0), (2, POLICY)):
        town.open(ONE_WAY)
        town.handshake("a", "b", 4)
        for flags, back in packets:
            town.send("b>" if back else "a>", segment("a", "b", 4, flags, back))
        town.age(town.lab.maps["ct_v2"], life - 1 + late)
        assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == expected, why


def test_expired_half_open(town: Town) -> None:
    for age, expected in ((59, 0), (61, POLICY)):
        town.open(ONE_WAY)
        assert town.reason("a>", segment("a", "b", 4, SYN)) == 0
        assert town.reason("a>", between(f.UDP, 4)) == 0
        town.age(town.share("a"), age)
        assert town.reason("b>", segment("a", "b", 4, SYN | ACK, back=True)) == expected
        assert town.reason("b>", between(f.UDP, 4, back=True)) == expected


@pytest.mark.parametrize(("name", "life"), [("tcp_established_life", 5), ("tcp_closed_life", 3)])
def test_lives_are_knobs(name: str, life: int) -> None:
    with t.town(**{name: life}) as town:
        for age, expected in ((life, 0), (life + 2, POLICY)):
            town.open(ONE_WAY)
            town.handshake("a", "b", 4)
            if "closed" in name:
                assert town.reason("a>", segment("a", "b", 4, RST)) == 0
            town.age(town.lab.maps["ct_v2"], age - 1)
            assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == expected


@pytest.mark.parametrize("table", ["established", "half open"])
def test_wrong_proof_is_a_miss(town: Town, table: str) -> None:
    """As a reader sees an element that was recycled under it for another flow."""
    town.open(ONE_WAY)
    if table == "established":
        town.handshake("a", "b", 4)
    else:
        assert town.reason("a>", segment("a", "b", 4, SYN)) == 0
    where = town.lab.maps["ct_v2"] if table == "established" else town.share("a")
    town.edit(where, word=lambda word: word ^ 1)
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == POLICY
    if table == "established":
        town.handshake("a", "b", 4)
        assert [flow.word >> 24 for flow in town.established()] == [town.lab.epoch]
        return
    town.edit(where, word=lambda word: word ^ 1)
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0


# ---- the policy moves -------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("back", [False, True])
def test_epoch_is_renewed_by_either_direction(town: Town, version: int, back: bool) -> None:
    """b may not open flows to a: a reply that comes first is judged the way the flow began."""
    town.open(ONE_WAY)
    town.handshake("a", "b", version)
    town.lab.bump()
    hook = "b>" if back else "a>"
    assert town.reason(hook, segment("a", "b", version, ACK, back)) == 0
    assert town.established()[0].word >> 24 == town.lab.epoch


REVOCATIONS = [
    ("the destination's rule", {**ONE_WAY, "b<": NOTHING}, {}, t.INGRESS),
    ("the source's policy", {**ONE_WAY, "a>": NOTHING}, {}, t.EGRESS),
    ("the peer's identity", ONE_WAY, {"a": 999}, t.INGRESS),
]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("why", "rules", "identities", "direction"), REVOCATIONS)
def test_revoked(
    town: Town,
    why: str,
    rules: dict[str, Rules],
    identities: dict[str, int],
    direction: int,
    back: bool,
) -> None:
    """Both ends stay cut, whoever speaks first, and however long either goes on trying."""
    open_back = {key: value for key, value in ONE_WAY.items() if key == "b<"}
    rules = {key: value for key, value in rules.items() if key not in ("a<", "b>")}
    town.open(open_back)
    town.handshake("a", "b", 4)
    town.switch(rules, **identities)
    for _ in range(2):
        for way in (back, not back):
            seen = town.send("b>" if way else "a>", segment("a", "b", 4, ACK, way))
            assert (seen.reason, seen.direction) == (POLICY, direction), why
        town.age(town.lab.maps["ct_v2"], 20000)
    assert town.reason("a>", segment("a", "b", 4, SYN)) == POLICY
    town.switch(open_back)
    assert town.reason("b>", segment("a", "b", 4, ACK, back=True)) == 0, "allowed again"


def test_revoked_half_open(town: Town) -> None:
    town.open({"b<": t.rules(t.from_("a"))})
    assert town.reason("a>", between(f.UDP, 4)) == 0
    town.switch({"b<": NOTHING})
    for back in (True, False, True):
        assert town.reason("b>" if back else "a>", between(f.UDP, 4, back=back)) == POLICY
    assert not town.established()


def test_revoked_on_one_node_of_two(town: Town) -> None:
    town.open({"b<": t.rules(t.from_("r"))})
    for hook, flags, back in (("b<", SYN, 0), ("b>", SYN | ACK, 1), ("b<", ACK, 0)):
        assert town.reason(hook, segment("r", "b", 4, flags, bool(back))) == 0
    town.switch({"b<": NOTHING})
    for _ in range(2):
        assert town.reason("b>", segment("r", "b", 4, ACK, back=True)) == POLICY
        assert town.reason("b<", segment("r", "b", 4, ACK)) == POLICY


def test_reused_address(town: Town) -> None:
    """The flow's entry is under the address; who has it now decides."""
    town.open({"b<": t.rules(t.from_("r"))})
    for hook, flags, back in (("b<", SYN, 0), ("b>", SYN | ACK, 1), ("b<", ACK, 0)):
        assert town.reason(hook, segment("r", "b", 4, flags, bool(back))) == 0
    town.lab.ipcache(t.IP4["r"], 999, peer=True)
    town.lab.bump()
    assert town.reason("b>", segment("r", "b", 4, ACK, back=True)) == POLICY


def test_a_new_rule_is_recorded(town: Town) -> None:
    town.open(ONE_WAY)
    town.handshake("a", "b", 4)
    town.switch({**ONE_WAY, "b<": Rules({(ANY, 0, 0, 0): (1, 7, 1)})})
    assert town.reason("a>", segment("a", "b", 4, ACK)) == 0
    assert town.established()[0].dst_rule == 7


# ---- floods -----------------------------------------------------------------------------


def syns(src: str, dst: str) -> Iterator[bytes]:
    """SYNs of distinct flows. Nothing here looks at the checksum, so it stays as it was."""
    frame = bytearray(segment(src, dst, 4, SYN))
    for number in range(FLOOD):
        struct.pack_into("!HH", frame, 34, 1024 + number % 60000, 81 + number // 60000)
        yield bytes(frame)


def test_flood_of_one_pod_breaks_nobody_else(town: Town) -> None:
    town.open()
    town.handshake("b", "d", 4)
    assert town.reason("b>", segment("b", "d", 4, SYN, sport=41000)) == 0
    assert town.reason("c>", segment("c", "d", 4, SYN)) == 0
    for frame in syns("a", "d"):
        town.lab.run("from_pod", frame, t.IFINDEX["a"])
    assert len(town.half_open("a")) <= 1024
    assert len(town.half_open("b")) == 1
    assert len(town.established()) == 1
    town.switch({"b<": NOTHING, "c<": NOTHING})
    for who, sport in (("b", 40000), ("b", 41000), ("c", 40000)):
        answer = segment(who, "d", 4, SYN | ACK, back=True, sport=sport)
        assert town.reason("d>", answer) == 0, "known, for nothing may open a flow to them"


def test_answered_flood_never_reaches_the_table(town: Town) -> None:
    town.open()
    for number, frame in enumerate(syns("a", "d")):
        if number % 10:
            continue
        town.lab.run("from_pod", frame, t.IFINDEX["a"])
        back = bytearray(segment("a", "d", 4, SYN | ACK, back=True))
        back[34:38] = frame[36:38] + frame[34:36]
        town.lab.run("from_pod", bytes(back), t.IFINDEX["d"])
    assert not town.established()
    assert not town.half_open("d")
    assert town.half_open("a")


@pytest.mark.parametrize("version", [4, 6])
def test_a_request_is_no_answer(town: Town, version: int) -> None:
    """A pod that was pinged may not ping back under the identifier it was pinged with."""
    town.open(ONE_WAY)
    a, b = t.ip_of("a", version), t.ip_of("b", version)
    number = f.ICMP if version == 4 else f.ICMPV6
    assert town.reason("a>", between(f.ICMP, version)) == 0
    assert town.reason("b>", between(f.ICMP, version, back=True)) == 0
    assert town.reason("b>", f.eth(f.ip(b, a, number, f.echo(b, a, 7)))) == POLICY
