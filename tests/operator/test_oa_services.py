"""Services of every kind on a real API server: what it makes of them is what nodes are told, what
it refuses we refuse, and a change costs one shard."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET
from pydantic import ValidationError
from support.operator_town import Town
from support.town_api import apply, node, objects
from tidegate_api import users
from tidegate_api.state import TRIGGER_ANNOTATION, ServicePort, StateSlice
from tidegate_kube import Client, KubeError

pytestmark = pytest.mark.apiserver

Tree = dict[str, Any]


def service(name: str, ingress: list[Tree] | None = None, **spec: Any) -> Tree:
    made: Tree = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [{"port": 80}], **spec},
    }
    if ingress:
        made["status"] = {"loadBalancer": {"ingress": ingress}}
    return made


def endpoints(name: str, *items: Tree, family: str = "IPv4") -> Tree:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "labels": {"kubernetes.io/service-name": name}},
        "addressType": family,
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [*items],
    }


def table(client: Client) -> dict[str, list[ServicePort]]:
    found: dict[str, list[ServicePort]] = {}
    for item in objects(client, StateSlice).values():
        for port in item.spec.services or ():
            found.setdefault(port.name, []).append(port)
    return found


def kinds(port: ServicePort) -> list[str]:
    return ["ClusterIP" if front.kind is UNSET else front.kind for front in port.frontends]


HINTS = {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]}
ENDS = {"ready": False, "serving": True, "terminating": True}


def test_every_kind(town: Town) -> None:
    client = town.client
    labelled = node("n1", 0)
    labelled["metadata"]["labels"] = {"topology.kubernetes.io/zone": "z1"}
    apply(client, labelled)
    apply(client, service("plain"))
    town.settled()
    before = town.nodes()["n1"].spec
    assert (before.format, before.zone, before.node_port_addresses) == (1, UNSET, UNSET)
    apply(client, service("headless", clusterIP="None"))
    apply(client, service("outside", type="ExternalName", externalName="example.org", ports=[]))
    apply(client, service("node", type="NodePort", sessionAffinity="ClientIP"))
    balanced = service(
        "balanced",
        [{"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}],
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["192.0.2.0/24"],
    )
    apply(client, balanced)
    apply(client, service("near", trafficDistribution="PreferSameNode"))
    one: Tree = {"addresses": ["10.244.0.9"], "nodeName": "n1", "hints": HINTS}
    apply(client, endpoints("near", one, {"addresses": ["10.244.1.9"], "conditions": ENDS}))
    apply(client, endpoints("balanced", {**one, "hints": None}))
    town.settled()
    found = table(client)
    own = {"headless", "outside"}
    assert own.isdisjoint(found)
    assert kinds(found["plain"][0]) == ["ClusterIP"]
    [port] = found["node"]
    assert (kinds(port), port.affinity) == (["ClusterIP", "NodePort"], 10_800)
    assert 30_000 <= port.frontends[1].port < 32_768
    [port] = found["balanced"]
    assert kinds(port) == ["ClusterIP", "LoadBalancer", "NodePort"]
    assert (port.external, port.source_ranges) == ("Local", ["192.0.2.0/24"])
    assert port.health_check_port is not UNSET
    assert [backend.node for backend in port.backends] == ["n1"]
    [port] = found["near"]
    assert [(b.zones, b.nodes, b.state) for b in port.backends] == [
        (["z1"], ["n1"], UNSET),
        (UNSET, UNSET, "Terminating"),
    ]
    after = town.nodes()["n1"].spec
    assert (after.format, after.zone, after.node_port_addresses) == (2, "z1", ["172.18.0.2"])


def test_one_endpoint_is_one_shard(town: Town) -> None:
    apply(town.client, node("n1", 0))
    for number in range(40):
        apply(town.client, service(f"s{number}"))
        apply(town.client, endpoints(f"s{number}", {"addresses": ["10.244.0.9"]}))
    town.settled()
    before = town.writes()
    apply(town.client, endpoints("s7", {"addresses": ["10.244.0.10"]}))
    town.settled()
    assert town.writes_since(before) == {("StateSlice", "update"): 1}
    # A condition that changes nothing for a node writes nothing.
    said = {"addresses": ["10.244.0.10"], "conditions": {"ready": True, "serving": True}}
    before = town.writes()
    apply(town.client, endpoints("s7", said))
    town.settled()
    assert town.writes_since(before) == {}


ADDRESSES = [
    ("IPv4", "10.244.0.9"), ("IPv4", "127.0.0.1"), ("IPv4", "127.9.9.9"), ("IPv4", "169.254.1.1"),
    ("IPv4", "0.0.0.0"), ("IPv4", "224.0.0.1"), ("IPv4", "224.0.1.1"), ("IPv6", "::1"),
    ("IPv6", "::"), ("IPv6", "fe80::1"), ("IPv6", "ff02::1"), ("IPv6", "ff05::1"),
    ("IPv6", "2001:db8::1"), ("IPv4", "255.255.255.255"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "address"), ADDRESSES)
def test_an_address_is_refused_by_both_or_by_none(town: Town, family: str, address: str) -> None:
    slice_ = endpoints("x", {"addresses": [address]}, family=family)
    outer = service("x", externalIPs=[address])
    assert _server_takes(town.client, slice_) == _we_take(users.EndpointSlice, slice_)
    assert _server_takes(town.client, outer) == _we_take(users.Service, outer)


SPECS: list[Tree] = [
    {"sessionAffinity": "ClientIP",
     "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}
    for seconds in (0, 1, 86_400, 86_401)
] + [
    {"type": "NodePort", "ports": [{"port": 80, "nodePort": 65_536}]},
    {"type": "LoadBalancer", "loadBalancerSourceRanges": [" 192.0.2.0/24 "]},
    {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0"]},
    {"internalTrafficPolicy": "Here"},
    {"trafficDistribution": "PreferSameNode"},
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec)[:60])
def test_a_field_is_refused_by_both_or_by_none(town: Town, spec: Tree) -> None:
    made = service("x", **spec)
    assert _server_takes(town.client, made) == _we_take(users.Service, made)


def _server_takes(client: Client, tree: Tree) -> bool:
    try:
        apply(client, tree)
    except KubeError as error:
        if error.reason != "Invalid":
            raise
        return False
    return True


def _we_take(model: type[users.Service] | type[users.EndpointSlice], tree: Tree) -> bool:
    try:
        model.model_validate(tree)
    except ValidationError:
        return False
    return True


def triggered(client: Client) -> dict[str, str]:
    """Of the shards that say a time: by the Services in them."""
    return {
        port.name: times[TRIGGER_ANNOTATION]
        for item in objects(client, StateSlice).values()
        for port in item.spec.services or ()
        if (times := item.metadata.annotations or {}).get(TRIGGER_ANNOTATION)
    }


def test_when_endpoints_changed_goes_with_what_is_written(town: Town) -> None:
    """The first change of a shard's; and nothing is written for the time alone, nor by an operator
    that starts anew."""
    client = town.client

    def change(address: str, when: str) -> None:
        made = endpoints("timed", {"addresses": [address], "nodeName": "n1"})
        annotations = {"endpoints.kubernetes.io/last-change-trigger-time": when}
        made["metadata"]["annotations"] = annotations if when else {}
        apply(client, made)
        town.settled()

    apply(client, node("n1", 0))
    apply(client, service("timed"))
    change("10.244.0.9", "2026-01-02T03:04:05Z")
    change("10.244.0.10", "2026-01-02T03:04:06Z")
    assert triggered(client) == {"timed": "2026-01-02T03:04:06Z"}
    held = objects(client, StateSlice)
    change("10.244.0.10", "2026-01-02T03:04:07Z")
    town.restart()
    town.settled()
    assert {n: i.metadata.resource_version for n, i in objects(client, StateSlice).items()} == {
        n: i.metadata.resource_version for n, i in held.items()
    }
    change("10.244.0.11", "")
    assert triggered(client) == {}
