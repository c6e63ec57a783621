"""What kind is asked for, and what becomes of a workload's pods."""

from __future__ import annotations

from typing import Any

import pytest

from kind import cluster
from rig import pods


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
