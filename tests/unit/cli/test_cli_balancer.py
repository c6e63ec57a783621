"""What `tidegate lb list` prints of frontends, without a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET
from tidegate_api.state import API_VERSION, Frontend, Meta, ServicePort, StateSlice, StateSliceSpec
from tidegate_cli import balancer, live
from tidegate_cli.live import NodeView
from tidegate_cli.model import Model
from tidegate_loader import services as s


class Maps:
    """A node's maps, as far as the list reads them."""

    pin_dir = Path("pins")

    def __init__(self, *found: live.Frontend) -> None:
        self._found = list(found)

    def frontends(self) -> list[live.Frontend]:
        return self._found

    def source_ranges(self) -> list[tuple[int, str]]:
        return [(7, "192.0.2.0/24"), (8, "::/0")]


def view(*found: live.Frontend) -> NodeView:
    return NodeView("node", Maps(*found), None)  # type: ignore[arg-type]


def known() -> balancer.Known:
    def front(address: str, port: int, kind: Any = UNSET) -> Frontend:
        return Frontend(address=address, port=port, protocol="TCP", kind=kind)

    port = ServicePort(
        namespace="shop",
        name="web",
        type="LoadBalancer",
        frontends=[
            front("10.96.0.1", 80),
            front("0.0.0.0", 30080, "NodePort"),
            front("192.0.2.1", 80, "LoadBalancer"),
            front("198.51.100.1", 80, "ExternalIP"),
        ],
        backends=[],
    )
    spec = StateSliceSpec(
        format=2, table="services", epoch=1, shard=0, shards=1, revision=1, services=[port]
    )
    item = StateSlice(
        api_version=API_VERSION, kind="StateSlice", metadata=Meta(name="services-1-0"), spec=spec
    )
    return balancer.Known(Model.from_objects([item]))


def test_plain_services_as_people_know_them() -> None:
    fronts = [
        live.Frontend("10.96.0.9", 80, 6, 0, 2, ((1, "10.0.0.1", 8080), 7)),
        live.Frontend("fd00::1", 53, 17, 2, 0, ()),
        live.Frontend("10.96.0.1", 80, 6, 0, 0, ()),
    ]
    assert balancer._lb(known(), view(*fronts)) == {
        "10.96.0.9:80/TCP (0)": ["0.0.0.0:0 (0) (0) [unknown]"],
        "10.96.0.9:80/TCP (1)": ["10.0.0.1:8080/TCP (0) (1)"],
        "10.96.0.9:80/TCP (2)": ["backend 7 not found"],
        "[fd00::1]:53/UDP (0)": ["[::]:0 (0) (0) [unknown]"],
        "10.96.0.1:80/TCP (0)": ["0.0.0.0:0 (0) (0) [ClusterIP, non-routable]"],
    }


@pytest.mark.parametrize(
    ("address", "port", "flags", "words"),
    [
        ("172.18.0.2", 30080, s.OUTSIDE, "NodePort"),
        ("172.18.0.2", 30081, s.OUTSIDE, "unknown"),
        ("192.0.2.1", 80, s.OUTSIDE | s.RANGES, "LoadBalancer, check source-range"),
        (
            "198.51.100.1",
            80,
            s.OUTSIDE | s.LOCAL | s.TWO | s.AFFINITY,
            "ExternalIPs, Local, two-scopes, sessionAffinity",
        ),
        ("10.96.0.1", 80, s.INTERNAL_LOCAL, "ClusterIP, InternalLocal, non-routable"),
    ],
)
def test_flag_words(address: str, port: int, flags: int, words: str) -> None:
    front = live.Frontend(
        address, port, 6, 100, 1, ((1, "10.0.0.1", 80),), flags, 7, 60, ((2, "10.0.0.2", 80),)
    )
    assert balancer._lb(known(), view(front)) == {
        f"{address}:{port}/TCP (0)": [f"0.0.0.0:0 (7) (0) [{words}]"],
        f"{address}:{port}/TCP (1)": ["10.0.0.1:80/TCP (7) (1)"],
        f"{address}:{port}/TCP (2)": ["10.0.0.2:80/TCP (7) (2) [outside]"],
    }


def test_numbers_and_ranges_by_name() -> None:
    front = live.Frontend("192.0.2.1", 80, 6, 100, 0, (), s.OUTSIDE | s.RANGES, 7)
    assert balancer._revnat(view(front)) == [{"id": 7, "address": "192.0.2.1:80/TCP"}]
    assert balancer._ranges(known(), view(front)) == [
        {"service": "shop/web", "range": "192.0.2.0/24"},
        {"service": "8", "range": "::/0"},
    ]


def test_a_ring_in_few_words() -> None:
    one, two = (1, "10.0.0.1", 80), (2, "10.0.0.2", 80)
    slots = (one, two, one, 7)
    front = live.Frontend("172.18.0.2", 30080, 6, 100, 4, slots, s.OUTSIDE | s.RING, 7)
    assert balancer._lb(known(), view(front)) == {
        "172.18.0.2:30080/TCP (0)": ["0.0.0.0:0 (7) (0) [NodePort]"],
        "172.18.0.2:30080/TCP (1)": ["10.0.0.1:80/TCP (7) (1)"],
        "172.18.0.2:30080/TCP (2)": ["10.0.0.2:80/TCP (7) (2)"],
        "172.18.0.2:30080/TCP (3)": ["backend 7 not found"],
    }
    assert [(row["backend"], row["places"]) for row in balancer._maglev(view(front))] == [
        ("10.0.0.1:80", 2),
        ("10.0.0.2:80", 1),
        ("backend 7 not found", 1),
    ]
