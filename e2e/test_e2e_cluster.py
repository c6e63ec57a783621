"""Tidegate instead of kube-proxy: the cluster works, and says how."""

from __future__ import annotations

import json
import re

import pytest

from kind import cluster
from rig import asking, cold, install, pods

pytestmark = pytest.mark.kind
SPACE = "e2e-cluster"
STATIC = "/etc/kubernetes/manifests"
KUBERNETES = "kubernetes.default.svc.cluster.local"


@pytest.fixture(scope="module")
def one_a_node(tidegate: None) -> dict[str, pods.Pod]:
    """A pod on every node."""
    pods.remove_namespaces(SPACE)
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        *(
            pods.manifest(f"on-{i}", SPACE, {"app": "web"}, n)
            for i, n in enumerate(cluster.nodes())
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": SPACE},
            "spec": {
                "ipFamilyPolicy": "RequireDualStack",
                "selector": {"app": "web"},
                "ports": [
                    {"name": "http", "port": 8000, "targetPort": 80},
                    {"name": "echo", "port": 53, "protocol": "UDP"},
                ],
            },
        },
        # Allows everything; a label that no selector asks for is part of no identity.
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "web", "namespace": SPACE},
            "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]},
        },
    )
    return pods.wait_ready(SPACE)


def test_every_node_is_ready_and_nothing_of_kube_proxy_is_there(tidegate: None) -> None:
    nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    ready = {
        n["metadata"]["name"]: c["status"]
        for n in nodes
        for c in n["status"]["conditions"]
        if c["type"] == "Ready"
    }
    assert ready == dict.fromkeys(cluster.nodes(), "True")
    assert "kube-proxy" not in cluster.kubectl("get", "pods", "-A")
    for node in cluster.nodes():
        assert "KUBE-" not in cluster.inside(node, "iptables-save", "-t", "nat").replace(
            "KUBE-KUBELET-CANARY", ""
        )


def test_names_resolve_from_every_node(
    askers: asking.Askers, one_a_node: dict[str, pods.Pod]
) -> None:
    for pod in one_a_node.values():
        answers = askers.of(pod).ask(
            [
                asking.Question(KUBERNETES, op="resolve", seconds=5),
                asking.Question(f"web.{SPACE}", op="resolve", seconds=5),
                asking.Question("web", op="resolve", seconds=5),
            ]
        )
        own = tuple(sorted(_addresses()))
        assert [a.addresses for a in answers] == [("10.96.0.1",), own, own], (pod, answers)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("port", "protocol"), [(8000, "TCP"), (53, "UDP")])
def test_a_service_reaches_all_its_pods_from_every_node(
    askers: asking.Askers, one_a_node: dict[str, pods.Pod], port: int, protocol: str, family: int
) -> None:
    (address,) = (a for a in _addresses() if (":" in a) == (family == 6))
    for pod in one_a_node.values():
        answers = askers.of(pod).ask([asking.Question(address, port, protocol, seconds=3)] * 60)
        assert {a.pod for a in answers} == set(one_a_node), [a.detail for a in answers if a.detail]


def test_the_api_server_is_reached_by_its_service_from_every_node(
    askers: asking.Askers, one_a_node: dict[str, pods.Pod]
) -> None:
    for pod in one_a_node.values():
        (answer,) = askers.of(pod).ask([asking.Question("10.96.0.1", 443, seconds=5)])
        assert "HTTP request to an HTTPS server" in answer.body, answer


def test_identities_and_node_states_are_there_to_read(one_a_node: dict[str, pods.Pod]) -> None:
    install.wait_realised()
    # Their status follows at its leisure: it is for people.
    pods.eventually(lambda: _identity()[3:] == ["app=web", "3", "True"], "the identity's status")
    name, number, space = _identity()[:3]
    assert (name, space) == (number, SPACE)
    states = cluster.kubectl("get", "nodestates").splitlines()
    assert re.match(r"NAME +DESIRED +REALISED +ENDPOINTS +DRIFT +READY +AGE", states[0])
    for node, line in zip(sorted(cluster.nodes()), states[1:], strict=True):
        name, desired, realised, *_ = line.split()
        assert (name, desired) == (node, realised)


def test_a_static_pod_starts_as_others_do(
    askers: asking.Askers, one_a_node: dict[str, pods.Pod]
) -> None:
    """The API knows it by another UID than its runtime does."""
    node = cluster.nodes()[-1]
    path, key = f"{STATIC}/static.json", f"{SPACE}/static-{node}"
    text = json.dumps(pods.manifest("static", SPACE, {"app": "static"}))
    cluster.inside(node, "mkdir", "-p", STATIC)
    cluster.inside(node, "cp", "/dev/stdin", path, stdin=text)
    try:
        pods.eventually(lambda: key in pods.running(SPACE), "it runs", 60)
        pods.wait_ready(SPACE)
        (web, *_) = one_a_node.values()
        (answer,) = askers.of(pods.running(SPACE)[key]).ask([asking.Question(web.address, 80)])
        assert answer.pod == web.key, answer
        cold.settle()
    finally:
        cluster.inside(node, "rm", "-f", path)
    pods.eventually(lambda: key not in pods.running(SPACE), "it is gone", 60)


def _addresses() -> list[str]:
    """The ClusterIPs of this test's Service."""
    service = json.loads(cluster.kubectl("get", "service", "-n", SPACE, "web", "-o", "json"))
    found: list[str] = service["spec"]["clusterIPs"]
    return found


def _identity() -> list[str]:
    """The columns of the identity of this test's pods, but its age."""
    head, *lines = cluster.kubectl("get", "identities").splitlines()
    assert re.match(r"NAME +ID +NAMESPACE +LABELS +ENDPOINTS +READY +AGE", head)
    # Numbers of pods that have gone rest for a while.
    found = [line.split()[:-1] for line in lines if {SPACE, "app=web"} <= {*line.split()}]
    return found[0] if found else []
