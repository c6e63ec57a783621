"""A flood of denials of one kind: what of it is sent, that nothing of another kind is hidden by it,
and that what was not sent is said to the last one.

Faults it was seen to find: a place taken by its hash alone, so that another kind was counted there;
a count that began anew with each reader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import frames as f
from support import town as t
from support.lab import U32
from support.town import IP4, Town
from tidegate_bpf import Codec, RingBuffer, SkbContext, bpffs
from tidegate_observer.directory import Directory
from tidegate_observer.flow import Flow, Kind
from tidegate_observer.limits import Limits
from tidegate_observer.records import Denials

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

FLOOD = 100_000
BURST = 256
LOCKED = {"b<": t.rules()}
SETS, WAYS = 512, 4


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


@pytest.fixture
def pins(town: Town, tmp_path: Path) -> Iterator[Path]:
    """With the town's maps, every place of them free."""
    bpffs.mount(tmp_path)
    (tmp_path / "maps").mkdir()
    try:
        for name, size, count in (("limits_v1", 48 * WAYS, SETS), ("limits_said_v1", 16, 0)):
            held = town.lab.maps[name]
            count = count or held.info.max_entries
            held.update_items((U32.pack(i), bytes(size)) for i in range(count))
            held.pin(str(tmp_path / "maps" / name))
        town.open(LOCKED)
        town.events()
        yield tmp_path
    finally:
        bpffs.unmount(tmp_path)


class Reader:
    """What an observer does with a town's denials."""

    def __init__(self, town: Town, pins: Path) -> None:
        self._town = town
        self._limits = Limits(town.lab.file, "node-1", pins)
        self._denials = Denials(town.lab.file, "node-1", self._limits.seen)

    def read(self) -> list[Flow]:
        with RingBuffer(self._town.lab.maps["events_v1"]) as ring:
            data = ring.read_fixed(self._denials.size)
        return self._denials.flows(data, 0, Directory())

    def more(self) -> list[Flow]:
        return self._limits.sweep(0, Directory(), now=True)


def deny(town: Town, source: str = "a", repeat: int = 1, dport: int = 80) -> None:
    frame = f.packet(IP4[source], IP4["b"], f.UDP, dport=dport)
    context = SkbContext(ifindex=t.IFINDEX[source], ingress_ifindex=1)
    town.lab.loaded.programs["from_pod"].test_run(frame, context, repeat=repeat)


def identities(found: list[Flow]) -> list[int]:
    return [flow.source.identity for flow in found]


def test_a_flood_is_counted_to_the_last_and_hides_no_other_kind(town: Town, pins: Path) -> None:
    reader = Reader(town, pins)
    deny(town, repeat=FLOOD)
    deny(town, "c")
    found = identities(reader.read())
    assert found.count(302) == 1
    sent = found.count(300)
    assert BURST <= sent < FLOOD / 10
    (rest,) = reader.more()
    assert sent + rest.more == FLOOD
    assert (rest.kind, rest.reason, rest.source.identity) == (Kind.DENIED, t.POLICY, 300)
    assert rest.destination_port == 80
    assert town.lab.counters()[t.EVENT_LIMITED, t.INGRESS] >= rest.more
    assert reader.more() == []


def test_ports_are_no_kinds_of_their_own(town: Town, pins: Path) -> None:
    reader = Reader(town, pins)
    for port in range(1000, 2000):
        deny(town, dport=port)
    sent = reader.read()
    (rest,) = reader.more()
    assert len(sent) + rest.more == 1000


def test_who_reads_next_says_neither_less_nor_twice(town: Town, pins: Path) -> None:
    first = Reader(town, pins)
    deny(town, repeat=FLOOD)
    sent = len(first.read()) + first.more()[0].more
    second = Reader(town, pins)
    assert second.more() == []
    deny(town, repeat=FLOOD)
    sent += len(second.read())
    (rest,) = second.more()
    assert sent + rest.more == 2 * FLOOD
    third = Reader(town, pins)
    deny(town, repeat=1000)
    sent = len(third.read())
    (rest,) = third.more()
    assert sent + rest.more == 1000
    # Nobody told this one what the others were like, if all of them were too many.
    assert rest.source.identity == 300


def fill(town: Town, **fields: int) -> None:
    """Every place has another kind."""
    codec = Codec(town.lab.file.layout("tg_limit"))
    values = dict.fromkeys(codec.names, 0) | fields
    row = codec.pack(**(values | {"kind": (1, 2, 3, 4, 5, 6)}))
    town.lab.maps["limits_v1"].update_items((U32.pack(i), row * WAYS) for i in range(SETS))


def test_a_kind_that_finds_no_place_is_told_of_without_limit(town: Town, pins: Path) -> None:
    reader = Reader(town, pins)
    fill(town, serial=2, until=1 << 62)
    deny(town, repeat=2000)
    assert len(reader.read()) == 2000
    assert reader.more() == []


def test_a_place_that_nobody_needed_for_long_is_given_up(town: Town, pins: Path) -> None:
    reader = Reader(town, pins)
    fill(town, serial=2, until=1, suppressed=7)
    deny(town, repeat=2000)
    sent = len(reader.read())
    assert sent < 1000
    assert sent + sum(flow.more for flow in reader.more() if flow.source.identity == 300) == 2000


def test_audits_are_limited_and_say_so(town: Town, pins: Path) -> None:
    town.open({"b<": t.Rules(isolated=False, audited=True)})
    reader = Reader(town, pins)
    for port in range(1000, 2000):
        deny(town, dport=port)
    sent = reader.read()
    (rest,) = reader.more()
    assert {flow.kind for flow in sent} == {rest.kind} == {Kind.AUDITED}
    assert len(sent) + rest.more == 1000
