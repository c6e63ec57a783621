"""Upgrade and downgrade between two layouts of the maps that programs fill, under traffic.

The other version is made of this one's source: tests/support/other_version.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import loader_node, other_version
from support import loader_world as world
from support.cni_step import Pod, call, config, pod
from support.loader_node import Node, ip, poll
from tidegate_api import state as api
from tidegate_bpf import Map

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


class Version:
    """A loader's code and its objects."""

    def __init__(self, directory: Path, roots: Path) -> None:
        self.objects = directory
        self.roots = roots


@pytest.fixture(scope="module")
def one() -> Version:
    return Version(other_version.ROOT / "datapath" / "build", other_version.ROOT)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The same with another layout."""
    root = tmp_path_factory.mktemp("two")
    other_version.other_layout(root)
    return Version(root / "datapath" / "build", root)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        yield found


def _start(node: Node, version: Version) -> None:
    node.objects, node.roots = version.objects, version.roots
    node.start("--cni-socket", str(node.run_dir / "cni.sock"))


SERVE = """
import socket, sys, time
listener = socket.create_server(("0.0.0.0", 7001))
print("ready", flush=True)
made, _ = listener.accept()
made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for number in range(1 << 30):
    made.sendall(b"%d\\n" % number)
    time.sleep(0.002)
"""
LISTEN = """
import socket, sys
made = socket.create_connection((sys.argv[1], 7001), timeout=60)
for line in made.makefile():
    print(line, end="", flush=True)
"""


class Flow:
    """A connection on which only the server speaks. Neither may begin one the other way: were
    the flow forgotten, the server's next packet would be the first of a forbidden one."""

    def __init__(self, server: Pod, client: Pod) -> None:
        self._server = server.run(sys.executable, "-c", SERVE)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._client = client.run(sys.executable, "-c", LISTEN, server.address)

    def lines(self, count: int) -> None:
        """So many more arrive, none left out."""
        stream = self._client.stdout
        assert stream is not None
        numbers = [int(stream.readline()) for _ in range(count)]
        assert numbers == list(range(numbers[0], numbers[0] + count))

    def close(self) -> None:
        for process in (self._client, self._server):
            process.kill()
            process.communicate()


@pytest.fixture
def flow(node: Node, one: Version) -> Iterator[Flow]:
    ip("netns", "exec", node.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    wanted = _wanted()
    node.write(wanted)
    _start(node, one)
    node.wait_for(wanted, 0)
    with pod(node, 1) as client, pod(node, 2) as server:
        for each in (client, server):
            assert call("ADD", config(node, prevResult=each.result), each).code == 0
        node.wait_for(wanted, 2)
        found = Flow(server, client)
        try:
            found.lines(20)
            yield found
        finally:
            found.close()


def _wanted() -> world.World:
    to_server = world.rule_set(
        world.term(api.SetPeer(name="server"), 0, "TCP", 7001), direction="Egress", name="out"
    )
    from_client = world.rule_set(world.term(api.SetPeer(name="client"), 0, "TCP", 7001), name="in")
    nothing = world.rule_set(direction="Egress", name="silent")
    closed = world.rule_set(name="closed")
    rule_sets = [to_server, from_client, nothing, closed]
    out, into, silent, shut = (r.metadata.name for r in rule_sets)
    return world.World(
        shards=1,
        endpoints=[world.endpoint(1, 300, shut, out), world.endpoint(2, 301, into, silent)],
        rule_sets=rule_sets,
        peers=[world.peer_set("server", 301), world.peer_set("client", 300)],
        ipcache={"10.0.0.1/32": 300, "10.0.0.2/32": 301},
    )


def _maps(node: Node) -> set[str]:
    names = {path.name for path in (node.pin_dir / "maps").iterdir()}
    return {name for name in names if name.startswith(("ct_", "half_open_"))}


def _moved(node: Node, number: int) -> bool:
    return _maps(node) == {f"ct_v{number}", f"half_open_v{number}"}


def test_flows_live_through_upgrade_and_downgrade(
    node: Node, flow: Flow, one: Version, two: Version
) -> None:
    wanted = _wanted()
    for number, version in ((3, two), (2, one), (3, two)):
        assert node.stop() == 0
        _start(node, version)
        poll("the move", lambda number=number: _moved(node, number))
        flow.lines(200)
        node.wait_for(wanted, 2)
    # What is in force obeys a change as ever.
    wanted.peers = [world.peer_set("server"), world.peer_set("client", 300)]
    wanted.revision += 1
    node.write(wanted)
    node.wait_for(wanted, 2)


def test_killed_while_it_moves_the_next_one_ends_the_move(
    node: Node, flow: Flow, one: Version, two: Version
) -> None:
    other = {one: (two, 3), two: (one, 2)}
    version = one
    for attempt in range(12):
        version, number = other[version]
        node.stop(signal.SIGKILL)
        _start(node, version)
        # At another moment each time: from before it has loaded anything to after the move.
        seen = node.log.stat().st_size
        for _ in range(attempt * 30):
            if node.log.stat().st_size != seen:
                break
            subprocess.run(["true"], check=True)
        node.stop(signal.SIGKILL)
        flow.lines(20)
        _start(node, version)
        poll("the move", lambda number=number: _moved(node, number))
        flow.lines(20)


def test_without_the_old_object_flows_begin_anew(node: Node, one: Version, two: Version) -> None:
    """Nothing is guessed about bytes whose layout nobody knows."""
    wanted = _wanted()
    node.write(wanted)
    _start(node, one)
    node.wait_for(wanted, 0)
    with Map.open_pinned(str(node.pin_dir / "maps" / "ct_v2")) as tracked:
        tracked.update(bytes(40), struct.pack("=Q", 1).ljust(128, b"\1"))
    node.stop()
    shutil.rmtree(node.paths.loaded)
    _start(node, two)
    poll("the move", lambda: _moved(node, 3))
    with Map.open_pinned(str(node.pin_dir / "maps" / "ct_v3")) as tracked:
        assert list(tracked.items()) == []


def test_entries_are_carried_member_by_member(node: Node, one: Version, two: Version) -> None:
    wanted = _wanted()
    node.write(wanted)
    _start(node, one)
    node.wait_for(wanted, 0)
    key = bytes(range(40))[:37] + bytes(3)
    rest = bytes(range(16, 86)) + bytes(2) + bytes(range(88, 128))
    with Map.open_pinned(str(node.pin_dir / "maps" / "ct_v2")) as tracked:
        tracked.update(key, struct.pack("=QII", 1 << 30, 7, 3) + rest)
    node.stop()
    _start(node, two)
    poll("the move", lambda: _moved(node, 3))
    with Map.open_pinned(str(node.pin_dir / "maps" / "ct_v3")) as tracked:
        assert list(tracked.items()) == [(key, struct.pack("=QQII", 1 << 30, 0, 3, 7) + rest)]
    node.stop()
    _start(node, one)
    poll("the move", lambda: _moved(node, 2))
    with Map.open_pinned(str(node.pin_dir / "maps" / "ct_v2")) as tracked:
        assert list(tracked.items()) == [(key, struct.pack("=QII", 1 << 30, 7, 3) + rest)]
