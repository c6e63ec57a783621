"""Documents to World: expansion, placement, addresses, services."""

from __future__ import annotations

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from tidegate_operator import world
from tidegate_operator.objects import NAME_LABEL, ObjectName
from tidegate_operator.world import Options, build
from unit.operator.given import BY_LABELS, documents, make, pod, policy, service

TEMPLATE = "template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c}]}}"


def _workload(kind: str, spec: str, version: str = "apps/v1") -> str:
    return (
        f"---\nkind: {kind}\napiVersion: {version}\nmetadata: {{name: w}}\n"
        f"spec: {{selector: {{matchLabels: {{a: b}}}}, {spec}{TEMPLATE}}}\n"
    )


COUNTS = [
    ("one replica by default", _workload("Deployment", ""), 1),
    ("replicas", _workload("ReplicaSet", "replicas: 3, "), 3),
    ("scaled to nothing", _workload("Deployment", "replicas: 0, "), 0),
    ("one a node", _workload("DaemonSet", ""), 2),
    ("parallelism", _workload("Job", "parallelism: 3, completions: 2, ", "batch/v1"), 2),
    ("suspended", _workload("Job", "suspend: true, ", "batch/v1"), 0),
]


@pytest.mark.parametrize(("reason", "text", "count"), COUNTS)
def test_expansion(reason: str, text: str, count: int) -> None:
    assert len(make(text).pods) == count


def test_stateful_set_names_are_ordinals() -> None:
    text = _workload("StatefulSet", "replicas: 2, ordinals: {start: 5}, ")
    assert [name.name for name in make(text).pods] == ["w-5", "w-6"]


def test_daemon_set_is_on_every_node_once() -> None:
    found = make(_workload("DaemonSet", ""), Options(nodes=3)).pods.values()
    assert sorted(item.node for item in found) == ["node-1", "node-2", "node-3"]


def test_pods_alternate_and_have_both_families() -> None:
    found = make(pod("a") + pod("b") + pod("c")).pods.values()
    assert [(item.node, item.addresses) for item in found] == [
        ("node-1", ("10.244.0.2", "fd00:10:244::2")),
        ("node-2", ("10.244.1.2", "fd00:10:244:1::2")),
        ("node-1", ("10.244.0.3", "fd00:10:244::3")),
    ]


NODE = "---\napiVersion: v1\nkind: Node\nmetadata: {name: %s}\n"


def test_node_objects_name_the_nodes() -> None:
    text = NODE % "n1" + NODE % "n2" + NODE % "n3" + pod("a", rest=", nodeName: n3")
    found = make(text)
    assert list(found.nodes) == ["n1", "n2", "n3"]
    assert found.pods[ObjectName("default", "a")].node == "n3"
    assert list(make(text, Options(nodes=1)).nodes) == ["n1"]
    assert list(make(NODE % "n1", Options(nodes=2)).nodes) == ["n1", "node-1"]


def test_unknown_node_name_leaves_the_pod_pending() -> None:
    now, problems = build(documents(pod("a", rest=", nodeName: other")))
    assert now.pods == {}
    assert (problems[0].severity, problems[0].file) == ("error", "a.yaml")
    assert "node-1, node-2" in problems[0].remedy


def test_full_node_leaves_the_pod_pending() -> None:
    options = Options(nodes=1)
    text = "".join(pod(f"p{number:03}") for number in range(254))
    now, problems = build(documents(text), options)
    assert len(now.pods) == 253
    assert [problem.object for problem in problems] == ["Pod default/p253"]


def test_host_network_has_the_nodes_addresses() -> None:
    found = make(pod("a", rest=", hostNetwork: true"))
    (item,) = found.pods.values()
    assert (item.host_network, item.addresses) == (True, found.nodes["node-1"].addresses)
    assert found.nodes["node-1"].addresses == ("172.18.0.2", "fc00:f853:ccd:e793::2")


def test_namespaces_carry_their_name_whatever_users_write() -> None:
    text = (
        f"---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: n, labels: "
        f"{{{NAME_LABEL}: other, a: b}}}}\n" + pod("a", namespace="m")
    )
    assert make(text).namespaces == {
        "default": {NAME_LABEL: "default"},
        "m": {NAME_LABEL: "m"},
        "n": {NAME_LABEL: "n", "a": "b"},
    }


@settings(max_examples=60, deadline=None)
@hypothesis_given(
    st.lists(st.frozensets(st.sampled_from("abcdefghij"), max_size=10), min_size=2, max_size=6)
)
def test_nobody_moves_for_somebody_else(states: list[frozenset[str]]) -> None:
    pods = {name: documents(pod(name) + service(name, "{ports: [{port: 1}]}"))
            for name in "abcdefghij"}  # fmt: skip
    now: world.MadeWorld | None = None
    for state in states:
        before = now
        given = [item for name in state for item in pods[name]]
        now, _ = build(given, Options(), before)
        addresses = [text for item in now.pods.values() for text in item.addresses]
        addresses += [text for item in now.services.values() for text in item.cluster_ips]
        assert len(set(addresses)) == len(addresses)
        if before is not None:
            for name in now.pods.keys() & before.pods.keys():
                assert now.pods[name] is before.pods[name]
                assert now.services[name] is before.services[name]


def test_addresses_rest_before_reuse() -> None:
    first, _ = build(documents(pod("a") + pod("b")), Options(nodes=1))
    second, _ = build(documents(pod("b")), Options(nodes=1), first)
    third, _ = build(documents(pod("b") + pod("c")), Options(nodes=1), second)
    assert third.pods[ObjectName("default", "c")].addresses[0] == "10.244.0.4"


def test_edited_template_changes_pods_in_place() -> None:
    text = _workload("Deployment", "")
    first, _ = build(documents(text), BY_LABELS)
    second, _ = build(documents(text.replace("a: b", "a: c")), BY_LABELS, first)
    (before,), (after,) = first.pods.values(), second.pods.values()
    assert (before.name, before.uid, before.addresses) == (after.name, after.uid, after.addresses)
    assert after.labels["a"] == "c"
    assert before.identity != after.identity


def test_workload_hashes_make_no_identity_unless_selected() -> None:
    text = _workload("StatefulSet", "replicas: 2, ")
    assert len({item.identity for item in make(text).pods.values()}) == 1
    key = "statefulset.kubernetes.io/pod-name"
    text += policy("p", f"{{podSelector: {{matchLabels: {{{key}: w-1}}}}}}")
    assert len({item.identity for item in make(text).pods.values()}) == 2


SERVICES = [
    ("one family by default", "{ports: [{port: 80}], selector: {a: b}}", 1,
     {(80, "TCP", 4): [("10.244.0.2", 80)]}),
    ("both families", "{ipFamilyPolicy: PreferDualStack, ports: [{port: 80}], selector: {a: b}}", 2,
     {(80, "TCP", 4): [("10.244.0.2", 80)], (80, "TCP", 6): [("fd00:10:244::2", 80)]}),
    ("only IPv6", "{ipFamilies: [IPv6], ports: [{port: 80}], selector: {a: b}}", 1,
     {(80, "TCP", 6): [("fd00:10:244::2", 80)]}),
    ("target port", "{ports: [{port: 80, targetPort: 8080}], selector: {a: b}}", 1,
     {(80, "TCP", 4): [("10.244.0.2", 8080)]}),
    ("named target port", "{ports: [{port: 8, targetPort: web}], selector: {a: b}}", 1,
     {(8, "TCP", 4): [("10.244.0.2", 80)]}),
    ("name of another protocol", "{ports: [{port: 8, protocol: UDP, targetPort: web}],"
     " selector: {a: b}}", 1, {(8, "UDP", 4): []}),
    ("selects nothing", "{ports: [{port: 80}], selector: {a: c}}", 1, {(80, "TCP", 4): []}),
    ("headless", "{clusterIP: None, ports: [{port: 80}], selector: {a: b}}", 0, {}),
    ("ExternalName", "{type: ExternalName, externalName: x}", 0, {}),
    ("NodePort keeps its ClusterIP", "{type: NodePort, ports: [{port: 80}], selector: {a: b}}", 1,
     {(80, "TCP", 4): [("10.244.0.2", 80)]}),
    ("several ports", "{ports: [{port: 1, name: a}, {port: 2, name: b}], selector: {a: b}}", 1,
     {(1, "TCP", 4): [("10.244.0.2", 1)], (2, "TCP", 4): [("10.244.0.2", 2)]}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "spec", "addresses", "expected"), SERVICES)
def test_service(reason: str, spec: str, addresses: int, expected: dict[object, object]) -> None:
    found = make(pod("x", "{a: b}") + pod("y", "{a: c}", "other") + service("s", spec))
    name = ObjectName("default", "s")
    assert len(found.services[name].cluster_ips) == addresses
    ports = found.endpoints[name].ports
    found_at = {(p.port, p.protocol, p.family): [b[:2] for b in p.backends] for p in ports}
    assert found_at == expected


def test_own_cluster_ip_and_a_second_claim() -> None:
    spec = "{clusterIP: 10.96.0.10, ports: [{port: 80}], selector: {a: b}}"
    now, problems = build(documents(service("a", spec) + service("b", spec) + pod("p", "{a: b}")))
    first, second = (now.services[ObjectName("default", name)].cluster_ips for name in "ab")
    assert first == ("10.96.0.10",)
    assert second != first
    assert [problem.field for problem in problems] == ["spec.clusterIP"]


SLICE = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s-1, labels: {kubernetes.io/service-name: s}}
addressType: IPv4
endpoints:
- addresses: [192.0.2.1]
- addresses: [192.0.2.2]
  conditions: {ready: false}
ports: [{port: 8080}]
"""


def test_endpoint_slices_replace_the_selector_and_come_back() -> None:
    text = pod("x", "{a: b}") + service("s", "{ports: [{port: 80}], selector: {a: b}}")
    name = ObjectName("default", "s")
    first, _ = build(documents(text))
    second, _ = build(documents(text + SLICE), Options(), first)
    third, _ = build(documents(text), Options(), second)
    worlds = (first, second, third)
    backends = [[b[:2] for b in w.endpoints[name].ports[0].backends] for w in worlds]
    pods = [("10.244.0.2", 80)]
    assert backends == [pods, [("192.0.2.1", 8080)], pods]


def test_outside_identities_that_overlap_are_stalled() -> None:
    text = "---\napiVersion: tidegate.dev/v1alpha1\nkind: Identity\nmetadata: {name: %s}\n"
    text += "spec: {cidrs: [%s]}\n"
    now, problems = build(
        documents(
            text % ("a", "192.0.2.0/24") + text % ("b", "192.0.2.1/32")
            + text % ("c", "10.244.1.0/24") + text % ("d", "10.0.0.0/8")
        )
    )  # fmt: skip
    assert list(now.identities) == ["a", "d"]
    assert [problem.object for problem in problems] == ["Identity b", "Identity c"]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MAX_PODS", 3)
    now, problems = build(documents(_workload("Deployment", "replicas: 9, ")))
    assert len(now.pods) == 3
    assert "more than 3 pods" in problems[0].message
    monkeypatch.setattr(world, "MAX_NODES", 3)
    now, problems = build((), Options(nodes=9))
    assert (len(now.nodes), problems[0].severity) == (3, "error")


def test_nodes_that_are_made_stay() -> None:
    options = Options(keep_nodes=True)
    before, _ = build(documents(pod("a")), options)
    now, problems = build(documents(pod("a") + NODE % "late"), options, before)
    assert (now.nodes, now.pods) == (before.nodes, before.pods)
    assert [problem.object for problem in problems] == ["Node late"]
    first, _ = build(documents(pod("a") + NODE % "late"), options)
    assert list(first.nodes) == ["late"]
    again, problems = build(documents(pod("a")), options, first)
    assert (again.pods, problems) == (first.pods, ())


def test_pods_without_a_place_are_one_problem_a_workload() -> None:
    text = _workload("Deployment", "replicas: 300, ") + pod("ghost", rest=", nodeName: nowhere")
    now, problems = build(documents(text), Options(nodes=1))
    assert len(now.pods) == 253
    found = sorted(str(problem) for problem in problems)
    assert len(found) == 2
    assert "stays pending, as 46 more of it do: node node-1 has no free address" in found[0]
    assert "Pod default/ghost: stays pending: there is no node nowhere" in found[1]


def test_selector_that_mentions_a_hash_label_splits_running_pods() -> None:
    text = _workload("StatefulSet", "replicas: 2, ")
    key = "statefulset.kubernetes.io/pod-name"
    spec = f"{{podSelector: {{matchLabels: {{{key}: w-1}}}}}}"
    plain, split = documents(text), documents(text + policy("p", spec))
    # The same StatefulSet object in both: only the policy is new.
    split = (*plain, *(item for item in split if item.key.kind == "NetworkPolicy"))
    first, _ = build(plain)
    second, _ = build(split, Options(), first)
    third, _ = build(plain, Options(), second)
    kinds = [len({pod.identity for pod in now.pods.values()}) for now in (first, second, third)]
    assert kinds == [1, 2, 1]


def test_daemon_set_follows_the_nodes() -> None:
    daemons, node = documents(_workload("DaemonSet", "")), documents(NODE % "n1")
    more = documents(NODE % "n2")
    first, _ = build((*daemons, *node))
    second, _ = build((*daemons, *node, *more), Options(), first)
    third, _ = build((*daemons, *more), Options(), second)
    nodes = [sorted(pod.node for pod in now.pods.values()) for now in (first, second, third)]
    assert nodes == [["n1"], ["n1", "n2"], ["n2"]]
