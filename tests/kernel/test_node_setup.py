"""A node prepared, kept and cleaned up, in a network and a mount namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import cni_step, loader_node
from support import loader_world as world
from support.cni_step import Pod, call, config, pod
from support.loader_node import Node, poll
from tidegate_bpf import bpffs
from tidegate_loader.local import LocalInterface

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

LIST = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        found.objects = world.ROOT / "datapath" / "build"
        yield found


class Setup:
    """`tidegate-node-setup` on a node whose file system is a directory."""

    def __init__(self, node: Node, directory: Path) -> None:
        self._node = node
        self.root = directory / "root"
        self.configs, self.programs = self.root / "etc/cni/net.d", self.root / "opt/cni/bin"
        self.results = self.root / "var/lib/cni/results"
        for path in (self.configs, self.programs, self.results):
            path.mkdir(parents=True)
        self.config = self.configs / "10-net.conflist"
        self.log = directory / "setup.log"

    def start(self, command: str) -> subprocess.Popen[bytes]:
        arguments = ["--node", world.NODE, "--root", "/", "--step", str(cni_step.STEP)]
        for flag, path in (
            ("--run-dir", self._node.run_dir),
            ("--pin-dir", self._node.pin_dir),
            ("--socket", self._node.run_dir / "cni.sock"),
            ("--cni-conf-dir", self.configs),
            ("--cni-bin-dir", self.programs),
            ("--cni-results", self.results),
        ):
            arguments += [flag, str(path)]
        paths = os.pathsep.join(str(world.ROOT / r) for r in ("crds", "node-loader"))
        entered = ["nsenter", f"--net=/run/netns/{self._node.namespace}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*entered, sys.executable, "-m", "tidegate_loader.setup", command, *arguments],
                stderr=log,
                env=os.environ | {"PYTHONPATH": paths},
            )

    def run(self, command: str) -> int:
        return self.start(command).wait(loader_node.TIMEOUT)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        process = self.start("watch")
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(loader_node.TIMEOUT) == 0, self.log.read_text()

    def has_step(self) -> bool:
        try:
            held = json.loads(self.config.read_text())
        except ValueError:
            return False
        return held["plugins"][-1]["type"] == "tidegate-cni"

    def remember(self, found: Pod, **more: Any) -> None:
        """As libcni does after an ADD."""
        cached = {
            "kind": "cniCacheV1",
            "containerId": f"c{found.number}",
            "config": "e30=",
            "ifName": "eth0",
            "networkName": "net",
            "netns": f"/run/netns/{found.netns}",
            "cniArgs": [
                ["IgnoreUnknown", "1"],
                ["K8S_POD_NAMESPACE", "ns"],
                ["K8S_POD_NAME", f"pod-{found.number}"],
                ["K8S_POD_INFRA_CONTAINER_ID", f"c{found.number}"],
                ["K8S_POD_UID", found.uid],
            ],
            "result": found.result,
        } | more
        (self.results / f"net-c{found.number}-eth0").write_text(json.dumps(cached))


@pytest.fixture
def setup(node: Node, tmp_path: Path) -> Setup:
    made = Setup(node, tmp_path)
    made.config.write_text(json.dumps(LIST))
    return made


def test_init_prepares_and_may_be_repeated(node: Node, setup: Setup) -> None:
    bpffs.unmount(str(node.mount))
    assert not bpffs.is_bpffs(node.mount)
    for _ in range(2):
        assert setup.run("init") == 0, setup.log.read_text()
        assert bpffs.is_bpffs(node.mount)
        assert setup.has_step()
        program = setup.programs / "tidegate-cni"
        assert program.read_bytes() == cni_step.STEP.read_bytes()
        assert os.access(program, os.X_OK)
    held = json.loads(setup.config.read_text())
    assert held["plugins"] == [
        {"type": "ptp"},
        {
            "type": "tidegate-cni",
            "pinDir": str(node.pin_dir),
            "socket": str(node.run_dir / "cni.sock"),
            "enforcingFile": str(node.paths.enforcing),
        },
    ]
    # And away again, with the bpffs, which was of our making.
    assert setup.run("cleanup") == 0, setup.log.read_text()
    assert not bpffs.is_bpffs(node.mount)
    bpffs.mount(str(node.mount))


def test_pods_that_run_already_are_taken_in(node: Node, setup: Setup) -> None:
    with pod(node, 1) as routed, pod(node, 2, bridge=_bridge(node)) as bridged:
        gone = Pod(node, 3)
        gone.result = msgspec.json.decode(msgspec.json.encode(routed.result))
        gone.result["interfaces"][0]["name"] = "veth-of-last-boot"
        for each in (routed, bridged, gone):
            setup.remember(each)
        setup.remember(Pod(node, 4), networkName="other", result=routed.result)
        setup.remember(Pod(node, 5), cniArgs=None, result=routed.result)
        (setup.results / "net-junk-eth0").write_text("{")
        assert setup.run("init") == 0, setup.log.read_text()
        files = {p.stem: p for p in node.paths.interfaces.iterdir()}
        assert files.keys() == {"uid-1", "uid-2"}
        for found in (routed, bridged):
            read = msgspec.json.decode(files[found.uid].read_bytes(), type=LocalInterface)
            assert read == LocalInterface(
                uid=found.uid,
                namespace="ns",
                name=f"pod-{found.number}",
                ifname=found.host,
                ifindex=found.ifindex,
                pod_mac=found.mac(found.netns, "eth0"),
                host_mac=found.mac(node.namespace, found.host),
                addresses=[found.address],
                adopted=True,
            )
        assert "net-junk-eth0" in setup.log.read_text()
        # They are gated when, and not before, their policy is known.
        wanted = world.World(shards=1, endpoints=[world.endpoint(1, 300)])
        node.write(wanted)
        node.start("--cni-socket", str(node.run_dir / "cni.sock"))
        node.wait_for(wanted, 1)
        assert node.link(routed.ifindex)[2] == routed.ifindex
        assert not (node.pin_dir / "links" / f"{bridged.ifindex}-ingress").exists()
        wanted.endpoints.append(world.endpoint(2, 301))
        node.write(wanted)
        node.wait_for(wanted, 2)
        assert node.link(bridged.ifindex)[2] == bridged.ifindex


def _bridge(node: Node) -> str:
    loader_node.ip("-n", node.namespace, "link", "add", "cni0", "type", "bridge")
    return "cni0"


def test_watch_puts_back_what_others_take_out(node: Node, setup: Setup) -> None:
    with setup.watching():
        poll("the step", setup.has_step)
        # Another CNI rewrites its file, in place.
        setup.config.write_text(json.dumps(LIST | {"name": "again"}))
        poll("the step again", setup.has_step)
        assert json.loads(setup.config.read_text())["name"] == "again"
        # It is replaced by rename, and the program goes.
        fresh = setup.configs / ".fresh"
        fresh.write_text(json.dumps(LIST | {"name": "renamed"}))
        fresh.rename(setup.config)
        (setup.programs / "tidegate-cni").unlink()
        poll("the step again", setup.has_step)
        poll("the program", (setup.programs / "tidegate-cni").exists)
        # A pod that passed while no gate was there is found.
        setup.config.write_text(json.dumps(LIST))
        with pod(node, 1) as found:
            assert call("ADD", config(node, prevResult=found.result), found).code == 0
            setup.remember(found)
            poll("the pod", lambda: (node.paths.interfaces / "uid-1.json").exists())


def test_watch_waits_for_a_cni_to_come(node: Node, setup: Setup) -> None:
    setup.config.unlink()
    with setup.watching():
        poll("the program", (setup.programs / "tidegate-cni").exists)
        setup.config.write_text(json.dumps(LIST))
        poll("the step", setup.has_step)


def test_a_detached_node_loses_everything_and_gets_it_back(node: Node, setup: Setup) -> None:
    wanted = world.World(shards=1)
    node.write(wanted)
    assert setup.run("init") == 0
    node.start("--cni-socket", str(node.run_dir / "cni.sock"))
    node.wait_for(wanted, 0)
    with setup.watching():
        poll("the step", setup.has_step)
        wanted.mode = "Detached"
        node.write(wanted)
        poll("the step to go", lambda: json.loads(setup.config.read_text()) == LIST)
        poll("the program to go", lambda: not (setup.programs / "tidegate-cni").exists())
        # A restart of the pod does not bring it back.
        assert setup.run("init") == 0
        assert json.loads(setup.config.read_text()) == LIST
        wanted.mode = "Enforcing"
        node.write(wanted)
        poll("the step to come", setup.has_step)
        wanted.mode = "Detached"
        node.write(wanted)
        poll("the step to go", lambda: json.loads(setup.config.read_text()) == LIST)
        node.stop()
        node.paths.realised.unlink()  # as the loader of a cluster does at its end
    assert not node.run_dir.exists()


def test_cleanup_leaves_nothing_whatever_state_the_node_is_in(node: Node, setup: Setup) -> None:
    """The operator is gone, the loader was killed; pods run on, and free."""
    nothing = world.rule_set(direction="Egress")
    wanted = world.World(shards=1, rule_sets=[nothing])
    wanted.endpoints = [world.endpoint(1, 300, egress=nothing.metadata.name)]
    node.write(wanted)
    assert setup.run("init") == 0
    node.start("--cni-socket", str(node.run_dir / "cni.sock"))
    node.wait_for(wanted, 0)
    with pod(node, 1) as found:
        assert _reaches_its_node(found)
        assert call("ADD", config(node, prevResult=found.result), found).code == 0
        node.wait_for(wanted, 1)
        assert not _reaches_its_node(found)
        node.stop(signal.SIGKILL)
        assert not _reaches_its_node(found)
        assert setup.run("cleanup") == 0, setup.log.read_text()
        assert _reaches_its_node(found)
        assert json.loads(setup.config.read_text()) == LIST
        assert not any(setup.programs.iterdir())
        assert not node.pin_dir.exists()
        assert not node.run_dir.exists()
        assert bpffs.is_bpffs(node.mount)  # it was there before us
        assert setup.run("cleanup") == 0


CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=0.5)
except ConnectionRefusedError:
    sys.exit(0)
except TimeoutError:
    sys.exit(1)
sys.exit(2)
"""


def _reaches_its_node(found: Pod) -> bool:
    """Whether a connection is answered, if only by a refusal."""
    process = found.run("python3", "-c", CONNECT, cni_step.GATEWAY)
    _, errors = process.communicate(timeout=loader_node.TIMEOUT)
    assert process.returncode in (0, 1), errors
    return process.returncode == 0
