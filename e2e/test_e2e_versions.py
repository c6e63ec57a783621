"""Loader and operator of another version, up and down, in both orders, under traffic.

The other version has another layout of tracked flows, and its operator writes all objects in a
format that this version's loader does not read: where it meets them, what is in force stays, and
it says so."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support import other_version
from support.ca_soak import SOAK

from kind import cluster
from kind.run import run
from rig import install, pods

pytestmark = pytest.mark.kind
OTHER = "tidegate:other"
PARTS = (
    *other_version.LOADER_PARTS,
    *("operator", "cli", "observer", "manifests", "image"),
    *("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"),
)
LOADER, OPERATOR = "daemonset/tidegate-loader", "deployment/tidegate-operator"
OURS, THEIRS = install.IMAGE, OTHER
ORDERS = {
    # Through every mixture, in four steps.
    "loaders first, both ways": (
        *((LOADER, THEIRS), (OPERATOR, THEIRS)),
        *((LOADER, OURS), (OPERATOR, OURS)),
    ),
}
if SOAK:
    ORDERS["operator first, both ways"] = (
        *((OPERATOR, THEIRS), (LOADER, THEIRS)),
        *((OPERATOR, OURS), (LOADER, OURS)),
    )


@pytest.fixture(scope="module")
def other(tidegate: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The other version's image is on every node."""
    root = tmp_path_factory.mktemp("other")
    parts = [part for part in PARTS if (other_version.ROOT / part).exists()]
    other_version.other_layout(root, parts)
    other_version.other_format(root)
    step = Path("node-loader/cni/build")
    shutil.copytree(other_version.ROOT / step, root / step)
    run(sys.executable, root / "image/build.py", "--tag", OTHER)
    cluster.load(OTHER)


@pytest.mark.parametrize("order", ORDERS)
def test_up_and_down(traffic: None, other: None, order: str) -> None:
    running = {LOADER: OURS, OPERATOR: OURS}
    for part, image in ORDERS[order]:
        running[part] = image
        _run(part, image)
        install.wait_ready()
        layout = other_version.RENAMED[0][running[LOADER] == THEIRS]
        for node in cluster.nodes():
            pods.eventually(
                lambda node=node, layout=layout: layout in _maps(node), f"{node} moved", 30
            )
        if running == {LOADER: OURS, OPERATOR: THEIRS}:
            pods.eventually(_all_say_why, "every node says why it stays as it was", 60)
            pods.eventually(_events, "events say it, too", 60)
        else:
            install.wait_realised(60)


def _run(part: str, image: str) -> None:
    cluster.kubectl("set", "image", "-n", install.NAMESPACE, part, f"*={image}")


def _maps(node: str) -> list[str]:
    return cluster.inside(node, "ls", "/sys/fs/bpf/tidegate/maps").split()


def _all_say_why() -> bool:
    states = install.node_states().values()
    return all(
        any(
            c["type"] == "Stalled" and c["reason"] == "UnknownFormat"
            for c in state.get("status", {}).get("conditions", ())
        )
        for state in states
    )


def _events() -> bool:
    found = cluster.kubectl("get", "events", "-o", "name", "--field-selector=reason=FormatNotRead")
    return len(found.split()) >= len(cluster.nodes())
