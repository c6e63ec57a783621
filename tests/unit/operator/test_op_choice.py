"""Which endpoints a node uses, as compiled and chosen, against the oracle: every combination of
what it depends on. Policies, conditions, hints and places are each run through whole; with as many
endpoints as a rule can tell apart."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from msgspec import UNSET
from msgspec.structs import replace
from support.ca_soak import SOAK, campaign
from support.service_oracle import Answer, Kind, Tree, answer, controller_hints
from tidegate_api.choice import choose
from tidegate_api.service import Backend, ServicePort
from tidegate_operator import endpoints as made_of
from tidegate_operator.cluster import kinds
from tidegate_operator.compile.services import ServiceTable
from tidegate_operator.objects import ObjectName, Service
from tidegate_operator.objects import ServicePort as Port
from tidegate_operator.services import Settings, service
from tidegate_operator.world import Options, build
from unit.operator.given import documents, pod
from unit.operator.given import service as service_text

HERE, ZONE = "here", "z1"
NAME = ObjectName("x", "s")
KINDS: tuple[Kind, ...] = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalIP")
POLICIES = [*itertools.product(("Cluster", "Local"), repeat=2)]
"""(internal, external)"""
ALLOWED = Settings(external_ips=("192.0.2.0/24",))

READY: list[Tree] = [{}, {"ready": True}]
ENDING: list[Tree] = [{"ready": False, "serving": True, "terminating": True}]
UNUSED: list[Tree] = [{"ready": False, "serving": False, "terminating": True}]
PLACES = (HERE, "there", None)
ZONE_HINTS = (None, [ZONE], ["z2"], [ZONE, "z2"])
NODE_HINTS = (None, [HERE], ["there"])


def hints(zones: Sequence[str] | None, nodes: Sequence[str] | None) -> Tree:
    found: Tree = {}
    if zones is not None:
        found["forZones"] = [{"name": name} for name in zones]
    if nodes is not None:
        found["forNodes"] = [{"name": name} for name in nodes]
    return found


def every(
    conditions: Iterable[Tree], places: Iterable[str | None], wanted: Iterable[Tree]
) -> list[Tree]:
    """One endpoint of each sort, without an address."""
    return [
        {"conditions": condition, "nodeName": place, "hints": hint}
        for condition, place, hint in itertools.product(conditions, places, wanted)
    ]


ALL_HINTS = [hints(*both) for both in itertools.product(ZONE_HINTS, NODE_HINTS)]
SORTS = every([*READY[:1], *ENDING, *UNUSED], PLACES, ALL_HINTS)
"""As far as rules tell endpoints apart."""
FEW = every(
    [*READY[:1], *ENDING],
    PLACES[:2],
    [hints(None, None), hints([ZONE], None), hints(["z2"], [HERE]), hints(["z2"], ["there"])],
)


def spec_of(internal: str, external: str) -> Tree:
    return {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "externalIPs": ["192.0.2.1"],
        "internalTrafficPolicy": internal,
        "externalTrafficPolicy": external,
        "ports": [{"port": 80, "nodePort": 31000}],
    }


def served(internal: str, external: str) -> Service:
    tree = {
        "metadata": {"name": NAME.name, "namespace": NAME.namespace},
        "spec": spec_of(internal, external),
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
    }
    written = kinds.service(json.dumps(tree).encode()).written
    return service(NAME, written, ("10.96.0.1",), None, ALLOWED)


SERVICES = {policy: served(*policy) for policy in POLICIES}


def placed(sorts: Iterable[Tree]) -> list[Tree]:
    return [
        {**sort, "addresses": [f"10.244.0.{number}"]} for number, sort in enumerate(sorts, start=1)
    ]


def compiled(item: Service, endpoints: Sequence[Tree]) -> ServicePort:
    """As two slices, one endpoint more in the first."""
    found = []
    half = (len(endpoints) + 1) // 2
    for part in (endpoints[:half], endpoints[half:]):
        tree = {
            "metadata": {"name": "x"},
            "addressType": "IPv4",
            "endpoints": part,
            "ports": [{"port": 8080}],
        }
        found.append(kinds.endpoint_slice(json.dumps(tree).encode()).endpoints)
    table = ServiceTable()
    table.update({NAME: item}, {NAME: made_of.from_slices(item, found)})
    [port] = table.entries[str(NAME)]
    return port


def whole(item: Service, endpoints: Sequence[Tree]) -> ServicePort:
    """With all that is said of each endpoint, needed or not: hints and nodes of every one."""
    found = [
        Backend(
            address=one["addresses"][0],
            port=8080,
            node=one["nodeName"] or UNSET,
            zones=[name["name"] for name in one["hints"].get("forZones", ())] or UNSET,
            nodes=[name["name"] for name in one["hints"].get("forNodes", ())] or UNSET,
            state="Terminating" if one["conditions"] in ENDING else UNSET,
        )
        for one in endpoints
        if one["conditions"] not in UNUSED
    ]
    return replace(compiled(item, endpoints), backends=found)


def chosen(port: ServicePort, kind: Kind, zone: str, inside: bool, node: str = HERE) -> Answer:
    found = choose(port, UNSET if kind == "ClusterIP" else kind, node, zone, inside=inside)
    if found.backends:
        return frozenset(backend.address for backend in found.backends)
    return "refused" if found.empty == "Reject" else "dropped"


def differences(
    sets: Iterable[Sequence[Tree]],
    made: Callable[[Service, Sequence[Tree]], ServicePort] = compiled,
) -> Iterator[object]:
    for sorts in sets:
        endpoints = placed(sorts)
        for policy, item in SERVICES.items():
            port = made(item, endpoints)
            for kind, zone, inside in itertools.product(KINDS, (ZONE, ""), (True, False)):
                expected = answer(spec_of(*policy), endpoints, HERE, zone, kind, inside)
                found = chosen(port, kind, zone, inside)
                if found != expected:
                    yield policy, kind, zone, inside, endpoints, found, expected


@pytest.mark.slow
def test_every_pair_of_endpoints() -> None:
    sets = itertools.chain([()], *(itertools.combinations_with_replacement(SORTS, n) for n in
                                   (1, 2)))  # fmt: skip
    assert next(differences(sets), None) is None


def test_every_three_endpoints() -> None:
    """In CI of the sorts that differ most."""
    with campaign("choice-compiled", "sets of three endpoints") as figures:
        sets = list(itertools.combinations_with_replacement(SORTS if SOAK else FEW, 3))
        assert next(differences(sets), None) is None
        figures.count = len(sets)


def test_choosing_rests_on_nothing_that_compiling_leaves_out() -> None:
    for size in (1, 2, 3):
        sets = itertools.combinations_with_replacement(FEW, size)
        assert next(differences(sets, whole), None) is None


VALUES = (None, True, False)


def test_every_condition_said_or_not() -> None:
    """Beside nobody, and beside one that is ready."""
    alone = every(
        [
            dict(zip(("ready", "serving", "terminating"), values, strict=True))
            for values in itertools.product(VALUES, repeat=3)
        ],
        PLACES,
        [{}],
    )
    sets = [(one, *others) for one in alone for others in ((), every(READY, ("there",), [{}])[:1])]
    assert next(differences(sets), None) is None


NODES = {"n1": "z1", "n2": "z1", "n3": "z2", "n4": ""}
NODE_TEXT = "".join(
    f"---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, "
    f"labels: {{topology.kubernetes.io/zone: '{zone}'}}}}\n"
    for name, zone in NODES.items()
)


@pytest.mark.parametrize(
    "distribution", ["", "PreferClose", "PreferSameZone", "PreferSameNode", "Elsewhere"]
)
def test_a_folder_gives_the_hints_that_a_controller_gives(distribution: str) -> None:
    """Every set of places that a Service's pods are in, asked from every node."""
    for policy, size in itertools.product(POLICIES, range(len(NODES) + 1)):
        for places in itertools.combinations(NODES, size):
            spec = {**spec_of(*policy), "selector": {"a": "b"}, "trafficDistribution": distribution}
            text = NODE_TEXT + service_text("s", json.dumps(spec))
            text += "".join(pod(name, "{a: b}", rest=f", nodeName: {name}") for name in places)
            now, _ = build(documents(text), Options(services=ALLOWED))
            endpoints = [
                {
                    "addresses": [item.addresses[0]],
                    "nodeName": item.node,
                    "hints": controller_hints(distribution, item.node, NODES[item.node]),
                }
                for item in now.pods.values()
            ]
            table = ServiceTable()
            table.update(now.services, now.endpoints)
            [port] = table.entries["default/s"]
            for node, kind, inside in itertools.product(NODES, ("ClusterIP", "NodePort"), (0, 1)):
                expected = answer(spec, endpoints, node, NODES[node], kind, bool(inside))
                assert chosen(port, kind, NODES[node], bool(inside), node) == expected


def test_the_port_of_the_service_as_it_is_given() -> None:
    """What the combinations above rest on."""
    item = SERVICES["Cluster", "Local"]
    assert item.ports == (Port(80, "TCP", "", 80, 31000),)
    assert [one.kind for one in item.outside] == ["ExternalIP", "LoadBalancer"]
