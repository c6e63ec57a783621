"""e2e-policy, e2e-endpoints, first-packet, loader-kind: Tidegate on a real cluster of kind.

The cluster is taken if it is up, else made; what was made is removed at the end. Every new flow of
a probe is a datagram from a socket of its own, one every two milliseconds on every node; the probes
run on the clock that the writes are timed by, as nodes of kind are containers of this machine.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "e2e"))

from measure import Result, Unmeasurable, percentile, resident  # noqa: E402
from tidegate_kube import Client, resources  # noqa: E402
from tidegate_kube.kubeconfig import from_kubeconfig  # noqa: E402

from kind import cluster  # noqa: E402
from kind.run import Failed  # noqa: E402
from rig import asking, flood, install, pods  # noqa: E402
from rig.asking import Question  # noqa: E402

SPACE = "bench"
POLICY_SAMPLES = 200
ENDPOINT_SAMPLES = 100
STARTS = 100
PULSE_SECONDS = 0.002
WAIT_SECONDS = 10.0
# No answer for so long: what was asked in between is refused. Longer than a busy machine's pause.
QUIET_SECONDS = 0.4
IDLE_SECONDS = 30.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
SERVICE = "turn"


@functools.cache
def ready() -> Client:
    """The cluster with Tidegate in it; an admin's client to it. Unmeasurable where it fails."""
    try:
        was_up = cluster.daemon.answers() and cluster.is_up()
        if not was_up:
            atexit.register(cluster.down)
        cluster.up()
        pods.build_image()
        cluster.load(pods.IMAGE)
        install.install()
    except Failed as why:
        raise Unmeasurable(str(why)) from why
    return Client(from_kubeconfig(cluster.kubeconfig()), "tidegate-bench")


@contextlib.contextmanager
def space(*manifests: pods.Manifest) -> Iterator[dict[str, pods.Pod]]:
    """A namespace with these objects; its ready pods by name."""
    pods.remove_namespaces(SPACE)
    pods.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}}, *manifests)
    try:
        yield {pod.name: pod for pod in pods.wait_ready(SPACE).values()}
    finally:
        pods.remove_namespaces(SPACE)


# ---- probes -----------------------------------------------------------------------------


class Pulses:
    """One probe a node; what each heard."""

    def __init__(self, questions: dict[pods.Pod, Question]) -> None:
        self._askers = {pod: asking.in_pod(pod) for pod in questions}
        self._numbers = {p: self._askers[p].begin_pulse(q) for p, q in questions.items()}

    def look(self) -> list[dict[str, list[int]]]:
        """Of each probe: pod → sent first since the last look, and latest, that it answered."""
        return [self._askers[pod].peek(n).heard for pod, n in self._numbers.items()]

    def close(self) -> None:
        for asker in self._askers.values():
            asker.close()


def until_heard(pulses: Pulses, pod: Callable[[int], str], since: int) -> int:
    """When the last probe sent its first question after `since` that its own pod answered."""
    first: dict[int, int] = {}
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        for index, heard in enumerate(pulses.look()):
            began = heard.get(pod(index), [0, 0])[0]
            if began > since and index not in first:
                first[index] = began
        if len(first) == len(cluster.nodes()):
            return max(first.values())
        time.sleep(0.01)
    raise Unmeasurable(f"{len(first)} of {len(cluster.nodes())} probes were answered")


def until_silent(pulses: Pulses, pod: Callable[[int], str], since: int) -> int:
    """When the last question that its pod still answered was sent, over all probes."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        latest = max(heard.get(pod(i), [0, 0])[1] for i, heard in enumerate(pulses.look()))
        if time.time_ns() - latest > QUIET_SECONDS * 1e9:
            return max(latest, since)
        time.sleep(0.02)
    raise Unmeasurable("probes are answered that policy refuses")


# ---- rows -------------------------------------------------------------------------------


def policy() -> Iterator[Result]:
    client = ready()
    nodes = cluster.nodes()
    servers = [pods.manifest(f"server-{i}", SPACE, {"app": "s"}, n) for i, n in enumerate(nodes)]
    clients = [pods.manifest(f"client-{i}", SPACE, {}, n) for i, n in enumerate(nodes)]
    with space(*servers, *clients, _policy(allow=True)) as found:
        target = {
            found[f"client-{i}"]: Question(found[f"server-{i}"].address, 53, seconds=PULSE_SECONDS)
            for i in range(len(nodes))
        }
        pulses = Pulses(target)
        try:
            until_heard(pulses, _server, 0)
            taken = [_toggle(client, pulses, allow=bool(n % 2)) for n in range(POLICY_SAMPLES)]
        finally:
            pulses.close()
    extra = {
        "samples": len(taken),
        "nodes": len(nodes),
        "max_ms": round(max(taken), 1),
        "refusing_p50_ms": round(statistics.median(taken[0::2]), 1),
        "allowing_p50_ms": round(statistics.median(taken[1::2]), 1),
    }
    what = "policy written to the API → enforced for real packets on every node"
    yield Result("e2e-policy", f"{what}, p50", percentile(taken, 0.5), "ms", "p50", 250, extra)
    yield Result("e2e-policy-p99", f"{what}, p99", percentile(taken, 0.99), "ms", "p99", 1000)


def _server(index: int) -> str:
    return f"{SPACE}/server-{index}"


def _toggle(client: Client, pulses: Pulses, allow: bool) -> float:
    """Milliseconds from before the write until every node does what it says."""
    pulses.look()
    began = time.time_ns()
    _write(client, resources.NETWORK_POLICIES, _policy(allow))
    wait = until_heard if allow else until_silent
    return (wait(pulses, _server, began) - began) / 1e6


def _policy(allow: bool) -> pods.Manifest:
    rule: dict[str, Any] = {"ingress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "server", "namespace": SPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": "s"}},
            "policyTypes": ["Ingress"],
            **(rule if allow else {}),
        },
    }


def endpoints() -> Iterator[Result]:
    client = ready()
    nodes = cluster.nodes()
    backends = [pods.manifest(f"backend-{i}", SPACE, {}, nodes[i]) for i in (0, 1)]
    clients = [pods.manifest(f"client-{i}", SPACE, {}, n) for i, n in enumerate(nodes)]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "namespace": SPACE},
        "spec": {"ports": [{"name": "echo", "port": 53, "protocol": "UDP"}]},
    }
    with space(*backends, *clients, service) as found:
        both = [found["backend-0"], found["backend-1"]]
        pods.apply(_slice(both[0].address))
        address = cluster.kubectl(
            "get", "service", "-n", SPACE, SERVICE, "-o", "jsonpath={.spec.clusterIP}"
        )
        question = Question(address, 53, seconds=PULSE_SECONDS)
        pulses = Pulses({found[f"client-{i}"]: question for i in range(len(nodes))})
        try:
            until_heard(pulses, lambda _: both[0].key, 0)
            taken = [_turn(client, pulses, both[(n + 1) % 2]) for n in range(ENDPOINT_SAMPLES)]
        finally:
            pulses.close()
    yield Result(
        "e2e-endpoints",
        "EndpointSlice written to the API → new flows on every node go to the other pod, p99",
        percentile(taken, 0.99),
        "ms",
        "p99",
        500,
        {"samples": len(taken), "p50_ms": round(statistics.median(taken), 1)},
    )


def _turn(client: Client, pulses: Pulses, to: pods.Pod) -> float:
    """Milliseconds until every node's new flows go to this pod."""
    pulses.look()
    began = time.time_ns()
    _write(client, resources.ENDPOINT_SLICES, _slice(to.address))
    return (until_heard(pulses, lambda _: to.key, began) - began) / 1e6


def _slice(address: str) -> pods.Manifest:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": SERVICE,
            "namespace": SPACE,
            "labels": {"kubernetes.io/service-name": SERVICE},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": "echo", "port": 53, "protocol": "UDP"}],
    }


def _write(client: Client, kind: Any, wanted: pods.Manifest) -> None:
    """Replaces the object, whatever its version."""
    name = wanted["metadata"]["name"]
    client.update(kind, name, json.dumps(wanted).encode(), namespace=SPACE)


def first_packet() -> Iterator[Result]:
    ready()
    sink = flood.build()
    try:
        silent = flood.starts(sink, STARTS, "not")
        loud = flood.starts(sink, 2, "flood")
        asker = asking.in_pod(sink)
        try:
            heard = flood.received(sink, asker)
        finally:
            asker.close()
    finally:
        pods.remove_namespaces(flood.SPACE)
    if not all(heard.get(address) for address in loud):
        raise Unmeasurable(f"the sink did not hear those who may send: {heard}")
    yield Result(
        "first-packet",
        "datagrams of pods that may send nothing and flood from their first moment",
        sum(heard.get(address, 0) for address in silent),
        "packets",
        f"{STARTS} starts",
        0,
        {"starts": len(silent), "allowed_heard": [heard[a] for a in loud]},
    )


def loader() -> Iterator[Result]:
    ready()
    install.wait_realised()
    pids = [asking.pid(pod) for pod in install.loaders().values()]
    before = [_cpu(pid) for pid in pids]
    time.sleep(IDLE_SECONDS)
    busy = [(_cpu(pid) - b) / IDLE_SECONDS * 100 for pid, b in zip(pids, before, strict=True)]
    sizes = [resident(pid) for pid in pids]
    what = "the loader in a node of kind, idle"
    extra = {"nodes": [round(s, 1) for s in sizes]}
    yield Result("loader-kind", f"{what}, resident", max(sizes), "MiB", "largest", 60, extra)
    extra = {"nodes": [round(b, 2) for b in busy], "seconds": IDLE_SECONDS}
    yield Result("loader-kind-cpu", f"{what}, of a core", max(busy), "%", "busiest", 1, extra)


def _cpu(pid: int) -> float:
    """Seconds of CPU that the process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


ROWS = {
    "loader-kind": loader,
    "e2e-policy": policy,
    "e2e-endpoints": endpoints,
    "first-packet": first_packet,
}
