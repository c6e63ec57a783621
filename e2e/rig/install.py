"""Tidegate in the cluster: its image on the nodes, its manifests applied, all of it ready."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kind import cluster, settings
from kind.run import Failed, run
from rig import api, pods

IMAGE = "tidegate:dev"
NAMESPACE = "tidegate-system"
ROOT = Path(__file__).parents[2]
CHART = ROOT / "manifests" / "chart" / "tidegate"
READY_SECONDS = 300
OPERATOR = ("deployments", "tidegate-operator", NAMESPACE)
LOADER = ("daemonsets", "tidegate-loader", NAMESPACE)


def install() -> None:
    """Builds its image and the tests', applies manifests/overlays/kind and waits until all of it is
    ready.

    Where it was installed before, its processes are started anew: the image may be another."""
    before = api.find(*LOADER)
    # Here and not before the tests: it needs the Docker daemon that they started.
    run("make", "-C", ROOT, "image")
    cluster.load(IMAGE, pods.build_image())
    apply()
    wait_ready()
    if before:
        restart()


def apply() -> None:
    """As `kubectl apply --server-side -k`."""
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "-k", ROOT / "manifests/overlays/kind"
    )


@contextlib.contextmanager
def with_values(*values: str) -> Iterator[None]:
    """While in it Tidegate has these values of the chart, "name=value"; then again its defaults."""
    given = ("image.pullPolicy=Never", "crds.install=false", *values)
    options = [word for value in given for word in ("--set", value)]
    options += ["--namespace", NAMESPACE, "--kube-version", settings.KUBERNETES]
    made = run(settings.binaries() / "helm", "template", "tidegate", CHART, *options)
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=made)
    try:
        wait_ready()
        yield
    finally:
        apply()
        wait_ready()


@contextlib.contextmanager
def operator_away() -> Iterator[None]:
    """While in it there is no operator; afterwards there is one, and it is ready."""
    scale = ("scale", "-n", NAMESPACE, "deployment/tidegate-operator")
    cluster.kubectl(*scale, "--replicas=0")
    pods.eventually(lambda: not operators(), "the operator is gone", 60)
    try:
        yield
    finally:
        cluster.kubectl(*scale, "--replicas=1")
    wait_ready()


def wait_ready() -> None:
    """Waits for operator, loaders, and CoreDNS, which needs both."""
    for part in (OPERATOR, LOADER, ("deployments", "coredns", "kube-system")):
        api.wait(lambda part=part: _is_rolled_out(part), f"{part[1]} is ready", READY_SECONDS)


def _is_rolled_out(part: tuple[str, str, str]) -> bool:
    item = api.find(*part)
    if item is None:
        raise Failed(f"there is no {part[1]}")
    return api.is_rolled_out(item)


def restart() -> None:
    """Starts every loader and the operator anew, all at once, and waits until they are ready.

    A rollout as the manifests have it goes from node to node, and takes that many times longer."""
    before = api.find(*LOADER)
    assert before is not None
    now = {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": str(time.time())}}}
    at_once = {"rollingUpdate": {"maxUnavailable": "100%"}}
    api.patch(*OPERATOR, {"spec": {"template": now}})
    api.patch(*LOADER, {"spec": {"template": now, "updateStrategy": at_once}})
    wait_ready()
    api.patch(*LOADER, {"spec": {"updateStrategy": before["spec"]["updateStrategy"]}})


def node_states() -> dict[str, dict[str, Any]]:
    """Node → its NodeState."""
    return {item["metadata"]["name"]: item for item in api.items("nodestates")}


def is_realised(state: dict[str, Any]) -> bool:
    """Whether the node says that exactly this spec is in force."""
    wanted = state["metadata"].get("annotations", {}).get("tidegate.dev/digest")
    return bool(wanted) and state.get("status", {}).get("realised") == wanted


def wait_realised(seconds: float = 30.0) -> None:
    """Waits until every node enforces its own spec."""
    pods.eventually(
        lambda: (states := node_states()) and all(map(is_realised, states.values())),
        "every node state realised",
        seconds,
    )


def loaders() -> dict[str, pods.Pod]:
    """Node → its loader's pod."""
    found = pods.running(NAMESPACE, "app.kubernetes.io/name=tidegate-loader", "loader")
    return {pod.node: pod for pod in found.values()}


def operators() -> dict[str, pods.Pod]:
    """key → the operators' pods."""
    return pods.running(NAMESPACE, "app.kubernetes.io/name=tidegate-operator")
