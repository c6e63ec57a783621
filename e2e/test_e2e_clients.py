"""Programs that people run, through Services of the cluster that change meanwhile.

A Deployment's rolling update under clients that keep their connections, iperf3 while endpoints
come and go, and CoreDNS over TCP.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
from support.ca_soak import scaled
from support.waiting import until
from tidegate_kube import Client, Unreachable, resources
from tidegate_kube.kubeconfig import from_kubeconfig

from kind import cluster
from rig import api, asking, cold, pods
from rig.asking import Question
from rig.pods import Manifest, Pod

pytestmark = pytest.mark.kind

SPACE = "clients"
IPERF = 5201
BULK = {"bulk-socket": "client", "bulk-packets": "plain"}
"""Pods with iperf3, each with its Service, and who uses it."""
CHANGES = scaled(100, 1000)
"""Of EndpointSlices, while iperf3 runs; it runs again until there were so many."""
SECONDS = scaled(6, 60)
RATE = "200M"
"""Of each iperf3, bits a second: the API server has to get its share of the machine."""
WAIT_SECONDS = 90.0


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
    template["spec"]["containers"][0]["env"].append({"name": "DRAIN", "value": "5s"})
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


def bulk(name: str, node: str) -> Manifest:
    """Nobody but its client may connect: it takes one at a time."""
    pod = pods.manifest(name, SPACE, {"app": name}, node)
    container = pod["spec"]["containers"][0]
    container |= {"command": ["/iperf3", "-s", "-4"], "args": []}
    del container["readinessProbe"]
    return scratching(pod)


def scratching(pod: Manifest) -> Manifest:
    """iperf3 wants a place for files, and the image has none."""
    pod["spec"]["containers"][0]["env"].append({"name": "TMPDIR", "value": "/dev/shm"})
    return pod


@pytest.fixture(scope="module")
def place(tidegate: None) -> Iterator[Place]:
    pods.remove_namespaces(SPACE)
    near, far = [n for n in cluster.nodes() if "worker" in n][:2]
    namer = pods.manifest("namer", SPACE, node=near)
    namer["spec"]["dnsConfig"] = {"options": [{"name": "use-vc"}]}
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        deployment(),
        service("web", 80),
        *(made for name in BULK for made in (service(name, IPERF), bulk(name, far))),
        namer,
        scratching(pods.manifest("client", SPACE, node=near)),
        pods.manifest("plain", SPACE, node=near),
    )
    cluster.kubectl("rollout", "status", "-n", SPACE, "deployment/web", "--timeout=90s")
    found = pods.wait_ready(SPACE)
    items = api.items("services", SPACE)
    yield Place(
        {pod.name: pod for pod in found.values()},
        {item["metadata"]["name"]: item["spec"]["clusterIP"] for item in items},
    )
    pods.remove_namespaces(SPACE, wait=False)


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


def others(name: str, number: int) -> bytes:
    """Endpoints beside iperf3's own: at none of these addresses is anybody."""
    ends = number % 2 == 1
    conditions = {"ready": not ends, "serving": True, "terminating": ends}
    addresses = [f"10.244.250.{1 + n}" for n in range(1 + number % 8)]
    return msgspec.json.encode(
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{name}-others",
                "namespace": SPACE,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [{"port": IPERF, "protocol": "TCP"}],
            "endpoints": [{"addresses": [a], "conditions": conditions} for a in addresses],
        }
    )


def change(client: Client, name: str, number: int) -> None:
    def done() -> bool:
        try:
            client.patch(
                resources.ENDPOINT_SLICES, f"{name}-others", others(name, number),
                SPACE, kind="apply", field_manager="test", force=True,
            )  # fmt: skip
        except Unreachable:  # the API server has the same few CPUs as iperf3
            return False
        return True

    until(done, f"{name}'s endpoints are changed", WAIT_SECONDS)


@contextlib.contextmanager
def iperf3(place: Place) -> Iterator[list[subprocess.Popen[str]]]:
    """As a program of one pod, and packet by packet out of another; both are connected."""
    clients = []
    for name in BULK:
        pod = place.pods[BULK[name]]
        command = ["nsenter", "-t", str(asking.pid(pod)), "-n", "iperf3"]
        if pod.name == "client":
            command = ["docker", "exec", pod.node, "ctr", "-n", "k8s.io", "tasks", "exec"]
            command += ["--exec-id", f"iperf-{time.monotonic_ns()}", pod.container, "/iperf3"]
        command += ["-c", place.services[name], "-p", "80", "-t", str(SECONDS), "-b", RATE, "-J"]
        clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        for name in BULK:
            server = place.pods[name]
            # One connection to speak of it, and the one that is measured.
            until(lambda s=server: len(asking.connections(s)) == 2, f"{name} is used", WAIT_SECONDS)
            assert [client.poll() for client in clients] == [None] * len(BULK)
        yield clients
    finally:
        for client in clients:
            with client:
                client.kill()


def test_changes_of_endpoints_reset_nothing(place: Place) -> None:
    config = from_kubeconfig(cluster.kubeconfig())
    with contextlib.closing(Client(config, "tidegate-test")) as client:
        count = 0
        while count < CHANGES:
            with iperf3(place) as running:
                while all(each.poll() is None for each in running):
                    for name in BULK:
                        change(client, name, count)
                        count += 1
                said = [json.loads(each.communicate()[0]) for each in running]
            assert [one.get("error") for one in said] == [None] * len(BULK)
            assert all(one["end"]["sum_received"]["bytes"] for one in said)
            for name in BULK:
                client.delete(resources.ENDPOINT_SLICES, f"{name}-others", SPACE)
            cold.settle()  # the two connections of an iperf3 have to meet
