"""Services and EndpointSlices as an API server sends them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tidegate_operator import identities, services
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import Snapshot, build
from tidegate_operator.compile import Compiler, compile
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.objects import Listed, ObjectName, Outside
from unit.operator.test_oc_world import Tree, made, node, snapshot, tree

NAME = ObjectName("default", "web")


def web(spec: Tree | None = None, status: Tree | None = None, **rest: Any) -> Tree:
    base: Tree = {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ports": [{"port": 80}]}
    return tree("Service", "web", spec={**base, **(spec or {})}, status=status or {}, **rest)


def endpoints(number: int, *items: Tree, owner: str = "web") -> Tree:
    return tree(
        "EndpointSlice",
        f"web-{number}",
        labels={services.SERVICE_NAME_LABEL: owner},
        addressType="IPv4",
        ports=[{"port": 8080}],
        endpoints=[*items],
    )


def listed(item: Tree) -> tuple[Listed, ...]:
    return kinds.endpoint_slice(json.dumps(endpoints(1, item)).encode()).endpoints.endpoints


HINTS = {"forZones": [{"name": "z2"}, {"name": "z1"}], "forNodes": [{"name": "n1"}]}
LISTED: list[tuple[str, Tree, Listed | None]] = [
    ("nothing said", {}, Listed("10.244.0.2")),
    ("null", {"conditions": None, "hints": None, "nodeName": None}, Listed("10.244.0.2")),
    ("null inside", {"conditions": {"ready": None}, "hints": {"forZones": None}},
     Listed("10.244.0.2")),
    ("all of it", {"nodeName": "n1", "hints": HINTS, "zone": "z9"},
     Listed("10.244.0.2", "n1", ("z1", "z2"), ("n1",))),
    ("ends", {"conditions": {"ready": False, "serving": True, "terminating": True}},
     Listed("10.244.0.2", ends=True)),
    ("ended", {"conditions": {"ready": False, "serving": False, "terminating": True}}, None),
    ("not ready", {"conditions": {"ready": False, "serving": False}}, None),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "item", "expected"), LISTED)
def test_an_endpoint_of_a_slice(reason: str, item: Tree, expected: Listed | None) -> None:
    found = listed({"addresses": ["10.244.0.2"], **item})
    assert found == (() if expected is None else (expected,))


def test_special_addresses_are_refused_and_named() -> None:
    items = [{"addresses": [text]} for text in ("127.0.0.1", "10.244.0.2", "169.254.0.9")]
    now, problems = build(snapshot(web(), endpoints(1, *items)))
    [port] = now.endpoints[NAME].ports
    assert [backend.address for backend in port.backends] == ["10.244.0.2"]
    [problem] = problems
    assert (problem.object, problem.severity) == ("EndpointSlice default/web-1", "error")
    assert "127.0.0.1, 169.254.0.9" in problem.message


def test_the_status_and_the_age_of_a_service_count() -> None:
    ingress = [{"ip": "203.0.113.1", "ipMode": "VIP", "ports": [{"port": 80}]}, {"hostname": "x"}]
    item = web(
        {"type": "LoadBalancer", "ports": [{"port": 80, "nodePort": 31000}]},
        {"loadBalancer": {"ingress": ingress}, "conditions": []},
        created="2026-03-01T00:00:00Z",
    )
    found = made(item).services[NAME]
    assert found.outside == (Outside("LoadBalancer", "203.0.113.1"),)
    assert (found.since, found.ports[0].node_port) == ("2026-03-01T00:00:00Z", 31000)


def test_what_a_newer_server_knows_is_left_out_and_named() -> None:
    item = web({"trafficDistribution": "PreferMoon", "moon": True})
    now, problems = build(snapshot(item))
    assert now.services[NAME].cluster_ips == ("10.96.0.1",)
    assert [problem.field for problem in problems] == ["spec.moon"]


def test_zones_and_addresses_of_nodes() -> None:
    item = node("n1")
    item["metadata"]["labels"] = {services.ZONE_LABEL: "z1"}
    item["status"]["addresses"] = [
        {"type": "ExternalIP", "address": "203.0.113.9"},
        {"type": "InternalIP", "address": "172.18.0.2"},
        {"type": "InternalIP", "address": "fd00::2"},
        {"type": "InternalIP", "address": "172.19.0.2"},
    ]
    found = made(item).nodes["n1"]
    assert (found.zone, found.port_addresses) == ("z1", ("172.18.0.2", "fd00::2"))
    narrow = services.Settings(node_ports=("203.0.113.0/24",))
    now, _ = build(snapshot(item), None, of_services=narrow)
    assert now.nodes["n1"].port_addresses == ("203.0.113.9",)


SPECS: list[Tree] = [
    {},
    {"type": "NodePort", "ports": [{"port": 80, "nodePort": 31000}]},
    {"clusterIP": "None", "clusterIPs": ["None"]},
    {"externalIPs": ["192.0.2.1"]},
]
ENDPOINTS: list[list[Tree]] = [
    [],
    [{"addresses": ["10.244.0.2"], "nodeName": "n1"}],
    [{"addresses": ["10.244.0.2"]}, {"addresses": ["127.0.0.1"]}],
]


@st.composite
def snapshots(draw: st.DrawFn) -> list[Tree]:
    found = [node("n1")]
    for name in ("web", "other"):
        if draw(st.booleans()):
            item = web(draw(st.sampled_from(SPECS)))
            item["metadata"]["name"] = name
            found.append(item)
    for number in (1, 2):
        if draw(st.booleans()):
            owner = draw(st.sampled_from(("web", "other", "")))
            found.append(endpoints(number, *draw(st.sampled_from(ENDPOINTS)), owner=owner))
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(snapshots(), min_size=2, max_size=5))
def test_a_changed_cluster_says_what_a_fresh_one_says(states: list[list[Tree]]) -> None:
    """Objects that are equal to what they were are the same, as a reflector keeps them."""
    allowed = services.Settings(external_ips=("192.0.2.0/24",))
    compiler, before, ledger, held = Compiler(), None, EMPTY_LEDGER, Snapshot()
    for trees in states:
        new = snapshot(*trees)
        held = Snapshot(
            nodes=new.nodes if held.nodes != new.nodes else held.nodes,
            services=_kept(held.services, new.services),
            slices=_kept(held.slices, new.slices),
        )
        before, problems = build(held, before, of_services=allowed)
        fresh, expected = build(new, None, of_services=allowed)
        assert (before, set(problems)) == (fresh, set(expected))
        ledger = identities.allocate(before, ledger)
        assert compiler.compile(before, ledger) == compile(fresh, ledger)


def _kept(old: Any, new: Any) -> Any:
    if old == new:
        return old
    return {key: old[key] if old.get(key) == item else item for key, item in new.items()}
