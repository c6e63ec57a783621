"""What kind is asked for, and what becomes of a workload's pods."""

from __future__ import annotations

from typing import Any

import pytest

from kind import cluster
from rig import api, pods


def test_the_cluster_has_no_kube_proxy_no_default_network_and_two_workers() -> None:
    asked = cluster.configuration()
    assert asked["networking"]["kubeProxyMode"] == "none"
    assert asked["networking"]["disableDefaultCNI"] is True
    assert asked["networking"]["ipFamily"] == "dual"
    assert [n["role"] for n in asked["nodes"]] == ["control-plane", "worker", "worker"]


@pytest.mark.parametrize(
    ("reason", "containers", "ports", "expected"),
    [
        ("what is asked for", [], ["TCP:80", "UDP:53"], ["serve", "TCP:80", "UDP:53"]),
        (
            "and what is declared, once",
            [{"ports": [{"containerPort": 80}, {"containerPort": 9, "protocol": "UDP"}]}],
            ["TCP:80"],
            ["serve", "TCP:80", "UDP:9"],
        ),
        (
            "of every container",
            [{"ports": [{"containerPort": 1}]}, {"ports": [{"containerPort": 2}]}],
            [],
            ["serve", "TCP:1", "TCP:2"],
        ),
        ("null is none", [{"ports": None}], ["TCP:1"], ["serve", "TCP:1"]),
        (
            "nothing answers on SCTP",
            [{"ports": [{"containerPort": 5, "protocol": "SCTP"}]}],
            ["TCP:1"],
            ["serve", "TCP:1"],
        ),
    ],
)
def test_arguments_of_the_test_image(
    reason: str, containers: list[Any], ports: list[str], expected: list[str]
) -> None:
    pod = {"spec": {"containers": containers, "initContainers": [{}]}}
    served = pods.serving(pod, ports)
    assert served["spec"]["containers"][0]["args"] == expected, reason
    assert "initContainers" not in served["spec"]
    assert pod["spec"]["containers"] == containers, "what was given is not changed"


SETTLED = {"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
ON_NODES = {
    "observedGeneration": 3,
    "desiredNumberScheduled": 2,
    "updatedNumberScheduled": 2,
    "numberAvailable": 2,
}


@pytest.mark.parametrize(
    ("reason", "kind", "status", "expected"),
    [
        ("all is new and available", "Deployment", SETTLED, True),
        (
            "its controller is late",
            "Deployment",
            {**SETTLED, "observedGeneration": 2},
            False,
        ),
        ("an old pod is left", "Deployment", {**SETTLED, "replicas": 3}, False),
        ("one is old", "Deployment", {**SETTLED, "updatedReplicas": 1}, False),
        ("one is not available", "Deployment", {**SETTLED, "availableReplicas": 1}, False),
        ("nobody has looked at it", "Deployment", {}, False),
        ("all is new and available", "DaemonSet", ON_NODES, True),
        (
            "its controller is late",
            "DaemonSet",
            {**ON_NODES, "observedGeneration": 2},
            False,
        ),
        ("one is old", "DaemonSet", {**ON_NODES, "updatedNumberScheduled": 1}, False),
        ("one is not available", "DaemonSet", {**ON_NODES, "numberAvailable": 1}, False),
        ("a field of 0 is left out", "DaemonSet", {**ON_NODES, "numberAvailable": None}, False),
    ],
)
def test_a_rollout_is_over_when_all_of_it_is_new_and_available(
    reason: str, kind: str, status: dict[str, Any], expected: bool
) -> None:
    item = {"kind": kind, "metadata": {"generation": 3}, "spec": {"replicas": 2}}
    given = {key: value for key, value in status.items() if value is not None}
    assert api.is_rolled_out({**item, "status": given}) is expected, reason
