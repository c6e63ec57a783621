"""ICMP by type and code: in the API, in what people read, in figures and in the policy log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tidegate_observer import icmp
from tidegate_observer.flow import ICMP, ICMPV6
from tidegate_observer.messages import flow_message
from tidegate_observer.metrics import Metrics
from tidegate_observer.policylog import PolicyLog, Settings
from unit.observer.flows import flow, started

NONE = 0xFFFF
"""The other port of what is no echo."""

ROWS = [
    ("a request", ICMP, 7, 0, (8, 0), "ICMPv4 EchoRequest"),
    ("a reply", ICMP, 0, 7, (0, 0), "ICMPv4 EchoReply"),
    ("without identifier", ICMP, 0, 0, (8, 0), "ICMPv4 EchoRequest"),
    ("a timestamp", ICMP, 13 << 8, NONE, (13, 0), "ICMPv4 TimestampRequest"),
    ("with a code", ICMP, 3 << 8 | 3, NONE, (3, 3), "ICMPv4 DestinationUnreachable(3)"),
    ("without a name", ICMP, 40 << 8 | 1, NONE, (40, 1), "ICMPv4 40(1)"),
    ("the last of all", ICMP, NONE, 8 << 8, (255, 255), "ICMPv4 255(255)"),
    ("a request by IPv6", ICMPV6, 7, 0, (128, 0), "ICMPv6 EchoRequest"),
    ("a reply by IPv6", ICMPV6, 0, 7, (129, 0), "ICMPv6 EchoReply"),
    ("the first of all by IPv6", ICMPV6, 128 << 8, 1, (0, 0), "ICMPv6 0(0)"),
    ("a reply with identifier 1", ICMPV6, 0, 1, (129, 0), "ICMPv6 EchoReply"),
    ("multicast", ICMPV6, 143 << 8, NONE, (143, 0), None),
]


@pytest.mark.parametrize(("reason", "protocol", "sport", "dport", "expected", "said"), ROWS)
def test_type_and_code(
    reason: str, protocol: int, sport: int, dport: int, expected: tuple[int, int], said: str | None
) -> None:
    made = flow(protocol=protocol, source_port=sport, destination_port=dport, tcp_flags=0)
    assert expected == icmp.type_code(made), reason
    message = flow_message(made, "1")
    held = message.l4.ICMPv4 if protocol == ICMP else message.l4.ICMPv6
    assert expected == (held.type, held.code), reason
    if said is not None:
        assert said == message.Summary, reason


def test_figures_know_types_by_few_names() -> None:
    made = Metrics()
    for sport in (13 << 8, 40 << 8, 41 << 8):
        made.add([started(protocol=ICMP, source_port=sport, destination_port=NONE)])
    text = made.text().decode()
    assert 'hubble_icmp_total{family="IPv4",type="TimestampRequest"} 1.0' in text
    assert 'hubble_icmp_total{family="IPv4",type="other"} 2.0' in text


def test_the_policy_log_keeps_types_apart(tmp_path: Path) -> None:
    log = PolicyLog(Settings(target=str(tmp_path / "log")))
    for sport in (13 << 8, 13 << 8, 17 << 8):
        log.add([flow(protocol=ICMP, source_port=sport, destination_port=NONE)], 0.0)
    log.flush(1.0, every=True)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [
        (line["connection"]["icmp_type"], line["connection"]["icmp_code"], line["count"])
        for line in lines
    ] == [(13, 0, 2), (17, 0, 1)]
    assert "src_port" not in lines[0]["connection"]
