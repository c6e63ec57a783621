"""What the programs count of a flow, and tell of its start and its end.

Faults it was seen to find: a repeated SYN told as a second start; an end told by every packet after
the last FIN; a stale entry's counters taken for a new flow's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import frames as f
from support import town as t
from support.lab import U32, addr
from support.town import IP4, Town, segment
from tidegate_bpf import RingBuffer
from tidegate_observer import icmp
from tidegate_observer.directory import Directory
from tidegate_observer.flow import Flow
from tidegate_observer.records import LATENCIES, Flows
from tidegate_observer.tracked import GRACE_NS, MAX_LIVE, Tracked

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

SYN, ACK, FIN, RST = f.SYN, f.ACK, f.FIN, f.RST
START, END = 0, 1
NONE = 0xFFFFFFFF
ALLOW = {"b<": t.rules(t.from_("a"))}


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    with t.town() as made:
        yield made


@pytest.fixture
def silent() -> Iterator[Town]:
    with t.town(flow_events=0) as made:
        yield made


def send(town: Town, flags: int, back: bool = False, version: int = 4, sport: int = 40000) -> int:
    """Of a to b, or back; bytes of the frame."""
    frame = segment("a", "b", version, flags, back, sport)
    assert town.reason("b>" if back else "a>", frame) == 0
    return len(frame)


def kinds(found: list[Any]) -> list[int]:
    return [event.kind for event in found]


@pytest.mark.parametrize("version", [4, 6])
def test_a_start_says_who_and_by_which_rules(town: Town, version: int) -> None:
    town.open(ALLOW)
    town.told()
    send(town, SYN, version=version)
    (event,) = town.told()
    assert (event.kind, event.protocol, event.tcp_flags) == (START, 6, SYN)
    ips = IP4 if version == 4 else t.IP6
    assert (event.src, event.dst) == (addr(ips["a"]), addr(ips["b"]))
    assert (event.sport, event.dport) == (40000, 80)
    assert (event.src_identity, event.dst_identity) == (300, 301)
    assert (event.src_endpoint, event.dst_endpoint) == (1, 2)
    assert (event.src_rule_set, event.src_rule) == (0, NONE)
    assert event.dst_rule_set
    assert event.dst_rule == 0
    assert event.direction == t.EGRESS
    assert event.frontend == bytes(16)


def test_a_syn_sent_again_is_no_second_start(town: Town) -> None:
    town.open(ALLOW)
    town.told()
    for _ in range(3):
        send(town, SYN)
    assert kinds(town.told()) == [START]
    send(town, SYN | ACK, back=True)
    send(town, ACK)
    assert town.told() == []
    assert town.established()[0].packets == 4


def test_an_end_is_told_once_with_what_went_by(town: Town) -> None:
    town.open(ALLOW)
    town.told()
    there, back = [0], [0]

    def both(flags: int, reply: bool = False) -> None:
        (back if reply else there).append(send(town, flags, reply))

    both(SYN)
    both(SYN | ACK, True)
    both(ACK)
    for _ in range(5):
        both(ACK)
        both(ACK, True)
    both(FIN | ACK)
    assert kinds(town.told()) == [START]
    both(FIN | ACK, True)
    (end,) = town.told()
    assert end.kind == END
    assert (end.packets, end.bytes) == (len(there) - 1, sum(there))
    assert (end.reply_packets, end.reply_bytes) == (len(back) - 1, sum(back))
    assert (end.src, end.dst, end.sport, end.dport) == (addr(IP4["a"]), addr(IP4["b"]), 40000, 80)
    assert end.start <= end.time
    both(ACK)
    both(RST)
    assert town.told() == []


@pytest.mark.parametrize("from_server", [False, True])
def test_a_reset_ends_a_flow_that_never_opened(town: Town, from_server: bool) -> None:
    town.open(ALLOW)
    town.told()
    send(town, SYN)
    send(town, RST | ACK, back=from_server)
    start, end = town.told()
    assert (start.kind, end.kind) == (START, END)
    assert end.start == start.start
    assert (end.packets, end.reply_packets) == ((1, 1) if from_server else (2, 0))


def test_ports_used_again_are_a_new_flow(town: Town) -> None:
    town.open(ALLOW)
    town.told()
    for _ in range(2):
        send(town, SYN)
        send(town, SYN | ACK, back=True)
        send(town, ACK)
        send(town, FIN | ACK)
        send(town, FIN | ACK, back=True)
    found = town.told()
    assert kinds(found) == [START, END, START, END]
    assert {event.packets for event in found if event.kind == END} == {3}


def test_a_denied_packet_starts_nothing(town: Town) -> None:
    town.open({"b<": t.rules(t.from_("c"))})
    town.told()
    assert town.reason("a>", segment("a", "b", 4, SYN)) == t.POLICY
    assert town.told() == []


def test_a_service_is_told_by_its_frontend(town: Town) -> None:
    town.open(ALLOW)
    town.lab.service(t.VIP4, 80, f.TCP, [(IP4["b"], 8080)])
    town.told()
    frame = f.packet(IP4["a"], t.VIP4, f.TCP)
    assert town.reason("a>", frame) == 0
    (event,) = town.told()
    assert (event.dst, event.dport) == (addr(IP4["b"]), 8080)
    assert (event.frontend, event.frontend_port) == (addr(t.VIP4), 80)


def test_other_protocols_start_once(town: Town) -> None:
    town.open()
    town.told()
    for _ in range(3):
        assert town.reason("a>", f.packet(IP4["a"], IP4["b"], f.UDP)) == 0
    assert kinds(town.told()) == [START]


def reply(payload: bytes) -> bytes:
    """Of b to a."""
    data = f.tcp(IP4["b"], IP4["a"], 80, 40000, ACK, payload=payload)
    return f.eth(f.ip(IP4["b"], IP4["a"], f.TCP, data))


def ago(town: Town, name: str, seconds: float) -> None:
    """The flows of this pod began so much earlier."""
    town.edit(town.share(name), start=lambda start: start - int(seconds * 1e9))


def within(code: int, least: float, most: float) -> None:
    """A sixteenth is what a byte cannot say."""
    assert least * 15 / 16 <= LATENCIES[code] / 1e9 <= most * 17 / 16


def test_an_end_says_when_the_first_answer_and_the_first_byte_came(town: Town) -> None:
    town.open(ALLOW)
    began = time.monotonic()
    send(town, SYN)
    ago(town, "a", 1)
    send(town, SYN | ACK, back=True)
    answered = time.monotonic() - began
    send(town, ACK)
    send(town, ACK, back=True)  # nothing in it
    town.edit(town.lab.maps["ct_v2"], start=lambda start: start - 2 * 10**9)
    data = reply(b"x")
    assert town.reason("b>", data) == 0
    came = time.monotonic() - began
    town.edit(town.lab.maps["ct_v2"], start=lambda start: start - 50 * 10**9)
    assert town.reason("b>", data) == 0
    town.told()
    send(town, RST)
    (event,) = town.told()
    within(event.handshake, 1, 1 + answered)
    within(event.first_byte, 3, 3 + came)


def test_a_flow_that_began_under_other_programs_has_no_first_byte(town: Town) -> None:
    town.open(ALLOW)
    town.handshake("a", "b", 4)
    town.edit(town.lab.maps["ct_v2"], handshake=lambda _: 0)
    data = reply(b"x")
    assert town.reason("b>", data) == 0
    town.told()
    send(town, RST)
    (event,) = town.told()
    assert (event.handshake, event.first_byte) == (0, 0)


def test_latencies_fit_into_a_byte() -> None:
    assert LATENCIES[1:8] == [1000 * n for n in range(1, 8)]
    assert sorted(LATENCIES) == LATENCIES
    for code in range(8, 255):
        assert LATENCIES[code + 1] / LATENCIES[code] <= 1.13


def test_icmp_that_is_no_echo_is_told_by_type_and_code(town: Town) -> None:
    town.open()
    town.told()
    frame = f.eth(f.ip(IP4["a"], IP4["b"], f.ICMP, f.icmp(13, 5)))
    assert town.reason("a>", frame) == 0
    flows = Flows(town.lab.file, "node-1")
    with RingBuffer(town.lab.maps["flows_v1"]) as ring:
        (found,) = flows.flows(ring.read_fixed(flows.size), 0, Directory())
    assert icmp.type_code(found) == (13, 5)


def test_a_full_ring_loses_and_counts(town: Town) -> None:
    town.open()
    town.told()
    size = town.lab.maps["flows_v1"].info.max_entries // (town.lab.codecs["tg_flow_event"].size + 8)
    lost = town.lab.counters().get((t.EVENT_LOST, t.EGRESS), 0)
    for number in range(size + 10):
        sport, dport = 1024 + number % 60000, 80 + number // 60000
        town.lab.run("from_pod", f.packet(IP4["a"], IP4["b"], f.UDP, sport=sport, dport=dport), 10)
    assert town.lab.counters()[t.EVENT_LOST, t.EGRESS] - lost >= 9
    assert len(town.told()) >= size - 1


def test_nothing_is_counted_or_told_if_it_is_not_wanted(silent: Town) -> None:
    silent.open(ALLOW)
    silent.handshake("a", "b", 4)
    assert silent.told() == []
    (entry,) = silent.established()
    assert (entry.start, entry.packets, entry.bytes, entry.reply_packets) == (0, 0, 0, 0)
    assert silent.lab.maps["metrics_v1"].lookup_per_cpu(U32.pack(t.EGRESS))


# ---- ends that nobody tells -------------------------------------------------------------------


class Watch(Tracked):
    """Over the town's maps, which are pinned nowhere."""

    def __init__(self, town: Town) -> None:
        self._town = town
        self._flows = Flows(town.lab.file, "node-1", MAX_LIVE)
        super().__init__(town.lab.file, "node-1", Path(), self._flows.live)
        town.told()

    def _tables(self) -> Iterator[tuple[bytes, bytes]]:
        yield self._town.lab.maps["ct_v2"].dump()
        for share in self._town.lab.shares.values():
            yield self.ways(share.dump()[1])

    def look(self) -> list[Flow]:
        """What ended, once all that was told is read; everything counts as old enough."""
        with RingBuffer(self._town.lab.maps["flows_v1"]) as ring:
            data = ring.read_fixed(self._flows.size)
        self._flows.flows(data, 0, Directory())
        return self.sweep(2 * GRACE_NS, now=True)


def udp(town: Town, back: bool = False) -> None:
    ends = (IP4["b"], IP4["a"], f.UDP, 80, 40000) if back else (IP4["a"], IP4["b"], f.UDP)
    assert town.reason("b>" if back else "a>", f.packet(*ends)) == 0


def test_a_flow_that_falls_silent_has_ended(town: Town) -> None:
    town.open()
    watch = Watch(town)
    udp(town)
    udp(town, back=True)
    udp(town)
    assert watch.look() == []
    town.age(town.lab.maps["ct_v2"], 170)
    assert watch.look() == []
    town.age(town.lab.maps["ct_v2"], 20)
    (ended,) = watch.look()
    counts = ended.counts
    assert counts is not None
    assert (counts.closed, counts.packets, counts.reply_packets) == ("idle", 2, 1)
    assert (ended.source_port, ended.destination_port) == (40000, 80)
    assert watch.look() == []


def test_a_half_open_flow_ends_too(town: Town) -> None:
    town.open()
    watch = Watch(town)
    udp(town)
    town.age(town.share("a"), 70)
    (ended,) = watch.look()
    assert ended.counts is not None
    assert (ended.counts.closed, ended.counts.packets) == ("idle", 1)


def test_a_forgotten_flow_ended_unknown_after_a_second_look(town: Town) -> None:
    town.open()
    watch = Watch(town)
    udp(town)
    udp(town, back=True)
    udp(town)
    assert watch.look() == []
    for key in list(town.lab.maps["ct_v2"].keys()):
        town.lab.maps["ct_v2"].discard(key)
    assert watch.look() == []
    (ended,) = watch.look()
    assert ended.counts is not None
    assert ended.counts.closed == "unknown"
    assert watch.look() == []


def test_an_end_that_was_told_is_not_found_again(town: Town) -> None:
    town.open(ALLOW)
    watch = Watch(town)
    send(town, SYN)
    send(town, RST | ACK, back=True)
    town.age(town.share("a"), 1000)
    assert watch.look() == []
    assert watch.look() == []
