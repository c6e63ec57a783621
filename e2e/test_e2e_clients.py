"""Programs that people run, through Services of the cluster that change meanwhile.

A Deployment's rolling update under clients that keep their connections, and CoreDNS over TCP.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kind import cluster
from rig import asking, pods
from rig.asking import Question
from rig.pods import Manifest, Pod

pytestmark = pytest.mark.kind

SPACE = "clients"


@dataclass(frozen=True)
class Place:
    pods: dict[str, Pod]
    """By name."""
    services: dict[str, str]
    """ClusterIPs."""


def deployment() -> Manifest:
    """Two pods that end as servers should: what comes is answered until no client is left."""
    labels = {"app": "web"}
    template = pods.serving({"metadata": {"labels": labels}, "spec": {}}, ["TCP:80"])
    template["spec"]["terminationGracePeriodSeconds"] = 30
    template["spec"]["containers"][0]["env"].append({"name": "DRAIN", "value": "2s"})
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": SPACE},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 0}},
            "template": template,
        },
    }


def service(name: str, target: int) -> Manifest:
    port = {"port": 80, "targetPort": target}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": SPACE},
        "spec": {"selector": {"app": name}, "ports": [port]},
    }


@pytest.fixture(scope="module")
def place(tidegate: None) -> Iterator[Place]:
    pods.remove_namespaces(SPACE)
    near = next(n for n in cluster.nodes() if "worker" in n)
    namer = pods.manifest("namer", SPACE, node=near)
    namer["spec"]["dnsConfig"] = {"options": [{"name": "use-vc"}]}
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        deployment(),
        service("web", 80),
        namer,
        pods.manifest("client", SPACE, node=near),
        pods.manifest("plain", SPACE, node=near),
    )
    cluster.kubectl("rollout", "status", "-n", SPACE, "deployment/web", "--timeout=90s")
    found = pods.wait_ready(SPACE)
    text = cluster.kubectl("get", "services", "-n", SPACE, "-o", "json")
    items = json.loads(text)["items"]
    yield Place(
        {pod.name: pod for pod in found.values()},
        {item["metadata"]["name"]: item["spec"]["clusterIP"] for item in items},
    )
    pods.remove_namespaces(SPACE)


def test_names_over_tcp(askers: asking.Askers, place: Place) -> None:
    """Its resolver is told to use TCP only."""
    questions = [
        Question(f"web.{SPACE}.svc.cluster.local", op="resolve", seconds=5) for _ in range(10)
    ]
    for answer in askers.of(place.pods["namer"]).ask(questions):
        assert place.services["web"] in answer.addresses, answer


def test_a_rolling_update_fails_no_request(place: Place) -> None:
    """From a pod's sockets, packet by packet, and from a node."""
    client, plain = place.pods["client"], place.pods["plain"]
    old = set(pods.running(SPACE, "app=web"))
    with contextlib.ExitStack() as stack:
        streams = []
        for asker in (
            asking.in_pod(client),
            asking.in_network_only(plain),
            asking.on_node(client.node),
        ):
            stack.callback(asker.close)
            question = Question(place.services["web"], 80, seconds=0.02, reopen=True)
            streams += [(asker, asker.begin_stream(question)) for _ in range(4)]
        cluster.kubectl("rollout", "restart", "-n", SPACE, "deployment/web")
        cluster.kubectl("rollout", "status", "-n", SPACE, "deployment/web", "--timeout=90s")
        names = [key.split("/")[1] for key in sorted(old)]
        cluster.kubectl("wait", "-n", SPACE, "--for=delete", "pod", *names, "--timeout=90s")
        ended = [asker.end_stream(stream) for asker, stream in streams]
    assert [answer.detail for answer in ended] == [""] * len(ended)
    assert not old & {answer.pod for answer in ended}
    assert {answer.pod for answer in ended} <= set(pods.running(SPACE, "app=web"))
