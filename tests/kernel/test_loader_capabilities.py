"""The loader with the three capabilities that its DaemonSet gives it, and with fewer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import loader_node
from support import loader_world as world
from support.cni_step import call, config, pod
from support.loader_node import TIMEOUT, Node, poll
from tidegate_api import state as api
from tidegate_bpf import Link, Map, mounts
from tidegate_loader import addresses

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

ALL = ("bpf", "net_admin", "perfmon")


def _with(node: Node, *capabilities: str) -> None:
    """The node's loaders run as root with these and no other capabilities."""
    bounding = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    node.entered = (
        *("nsenter", f"--net=/run/netns/{node.namespace}"),
        *("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all"),
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        found.objects = world.ROOT / "datapath" / "build"
        _with(found, *ALL)
        yield found


@pytest.fixture
def cgroup(node: Node) -> Iterator[Path]:
    root = mounts.cgroup2()
    if root is None:
        pytest.skip("cgroup2 is not mounted")
    found = Path(root) / node.namespace
    found.mkdir()
    yield found
    found.rmdir()


def test_three_are_enough_for_a_whole_life(node: Node, cgroup: Path) -> None:
    wanted = world.example()
    more = ("--cni-socket", str(node.run_dir / "cni.sock"), "--cgroup", str(cgroup))
    node.write(wanted)
    node.start(*more)
    node.wait_for(wanted, 0)
    with pod(node, 1) as found:
        assert call("ADD", config(node, prevResult=found.result), found).code == 0
        node.wait_for(wanted, 1)
        with Link.open_pinned(str(node.pin_dir / "links" / "cgroup-connect4")) as link:
            assert link.info.target == cgroup.stat().st_ino
        # Policy changes: inner maps are made, linked, and the old ones let go.
        added = world.rule_set(
            world.term(api.CIDRPeer(cidr="192.0.2.0/24", excepts=["192.0.2.8/29"]), 0, "TCP", 5)
        )
        wanted.rule_sets = [added]
        wanted.endpoints = [world.endpoint(1, 300, added.metadata.name)]
        node.write(wanted)
        node.wait_for(wanted, 1)
        # Drift is seen and repaired.
        key = addresses.pack("10.0.0.2")
        with Map.open_pinned(str(node.pin_dir / "maps" / "ipcache_v1")) as ipcache:
            ipcache.delete(key)
        assert node.process is not None
        node.process.send_signal(signal.SIGUSR1)
        poll("the repair", lambda: node.realised().counters.drift == 1)
        # A restart adopts what is pinned; a new object is put in its place.
        before = node.link(found.ifindex)
        assert node.stop() == 0
        node.start(*more)
        wanted.endpoints.append(world.endpoint(2, 301))
        node.write(wanted)
        node.wait_for(wanted, 1)
        assert node.link(found.ifindex) == before
        assert node.stop() == 0
        node.paths.realised.unlink()
        node.start(*more)
        node.wait_for(wanted, 1)
        after = node.link(found.ifindex)
        assert (after[0], after[2]) == (before[0], before[2])
        assert after[1] != before[1]
        wanted.mode = "Detached"
        node.write(wanted)
        poll("nothing to be left", lambda: not any(node.pin_dir.iterdir()))


@pytest.mark.parametrize("missing", ALL)
def test_none_of_them_is_too_many(node: Node, missing: str) -> None:
    """Without it the loader ends, and says which one it lacks."""
    _with(node, *(name for name in ALL if name != missing))
    node.write(world.example())
    node.start("--once")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 1
    node.process = None
    text = node.log.read_text()
    assert f"CAP_{missing.upper()}" in text, text
    assert "Traceback" not in text
