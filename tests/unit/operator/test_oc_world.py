"""A cluster's objects to World: who has an identity and an address, and the same meaning as
the same manifests have in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tidegate_api.state import encode
from tidegate_operator import identities
from tidegate_operator import world as folder_world
from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.dump import FIELDS
from tidegate_operator.cluster.world import ClusterWorld, Snapshot, build, same_policies
from tidegate_operator.compile import Compiler, Desired, compile
from tidegate_operator.identities import EMPTY_LEDGER
from tidegate_operator.objects import NAME_LABEL, ObjectName
from tidegate_operator.publish import render
from unit.operator.given import documents

Tree = dict[str, Any]


def tree(kind: str, name: str, namespace: str = "default", **rest: Any) -> Tree:
    labels = rest.pop("labels", {})
    meta: Tree = {"name": name, "uid": f"{kind}-{namespace}-{name}", "labels": labels}
    if namespace:
        meta["namespace"] = namespace
    meta["creationTimestamp"] = rest.pop("created", "2026-01-01T00:00:00Z")
    return {"kind": kind, "metadata": meta, **rest}


def pod(name: str, node: str = "n1", ip: str = "", **rest: Any) -> Tree:
    phase = rest.pop("phase", "Running" if ip else "Pending")
    host = rest.pop("host", False)
    status: Tree = {"phase": phase}
    if ip:
        status.update(podIP=ip, podIPs=[{"ip": ip}])
    if "started" in rest:
        status["startTime"] = rest.pop("started")
    spec: Tree = {"containers": [{"name": "c"}]}
    if node:
        spec["nodeName"] = node
    if host:
        spec["hostNetwork"] = True
    return tree("Pod", name, spec=spec, status=status, **rest)


def mirror(name: str, of: str, **rest: Any) -> Tree:
    """As the kubelet makes of a file in its directory of static pods."""
    made = pod(name, **rest)
    made["metadata"]["annotations"] = {"kubernetes.io/config.mirror": of, "example.com/a": "b"}
    return made


def node(name: str, number: int = 0) -> Tree:
    addresses = [
        {"type": "Hostname", "address": name},
        {"type": "InternalIP", "address": f"172.18.0.{number + 2}"},
    ]
    cidr = f"10.244.{number}.0/24"
    return tree(
        "Node", name, "", spec={"podCIDRs": [cidr, f"fd00:0:0:{number}::/64"]},
        status={"addresses": addresses},
    )  # fmt: skip


def snapshot(*trees: Tree) -> Snapshot:
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for item in trees:
        field, decode = FIELDS[item["kind"]]
        meta = item["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        found.setdefault(field, {})[key] = decode(json.dumps(item).encode())
    return Snapshot(**found)


def made(*trees: Tree) -> ClusterWorld:
    return build(snapshot(*trees))[0]


def addresses(world: ClusterWorld) -> dict[str, str]:
    """address -> pod, as ipcache would say."""
    return {
        address: name.name
        for name, item in world.pods.items()
        if not item.host_network
        for address in item.addresses
    }


BOUND = [
    ("not bound: nobody's yet", [pod("a", node="")], []),
    ("bound, no address yet: an endpoint", [pod("a")], ["a"]),
    ("running", [pod("a", ip="10.244.0.5")], ["a"]),
    ("completed: gone", [pod("a", ip="10.244.0.5", phase="Succeeded")], []),
    ("failed: gone", [pod("a", ip="10.244.0.5", phase="Failed")], []),
    ("unknown to its kubelet: still there", [pod("a", ip="10.244.0.5", phase="Unknown")], ["a"]),
    ("host network: no subject", [pod("a", ip="172.18.0.2", host=True)], []),
    ("its node is not there: no endpoint", [pod("a", node="other", ip="10.244.9.5")], []),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "pods", "expected"), BOUND)
def test_endpoints(reason: str, pods: list[Tree], expected: list[str]) -> None:
    world = made(node("n1"), *pods)
    desired = compile(world, identities.allocate(world, EMPTY_LEDGER))
    assert [e.name for e in desired.nodes["n1"].endpoints] == expected


HASH = "0123456789abcdef0123456789abcdef"


def test_a_static_pod_has_the_uid_that_its_runtime_knows() -> None:
    world = made(node("n1"), mirror("a", HASH, ip="10.244.0.5"), pod("b", ip="10.244.0.6"))
    desired = compile(world, identities.allocate(world, EMPTY_LEDGER))
    found = {e.name: e.uid for e in desired.nodes["n1"].endpoints}
    assert found == {"a": HASH, "b": "Pod-default-b"}
    not_one = made(node("n1"), mirror("a", "Pod-default-b", ip="10.244.0.5"))
    assert not_one.pods[ObjectName("default", "a")].uid == "Pod-default-a"


def test_of_two_mirrors_of_one_file_the_first_is_it() -> None:
    first = mirror("real", HASH, ip="10.244.0.5", created=EARLY)
    second = mirror("forged", HASH, ip="10.244.0.6", created=LATE)
    both, alone = snapshot(node("n1"), first, second), snapshot(node("n1"), second)
    world = build(both)[0]
    assert [key.name for key in world.pods] == ["real"]
    # One after the other is as from scratch, in both directions.
    assert build(alone, world)[0].pods == build(alone)[0].pods
    assert [key.name for key in build(both, build(alone)[0])[0].pods] == ["real"]


def test_terminating_pod_keeps_its_identity() -> None:
    item = pod("a", ip="10.244.0.5")
    item["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    assert addresses(made(node("n1"), item)) == {"10.244.0.5": "a"}


def test_pod_whose_node_is_gone_is_still_a_peer() -> None:
    world = made(node("n1"), pod("a", node="other", ip="10.244.9.5"))
    desired = compile(world, identities.allocate(world, EMPTY_LEDGER))
    assert desired.ipcache["10.244.9.5/32"].identity >= 256


EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
CLAIMS = [
    ("running before pending", {"phase": "Pending", "started": LATE}, {"started": EARLY}, "b"),
    ("the newer of two that run", {"started": LATE}, {"started": EARLY}, "a"),
    ("a completed one never", {"phase": "Succeeded", "started": LATE}, {"started": EARLY}, "b"),
    ("not started: by when it was made", {"created": LATE}, {"created": EARLY}, "a"),
    ("host network claims nothing", {"host": True, "started": LATE}, {"started": EARLY}, "b"),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "one", "two", "winner"), CLAIMS)
@pytest.mark.parametrize("swapped", [False, True])
def test_two_pods_claim_one_address(
    reason: str, one: Tree, two: Tree, winner: str, swapped: bool
) -> None:
    pods = [pod("a", ip="10.244.0.5", **dict(one)), pod("b", ip="10.244.0.5", **dict(two))]
    world = made(node("n1"), *(reversed(pods) if swapped else pods))
    assert addresses(world) == {"10.244.0.5": winner}
    assert {item.node for item in world.pods.values()} == {"n1"}


def test_three_pods_claim_one_address() -> None:
    for order in ((1, 2, 3), (3, 2, 1), (2, 3, 1)):
        pods = [pod(f"p{n}", ip="10.244.0.5", started=f"2026-01-0{n}T00:00:00Z") for n in order]
        assert addresses(made(node("n1"), *pods)) == {"10.244.0.5": "p3"}


def test_node_addresses() -> None:
    kubernetes = tree(
        "EndpointSlice", "kubernetes", addressType="IPv4",
        labels={"kubernetes.io/service-name": "kubernetes"},
        ports=[{"name": "https", "port": 6443}],
        endpoints=[{"addresses": ["172.18.0.2"]}, {"addresses": ["192.0.2.9"]}],
    )  # fmt: skip
    world = made(node("n1", 0), node("n2", 1), kubernetes)
    desired = compile(world, EMPTY_LEDGER)
    assert {cidr: entry.identity for cidr, entry in desired.ipcache.items()} == {
        "172.18.0.2/32": 3,  # serves the API
        "172.18.0.3/32": 4,
        "192.0.2.9/32": 3,  # an API server outside
        "10.244.0.1/32": 4, "fd00::1/128": 4, "10.244.1.1/32": 4, "fd00:0:0:1::1/128": 4,
        "10.244.0.0/24": 0, "fd00::/64": 0, "10.244.1.0/24": 0, "fd00:0:0:1::/64": 0,
    }  # fmt: skip


def test_namespace_is_structural() -> None:
    lie = tree("Namespace", "red", "", labels={NAME_LABEL: "blue", "team": "x"})
    world = made(lie, tree("Pod", "p", "unread", spec={"nodeName": "n1"}))
    assert world.namespaces == {
        "red": {NAME_LABEL: "red", "team": "x"},
        "unread": {NAME_LABEL: "unread"},
    }


def service(name: str, **spec: Any) -> Tree:
    return tree("Service", name, spec=spec)


def test_services_come_from_endpoint_slices_only() -> None:
    slices = tree(
        "EndpointSlice", "web-1", addressType="IPv4",
        labels={"kubernetes.io/service-name": "web"},
        ports=[{"name": "", "port": 8080, "protocol": "TCP"}],
        endpoints=[
            {"addresses": ["10.244.0.5"], "conditions": {"ready": True}},
            {"addresses": ["10.244.0.6"], "conditions": {"ready": None}},
            {"addresses": ["10.244.0.7"], "conditions": {"ready": False}},
            {"addresses": ["10.244.0.8"]},
            {"addresses": None},
        ],
    )  # fmt: skip
    spec = {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": "http"}]}  # fmt: skip
    world = made(
        node("n1"), pod("x", ip="10.244.0.99", labels={"app": "web"}), service("web", **spec),
        service("none", clusterIP="None", ports=[{"port": 80}]),
        slices,
    )  # fmt: skip
    desired = compile(world, identities.allocate(world, EMPTY_LEDGER))
    (port,) = desired.services["default/web"]
    assert [f"{b.address}:{b.port}" for b in port.backends] == [
        "10.244.0.5:8080", "10.244.0.6:8080", "10.244.0.8:8080",
    ]  # fmt: skip
    assert [f"{f.address}:{f.port}" for f in port.frontends] == ["10.96.0.9:80"]
    assert list(desired.services) == ["default/web"]


def test_service_of_a_newer_server_works_and_says_what_is_not_known() -> None:
    spec = {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "novel": 1}], "newField": {"a": 1}}
    world, problems = build(snapshot(service("web", **spec)))
    assert world.services[ObjectName("default", "web")].cluster_ips == ("10.96.0.9",)
    assert sorted(p.field for p in problems) == ["spec.newField", "spec.ports.0.novel"]


def test_what_cannot_be_decoded_is_said() -> None:
    with pytest.raises(kinds.DecodeError, match="podIP"):
        kinds.pod(b'{"metadata": {"name": "a"}, "status": {"podIP": 7}}')
    with pytest.raises(kinds.DecodeError, match="podSelector"):
        kinds.network_policy(
            json.dumps(tree("NetworkPolicy", "p", spec={"podSelector": {"novel": 1}})).encode()
        )
    bad = Snapshot(invalid={"NetworkPolicy": {("default", "p"): "no"}})
    (problem,) = build(bad)[1]
    assert (problem.object, problem.severity) == ("NetworkPolicy default/p", "error")


OPEN: Tree = {"ports": [{"port": 80}]}
NOVEL: Tree = {"ports": [{"port": 80}], "novel": {"only": "sometimes"}}
UNREAD = [
    ("the rule allows nothing, the next keeps its place", {"ingress": [NOVEL, OPEN]}, [1], False),
    ("inside of a peer", {"ingress": [{"from": [{"novel": 1}]}, OPEN]}, [1], False),
    ("a field of the spec may change every rule", {"ingress": [OPEN], "novel": 1}, [], False),
    ("egress alone still isolates there", {"egress": [NOVEL]}, [], True),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "rules", "egress"), UNREAD)
def test_policy_of_a_newer_server_isolates_and_says_what_is_not_known(
    reason: str, spec: Tree, rules: list[int], egress: bool
) -> None:
    spec = {"podSelector": {}, **spec}
    objects = [node("n1"), tree("Namespace", "default", ""), pod("a", ip="10.244.0.5")]
    world, problems = build(snapshot(*objects, tree("NetworkPolicy", "p", spec=spec)))
    desired = compile(world, identities.allocate(world, EMPTY_LEDGER))
    found = {r.spec.direction: r.spec for r in desired.rule_sets.values()}
    assert ("Egress" in found) == egress, reason
    assert [rule.index for rule in found["Ingress"].rules] == rules, reason
    assert len(found["Ingress"].terms) == len(rules)
    assert not egress or found["Egress"].terms == []
    said = [p for p in problems if p.severity == "error"]
    assert [(p.object, "novel" in p.message) for p in said] == [("NetworkPolicy default/p", True)]


def test_what_means_nothing_changes_nothing() -> None:
    """A heartbeat or a managed field makes no new object: nothing would be compiled."""
    for one, change in (
        (pod("a", ip="10.244.0.5"), ("status", {"phase": "Running", "podIP": "10.244.0.5",
                                                "podIPs": [{"ip": "10.244.0.5"}],
                                                "conditions": [{"type": "Ready"}]})),
        (node("n1"), ("status", {**node("n1")["status"], "images": [{"names": ["x"]}]})),
        (service("web", ports=[{"port": 80}]), ("status", {"loadBalancer": {"ingress": []}})),
    ):  # fmt: skip
        _, decode = FIELDS[one["kind"]]
        before = decode(json.dumps(one).encode())
        other = {**one, change[0]: change[1]}
        other["metadata"] = {**one["metadata"], "resourceVersion": "9", "managedFields": [{}]}
        assert decode(json.dumps(other).encode()) == before


# ---- The same manifests in a folder ----------------------------------------------------------

MANIFESTS = """
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: red}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: dev, labels: {team: blue}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web, app.kubernetes.io/version: v1}}
    spec: {containers: [{name: c, ports: [{containerPort: 80}]}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client, namespace: dev}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec: {containers: [{name: c}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {team: blue}}
      podSelector: {matchLabels: {app: client}}
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
    ports: [{port: 80}]
  egress: [{ports: [{port: 53, protocol: UDP}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: versions, namespace: shop}
spec:
  podSelector: {matchExpressions: [{key: app.kubernetes.io/version, operator: Exists}]}
  ingress: [{from: [{podSelector: {}}]}]
---
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: office, namespace: shop}
spec:
  subject: {podSelector: {any: true}}
  isolates: []
  mode: Enforce
  ingress: [{action: Deny, peers: [{identity: office}], ports: [{any: true}]}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: dev}
spec:
  tier: Baseline
  priority: 7
  subject: {namespaces: {matchLabels: {team: blue}}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
---
apiVersion: tidegate.dev/v1alpha1
kind: Identity
metadata: {name: office}
spec: {cidrs: [192.0.2.0/24]}
---
apiVersion: tidegate.dev/v1alpha1
kind: Identity
metadata: {name: soon}
spec: {namespace: dev, labels: {app: soon}}
"""


def as_cluster(text: str) -> Iterator[Tree]:
    """What a cluster that runs `text` holds: pods with a cluster's own labels and names."""
    ip = 10
    for document in documents(text):
        written = document.object.model_dump(by_alias=True, exclude_unset=True, mode="json")
        if document.key.kind in FIELDS:
            written["metadata"].setdefault("uid", str(document.key))
            yield written
            continue
        template = written["spec"]["template"]
        for index in range(written["spec"].get("replicas", 1)):
            ip += 1
            labels = {**template["metadata"]["labels"], "pod-template-hash": "6d4cf56db6"}
            yield pod(
                f"{document.key.name}-6d4cf56db6-{index}xy", "n1", f"10.244.0.{ip}", labels=labels
            ) | {"metadata": {"name": f"{document.key.name}-{index}", "uid": f"u-{ip}",
                              "namespace": document.key.namespace, "labels": labels}}  # fmt: skip


def _of(desired: Desired, ledger: identities.Ledger) -> tuple[Any, Any, Any]:
    return (
        {name: encode(item) for name, item in desired.rule_sets.items()},
        {name: encode(item) for name, item in desired.peers.items()},
        ledger.live,
    )


def test_same_rule_sets_and_identities_as_in_a_folder() -> None:
    there = folder_world.build(documents(MANIFESTS))[0]
    there_ledger = identities.allocate(there, EMPTY_LEDGER)
    here = made(node("n1"), *as_cluster(MANIFESTS))
    here_ledger = identities.allocate(here, EMPTY_LEDGER)
    want = _of(compile(there, there_ledger), there_ledger)
    assert _of(compile(here, here_ledger), here_ledger) == want
    assert len(want[0]) == 3
    assert len(want[2]) == 4


# ---- Any order of events ------------------------------------------------------------------------


def _variants() -> dict[tuple[str, str, str], list[Tree]]:
    """(kind, namespace, name) -> the forms the object may take."""
    found: dict[tuple[str, str, str], list[Tree]] = {}
    for item in [
        node("n1"), node("n2", 1), node("n1", 2),
        pod("a"), pod("a", ip="10.244.0.5", labels={"app": "x"}),
        pod("a", ip="10.244.0.5", labels={"app": "x"}, phase="Succeeded"),
        pod("b", ip="10.244.0.5", labels={"app": "y", "pod-template-hash": "1"}, started=LATE),
        pod("b", "n2", ip="10.244.1.5", labels={"app": "x"}),
        pod("h", ip="172.18.0.2", host=True, labels={"app": "x"}),
        tree("Namespace", "default", "", labels={"team": "red"}),
        tree("Namespace", "default", "", labels={"team": "blue"}),
        tree("NetworkPolicy", "p", spec={"ingress": [{"from": [
            {"podSelector": {"matchLabels": {"app": "x"}}}]}]}),
        tree("NetworkPolicy", "p", spec={"ingress": [{"from": [
            {"namespaceSelector": {"matchLabels": {"team": "red"}}}]}]}),
        tree("NetworkPolicy", "q", spec={"podSelector": {"matchExpressions": [
            {"key": "pod-template-hash", "operator": "Exists"}]}}),
        service("s", clusterIP="10.96.0.9", ports=[{"port": 80}]),
        service("s", clusterIP="10.96.0.9", ports=[{"port": 81}]),
        tree("EndpointSlice", "s-1", addressType="IPv4", ports=[{"port": 8080}],
             labels={"kubernetes.io/service-name": "s"},
             endpoints=[{"addresses": ["10.244.0.5"]}]),
        tree("EndpointSlice", "s-1", addressType="IPv4", ports=[{"port": 8080}],
             labels={"kubernetes.io/service-name": "s"}, endpoints=[]),
        tree("EndpointSlice", "kubernetes", addressType="IPv4", ports=[{"port": 6443}],
             labels={"kubernetes.io/service-name": "kubernetes"},
             endpoints=[{"addresses": ["172.18.0.2"]}]),
        tree("Identity", "office", "", spec={"cidrs": ["192.0.2.0/24"]}),
        tree("Identity", "office", "", spec={"cidrs": ["10.244.0.0/24"]}),
        tree("Identity", "soon", "", spec={"namespace": "default", "labels": {"app": "x"}}),
    ]:  # fmt: skip
        meta = item["metadata"]
        key = (item["kind"], meta.get("namespace", ""), meta["name"])
        found.setdefault(key, []).append(item)
    return found


VARIANTS = _variants()


class Reader:
    """Mappings as reflectors give them: equal objects stay, unchanged mappings stay."""

    def __init__(self) -> None:
        self.held: dict[str, Mapping[tuple[str, str], Any]] = {}

    def snapshot(self, trees: list[Tree]) -> Snapshot:
        fresh = snapshot(*trees)
        for field in (field for field, _ in FIELDS.values()):
            now, before = getattr(fresh, field), self.held.get(field, {})
            kept = {k: before[k] if before.get(k) == v else v for k, v in now.items()}
            if kept != before or field not in self.held:
                self.held[field] = kept
        return Snapshot(**self.held)


STATES = st.lists(
    st.fixed_dictionaries(
        {key: st.sampled_from([None, *forms]) for key, forms in VARIANTS.items()}
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@given(STATES)
@settings(max_examples=150)
def test_incremental_is_from_scratch(states: list[dict[Any, Tree | None]]) -> None:
    reader, compiler, ledger = Reader(), Compiler(), EMPTY_LEDGER
    world: ClusterWorld | None = None
    for state in states:
        given = reader.snapshot([item for item in state.values() if item is not None])
        world, problems = build(given, world)
        assert (world, problems) == build(given)
        ledger = identities.allocate(world, ledger)
        got, want = compiler.compile(world, ledger), compile(world, ledger)
        assert [encode(item) for item in render(got, ledger)] == [
            encode(item) for item in render(want, ledger)
        ]
        assert got.problems == want.problems


def _follow(*states: list[Tree]) -> list[Desired]:
    """What one compiler that lives through the states makes of each."""
    reader, compiler, ledger = Reader(), Compiler(), EMPTY_LEDGER
    world: ClusterWorld | None = None
    found = []
    for state in states:
        world, _ = build(reader.snapshot(state), world)
        ledger = identities.allocate(world, ledger)
        found.append(compiler.compile(world, ledger))
    return found


def test_node_made_anew_owns_its_state() -> None:
    again = node("n1")
    again["metadata"]["uid"] = "another"
    first, second = _follow([node("n1"), pod("a")], [again, pod("a")])
    assert (first.nodes["n1"].uid, second.nodes["n1"].uid) == ("Node--n1", "another")
    assert first.nodes["n1"].endpoints == second.nodes["n1"].endpoints


def test_selector_that_comes_to_pick_nobody_is_said() -> None:
    """No pod changed, only the labels of its namespace."""
    peer = {"namespaceSelector": {"matchLabels": {"team": "red"}}}
    rest = [node("n1"), pod("a"), tree("NetworkPolicy", "p", spec={"ingress": [{"from": [peer]}]})]
    first, second, third = _follow(
        *([*rest, tree("Namespace", "default", "", labels={"team": team})]
          for team in ("red", "blue", "red"))
    )  # fmt: skip
    said = [[problem.message for problem in item.problems] for item in (first, second, third)]
    assert said == [[], ["selects no peer now"], []]


@pytest.mark.parametrize("field", ["policies", "cluster_policies", "traffic_policies"])
def test_policies_of_every_kind_are_policies(field: str) -> None:
    """Numbers do not merge in the step in which one goes."""
    before = Snapshot()
    assert same_policies(before, dataclasses.replace(before, pods={}))
    assert not same_policies(before, dataclasses.replace(before, **{field: {}}))
