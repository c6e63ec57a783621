"""A cluster whose every node restarts comes back by itself, and never falls open."""

from __future__ import annotations

import pytest

from kind import cluster
from kind.run import run
from rig import asking, install, pods, town

pytestmark = pytest.mark.kind
SECONDS = 180


def test_all_nodes_restart_at_once(askers: asking.Askers, place: town.Town) -> None:
    place.served(askers)
    # Their askers end with the containers.
    askers.close()
    run("docker", "restart", *cluster.nodes())
    pods.eventually(cluster.is_up, "the API server is back", SECONDS)
    cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", f"--timeout={SECONDS}s")
    install.wait_ready()
    pods.eventually(lambda: _all_again(place), "the pods run again", SECONDS)
    again = town.Town({p.name: p for p in pods.wait_ready(town.SPACE).values()}, place.service)
    own = asking.Askers()
    try:
        # Its pod has another address: the Service follows a moment after the pod is ready.
        pods.eventually(lambda: again.is_served(own), "friends are served", 30)
        again.refused(own)
    finally:
        own.close()
    install.wait_realised()
    assert _tainted() == []


def _all_again(place: town.Town) -> bool:
    now = {pod.name: pod for pod in pods.running(town.SPACE).values()}
    return now.keys() == place.pods.keys() and all(
        now[name].container != pod.container for name, pod in place.pods.items()
    )


def _tainted() -> list[str]:
    """Nodes that still keep pods away."""
    query = "jsonpath={range .items[*]}{.metadata.name} {.spec.taints[*].key}{'\\n'}{end}"
    lines = cluster.kubectl("get", "nodes", "-o", query).splitlines()
    return [line for line in lines if "tidegate.dev/" in line]
