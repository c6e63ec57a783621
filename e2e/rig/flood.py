"""Pods that send from their first moment on, and what of it arrived.

A sink counts datagrams by the sender's address. Each flooder is a pod of its own address, so what
the sink has of that address is what got through."""

from __future__ import annotations

import itertools
import json

from kind import cluster
from rig import asking, pods
from rig.asking import Question

SPACE = "flood"
SINK = f"{SPACE}/sink"
AT_ONCE = 4
_numbers = itertools.count()


def build() -> pods.Pod:
    """A namespace with a sink that anybody may send to, and whose flooders may send nothing."""
    pods.remove_namespaces(SPACE)
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "silence", "namespace": SPACE},
            "spec": {"podSelector": {"matchLabels": {"may": "not"}}, "policyTypes": ["Egress"]},
        },
        pods.manifest("sink", SPACE),
    )
    return pods.wait_ready(SPACE)[SINK]


def starts(sink: pods.Pod, count: int, may: str) -> list[str]:
    """Starts this many flooders, a few at once, on the workers; their addresses.

    Each has run for a moment before it is ended. `may`: "not" or "flood"."""
    addresses: list[str] = []
    for done in range(0, count, AT_ONCE):
        addresses += _batch(sink, min(AT_ONCE, count - done), may)
    return addresses


def received(sink: pods.Pod, asker: asking.Asker) -> dict[str, int]:
    """Datagrams that the sink has, by the sender's address."""
    (answer,) = asker.ask([Question(sink.address, 80, path="/received", seconds=5)])
    found: dict[str, int] = json.loads(answer.body)
    return found


def _batch(sink: pods.Pod, count: int, may: str) -> list[str]:
    workers = [n for n in cluster.nodes() if "worker" in n]
    names = [f"f{next(_numbers)}" for _ in range(count)]
    pods.apply(*(_flooder(n, workers[i % 2], may, sink.address) for i, n in enumerate(names)))
    try:
        keys = [f"{SPACE}/{name}" for name in names]
        found: dict[str, pods.Pod] = {}

        def run() -> bool:
            found.update(pods.running(SPACE, f"may={may}"))
            return found.keys() >= set(keys)

        pods.eventually(run, "they run", 60)
        return [found[key].address for key in keys]
    finally:
        pods.remove(SPACE, *names)


def _flooder(name: str, node: str, may: str, sink: str) -> pods.Manifest:
    return pods.flooding(pods.manifest(name, SPACE, {"may": may}, node), sink)
