"""Everybody asks everybody, on one node and across nodes, and the oracle knows who may."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import clusters

from kind import cluster
from rig import api, apps, asking, matrix, pods

pytestmark = pytest.mark.kind
SHOP = Path(__file__).parents[1] / "examples/shop"
# A folder of one's own: `TIDEGATE_E2E_APP=path make e2e`.
OWN = os.environ.get("TIDEGATE_E2E_APP")
GENERATED = ("default", "a", "b", "c")
SEEDS = (1, 4)


def agree(
    askers: asking.Askers, sources: Sequence[pods.Pod], columns: Sequence[matrix.Target]
) -> list[matrix.Cell]:
    """The cells, all as the oracle says, and of both kinds."""
    cells = matrix.settle(askers, sources, columns, matrix.judge())
    text = matrix.table(cells)
    print(text)
    assert not [cell for cell in cells if cell.differs], "\n" + text
    return cells


def declared(spaces: Sequence[str]) -> list[matrix.Target]:
    """A column for each port that a pod declares."""
    found = []
    for item in api.items("pods"):
        pod = pods.parse(item)
        if pod is None or pod.namespace not in spaces:
            continue
        for container in item["spec"]["containers"]:
            for port in container.get("ports", ()):
                text = f"{port.get('protocol', 'TCP')}:{port['containerPort']}"
                found += matrix.targets([pod], [text])
    return found


@pytest.mark.parametrize("folder", [SHOP, *([Path(OWN)] if OWN else [])], ids=lambda p: p.name)
def test_an_application_with_its_policies(askers: asking.Askers, folder: Path) -> None:
    spaces = apps.run(folder, "e2e-app")
    cells = agree(askers, matrix.pods_of(*spaces), declared(spaces))
    assert {cell.allowed for cell in cells} == {True, False}
    pods.remove_namespaces(*spaces, wait=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_generated_cluster(askers: asking.Askers, seed: int) -> None:
    made = clusters.random_cluster(seed)
    pods.remove_namespaces(*GENERATED[1:])
    cluster.kubectl("delete", "pods,networkpolicies", "-n", "default", "--all", "--timeout=60s")
    nodes = cluster.nodes()
    wanted = [pod for pod in made["pods"] if not pod["spec"].get("hostNetwork")]
    for index, pod in enumerate(wanted):
        pod["spec"]["nodeName"] = nodes[index % len(nodes)]
        pod["metadata"].setdefault("namespace", "default")
    spaces = {n["metadata"]["name"]: n for n in made["namespaces"]}
    pods.apply(
        *(spaces.get(n, _namespace(n)) for n in GENERATED),
        *(pods.serving(pod, pods.PORTS) for pod in wanted),
        *made["policies"],
    )
    pods.wait_ready(*sorted({pod["metadata"]["namespace"] for pod in wanted}))
    sources = matrix.pods_of(*GENERATED)
    agree(askers, sources, matrix.targets(sources, pods.PORTS))


def _namespace(name: str) -> pods.Manifest:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
