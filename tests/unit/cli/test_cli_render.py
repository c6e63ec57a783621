"""How things are printed."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tidegate_api import API_VERSION
from tidegate_api.state import Identity, IdentitySpec, Meta, PolicyRef, Rule, RuleSetSpec, rule_set
from tidegate_cli import lists, render
from tidegate_cli.errors import CliError
from tidegate_cli.explain import parse_port
from tidegate_cli.live import Endpoint, Flow, Frontend, NodeView, life, signed


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert render.table(("A", "BB"), [("long", 1), ("x", "")]) == "A      BB\nlong   1\nx\n"


@pytest.mark.parametrize(
    ("form", "text"), [("json", '{\n  "a": [\n    1\n  ]\n}\n'), ("yaml", "a:\n- 1\n")]
)
def test_structured(form: str, text: str) -> None:
    out = io.StringIO()
    render.structured({"a": [1]}, form, out)
    assert out.getvalue() == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (1 << 41, "2048.0 GiB"),
    ],
)
def test_size(number: int, text: str) -> None:
    assert render.size(number) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80", (80, "TCP")), ("53/udp", (53, "UDP")), ("1/SCTP", (1, "SCTP"))],
)
def test_ports(text: str, expected: tuple[int, str]) -> None:
    assert parse_port(text) == expected


@pytest.mark.parametrize("text", ["", "0", "65536", "http", "80/ICMP", "-1", "80/"[:0], "٣"])
def test_no_ports(text: str) -> None:
    with pytest.raises(CliError, match="--port"):
        parse_port(text)


class Maps:
    """A node's maps, as far as a list reads them."""

    def __init__(self, **content: Any) -> None:
        self.content = content
        self.pin_dir = Path("pins")

    def frontends(self) -> list[Frontend]:
        found: list[Frontend] = self.content["frontends"]
        return found

    def rules(self, _policy: Any) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = self.content["rules"]
        return found

    def classes(self, _policy: Any) -> list[tuple[str, int]]:
        return [("10.0.0.0/8", 1), ("10.1.0.0/16", 0), ("fd00::/8", 1)]


def view(**content: Any) -> NodeView:
    return NodeView("node", Maps(**content), None)  # type: ignore[arg-type]


def flow(**changes: Any) -> Flow:
    plain: dict[str, Any] = {
        "protocol": 6,
        "source": ("10.0.0.1", 1000),
        "destination": ("10.0.0.2", 80),
        "kind": "table",
        "flags": 0x03,
        "nat": None,
        "src_endpoint": 4,
        "dst_endpoint": 0,
        "src_rule": -1,
        "dst_rule": 0,
        "backend": 0,
        "age": 2.0,
        "left": 58.4,
        "packets": 3,
        "bytes": 180,
        "reply_packets": 2,
        "reply_bytes": 120,
        "epoch": 1,
    }
    return Flow(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            "TCP OUT 10.0.0.1:1000 -> 10.0.0.2:80 expires=58s LastSeen=2s Packets=3 "
            "Bytes=180 RxPackets=2 RxBytes=120 Flags=0x0002 [ Replied ] Src=4 "
            "SrcRule=default (table)",
        ),
        (
            {"left": -1.0, "src_endpoint": 0, "dst_endpoint": 5, "dst_rule": 2, "protocol": 17},
            "UDP IN 10.0.0.1:1000 -> 10.0.0.2:80 expired LastSeen=2s Packets=3 Bytes=180 "
            "RxPackets=2 RxBytes=120 Flags=0x0002 [ Replied ] Dst=5 DstRule=2 (table)",
        ),
        (
            {"flags": 0x40, "nat": ("fd00::1", 80), "backend": 3, "kind": "half-open"},
            "TCP SVC 10.0.0.1:1000 -> 10.0.0.2:80 expires=58s LastSeen=2s Packets=3 "
            "Bytes=180 RxPackets=2 RxBytes=120 Flags=0x0040 [ Service ] NAT=[fd00::1]:80 "
            "BackendID=3 Src=4 SrcRule=default (half-open)",
        ),
    ],
)
def test_flows_as_people_know_them(changes: dict[str, Any], text: str) -> None:
    assert lists.flow_line(lists.flow_object(flow(**changes), view())) == text


@pytest.mark.parametrize(
    ("protocol", "flags", "units"),
    [(6, 0x01, 60), (6, 0x03, 20117), (6, 0x0E, 10), (6, 0x12, 10), (17, 0, 60), (17, 0x12, 180)],
)
def test_how_long_a_flow_lives(protocol: int, flags: int, units: int) -> None:
    assert life(protocol, flags) == units


def test_special_rules_are_negative() -> None:
    assert (signed(0xFFFFFFFF), signed(0xFFFFFFFD), signed(7)) == (-1, -3, 7)


def test_a_rule_names_its_policy_and_its_peer() -> None:
    policies = [PolicyRef(kind="NetworkPolicy", namespace="n", name="p")]
    held = rule_set(RuleSetSpec(1, "Ingress", policies, [Rule(0, 2)], []))
    spec = IdentitySpec(namespace="n", labels={"app": "web", "edge": ""})
    meta = Meta(name="300")
    identity = Identity(api_version=API_VERSION, kind="Identity", metadata=meta, spec=spec)
    words = lists.identity_words([identity])
    value = SimpleNamespace(action=1, rule=0, precedence=5, flags=0)
    keys = [(300, 80, 6, 24), (0x01000001, 0, 17, 8), (0x02000000, 0, 0, 0), (2, 0x50, 6, 20)]
    rows = [
        (SimpleNamespace(peer=peer, port=port, protocol=protocol, prefix=prefix), value)
        for peer, port, protocol, prefix in keys
    ]
    row = SimpleNamespace(
        id=9,
        ingress=SimpleNamespace(flags=5, rule_set=4),
        egress=SimpleNamespace(flags=0, rule_set=0),
    )
    node = view(rules=rows)
    found = lists._endpoint_policy(node, Endpoint(row), words, {"": held})
    assert [(r["labels"], r["port"], r["prefix"]) for r in found["rules"]] == [
        (["k8s:io.kubernetes.pod.namespace=n", "k8s:app=web", "k8s:edge"], "80/TCP", 24),
        (["cidr:10.0.0.0/8", "cidr:fd00::/8"], "ANY/UDP", 8),
        (["ANY"], "ANY", 0),
        (["reserved:world"], "0x50/12/TCP", 20),
        (["ANY"], "ANY", 0),
        (["ANY"], "ANY", 0),
    ]
    assert [r["rule"] for r in found["rules"]] == [
        *["NetworkPolicy n/p spec.ingress[2]"] * 4,
        "default: NetworkPolicy n/p",
        "no policy selects the pod",
    ]
