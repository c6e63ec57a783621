"""Packets told of one by one: those that a filter names, where they come from and where they go,
and for no longer than it says.

Faults it was seen to find: a filter that was over and still told; ports compared with one end only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import frames as f
from support import town as t
from support.lab import U32, addr
from support.town import IP4, IP6, Town, segment
from tidegate_bpf import RingBuffer
from tidegate_observer.api import flow_pb2
from tidegate_observer.directory import Directory
from tidegate_observer.filters import build
from tidegate_observer.flow import Flow
from tidegate_observer.messages import flow_message
from tidegate_observer.records import Traces

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

TO_ENDPOINT, TO_STACK, FROM_ENDPOINT = 0, 3, 5
COARSE = 6
"""CLOCK_MONOTONIC_COARSE, which Python does not name."""

UNSAID, NEW, ESTABLISHED, REPLY = range(4)
ALLOW = {"b<": t.rules(t.from_("a"))}


@pytest.fixture(scope="module")
def made() -> Iterator[Town]:
    with t.town() as found:
        yield found


@pytest.fixture
def town(made: Town) -> Iterator[Town]:
    made.open(ALLOW)
    traced(made)
    yield made
    made.lab.maps["trace_filter_v1"].update(U32.pack(0), bytes(48))


def trace(town: Town, seconds: float = 600, **fields: Any) -> None:
    values = {"until": time.monotonic_ns() + int(seconds * 10**9), "ip4": bytes(16)}
    values |= {"ip6": bytes(16), "identity": 0, "port": 0, "protocol": 0}
    value = town.lab.codecs["tg_trace_filter"].pack(**(values | fields))
    town.lab.maps["trace_filter_v1"].update(U32.pack(0), value)
    next_tick()


def next_tick() -> None:
    """Programs look for a filter once a tick, with which the coarse clock moves."""
    began = time.clock_gettime_ns(COARSE)
    while time.clock_gettime_ns(COARSE) == began:
        time.sleep(0.001)


def traced(town: Town) -> list[Flow]:
    reader = Traces(town.lab.file, "node-1")
    with RingBuffer(town.lab.maps["traces_v1"]) as ring:
        return reader.flows(ring.read_fixed(reader.size), 0, Directory())


def seen(town: Town) -> list[tuple[int, int]]:
    return [(flow.point, flow.how) for flow in traced(town)]


def test_nobody_asked(town: Town) -> None:
    town.handshake("a", "b", 4)
    assert traced(town) == []


@pytest.mark.parametrize("version", [4, 6])
def test_every_packet_of_a_flow_and_its_way(town: Town, version: int) -> None:
    trace(town, ip4=addr(IP4["b"]), ip6=addr(IP6["b"]))
    town.handshake("a", "b", version)
    start, answer = (FROM_ENDPOINT, UNSAID), (TO_ENDPOINT, REPLY)
    opened = [start, (TO_ENDPOINT, NEW), start, answer, start, (TO_ENDPOINT, ESTABLISHED)]
    assert seen(town) == opened
    # The short way, too.
    for back, how in ((False, ESTABLISHED), (True, REPLY)):
        hook = "b>" if back else "a>"
        assert town.reason(hook, segment("a", "b", version, f.ACK, back)) == 0
        assert seen(town) == [start, (TO_ENDPOINT, how)]


def test_what_is_dropped_goes_nowhere(town: Town) -> None:
    trace(town, port=80)
    assert town.reason("c>", f.packet(IP4["c"], IP4["b"], f.UDP)) == t.POLICY
    (found,) = traced(town)
    assert (found.point, found.destination_port) == (FROM_ENDPOINT, 80)


def test_a_pod_that_gets_it_from_elsewhere_and_one_that_sends_there(town: Town) -> None:
    town.open()
    trace(town, protocol=f.UDP)
    assert town.reason("a<", f.packet(IP4["r"], IP4["a"], f.UDP)) == 0
    assert seen(town) == [(TO_ENDPOINT, NEW)]
    assert town.reason("a>", f.packet(IP4["a"], IP4["w"], f.UDP)) == 0
    assert seen(town) == [(FROM_ENDPOINT, UNSAID), (TO_STACK, NEW)]


FILTERS = [
    ("address of the source", {"ip4": addr(IP4["a"])}, True),
    ("address of nobody here", {"ip4": addr(IP4["c"])}, False),
    ("port of the source", {"port": 40000}, True),
    ("port of the destination", {"port": 80}, True),
    ("another port", {"port": 81}, False),
    ("protocol", {"protocol": 6}, True),
    ("another protocol", {"protocol": 17}, False),
    ("identity", {"identity": 301}, True),
    ("another identity", {"identity": 302}, False),
    ("all of it", {"ip4": addr(IP4["b"]), "port": 80, "protocol": 6, "identity": 300}, True),
    ("all but one", {"ip4": addr(IP4["b"]), "port": 80, "protocol": 6, "identity": 302}, False),
]


@pytest.mark.parametrize(("reason", "fields", "expected"), FILTERS)
def test_filters(town: Town, reason: str, fields: dict[str, Any], expected: bool) -> None:
    trace(town, **fields)
    assert town.reason("a>", segment("a", "b", 4, f.SYN)) == 0
    assert bool(traced(town)) == expected, reason


def test_it_ends_by_itself(town: Town) -> None:
    trace(town, seconds=-1, port=80)
    assert town.reason("a>", segment("a", "b", 4, f.SYN)) == 0
    assert traced(town) == []
    value = town.lab.maps["trace_filter_v1"].lookup(U32.pack(0))
    assert town.lab.codecs["tg_trace_filter"].unpack(value).until == 0


def test_icmp_by_type_and_code(town: Town) -> None:
    town.open()
    trace(town, ip4=addr(IP4["a"]))
    frame = f.eth(f.ip(IP4["a"], IP4["b"], f.ICMP, f.icmp(13, 5)))
    assert town.reason("a>", frame) == 0
    message = flow_message(traced(town)[0], "1")
    assert (message.l4.ICMPv4.type, message.l4.ICMPv4.code) == (13, 5)


def test_what_the_api_says_of_it(town: Town) -> None:
    trace(town, port=80)
    town.handshake("a", "b", 4)
    flows = traced(town)
    found = [flow_message(flow, "1") for flow in flows]
    assert [m.event_type.type for m in found] == [4] * 6
    assert [m.event_type.sub_type for m in found] == [5, 0] * 3
    assert [m.trace_observation_point for m in found] == [5, 101] * 3
    assert [m.trace_reason for m in found] == [0, 1, 0, 3, 0, 2]
    assert [m.HasField("is_reply") for m in found] == [False, True] * 3
    assert [m.is_reply.value for m in found if m.HasField("is_reply")] == [False, True, False]
    assert {m.verdict for m in found} == {1}
    replies = build([flow_pb2.FlowFilter(reply=[True])], [])
    assert [flow for flow in flows if replies(flow)] == [flows[3]]
