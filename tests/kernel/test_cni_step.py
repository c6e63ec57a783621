"""The CNI step in real network namespaces, with a loader that is played and with the real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import apiserver, cni_step, loader_node
from support import loader_world as world
from support.cni_step import Pod, call, config, finish, pod, start
from support.loader_node import Node, ip, poll
from tidegate_api import state as api
from tidegate_bpf import Map, ObjectFile
from tidegate_loader.local import LocalInterface

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        yield found


class Played:
    """A loader's socket: keeps the questions, gives the answers in order (None: hangs up)."""

    def __init__(self, node: Node, *answers: dict[str, Any] | None) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = answers
        self._path = node.run_dir / "cni.sock"
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            made, _ = self._listener.accept()
            with made, made.makefile("rb") as lines:
                self.asked.append(json.loads(lines.readline()))
                if answer is not None:
                    made.sendall(json.dumps(answer).encode() + b"\n")

    def close(self) -> list[dict[str, Any]]:
        self._thread.join(30)
        assert not self._thread.is_alive(), f"asked {len(self.asked)} of {len(self._answers)}"
        self._listener.close()
        self._path.unlink()
        return self.asked


def _gates(node: Node) -> None:
    """Programs pinned as a loader leaves them, and no loader."""
    node.write(world.example())
    node.start("--once")
    assert node.process is not None
    assert node.process.wait(loader_node.TIMEOUT) == 0
    node.process = None


def _add(node: Node, found: Pod, **more: Any) -> dict[str, Any]:
    return config(node, prevResult=found.result, **more)


@pytest.mark.parametrize("bridge", ["", "cni0"], ids=["routed", "bridge"])
def test_it_says_what_the_loader_has_to_know(node: Node, bridge: str) -> None:
    _gates(node)
    if bridge:
        ip("-n", node.namespace, "link", "add", bridge, "type", "bridge")
    with pod(node, 7, bridge) as found:
        played = Played(node, {"ok": True})
        answer = call("ADD", _add(node, found), found)
        (asked,) = played.close()
        assert (answer.code, answer.output) == (0, found.result)
        assert asked["command"] == "ADD"
        assert 0 < asked["waitMs"] < 5000
        interface = msgspec.convert(asked["interface"], LocalInterface)
        assert interface == LocalInterface(
            uid="uid-7",
            namespace="ns",
            name="pod-7",
            ifname="veth7",
            ifindex=found.ifindex,
            pod_mac=found.mac(found.netns, "eth0"),
            host_mac=found.mac(node.namespace, "veth7"),
            addresses=["10.0.0.7"],
        )
        # The gate hangs before the loader was asked, where a loader looks for it.
        for direction, program in (("ingress", "from_pod"), ("egress", "to_pod")):
            link = node.link(found.ifindex, direction)
            assert link[1:] == (node.program(program), found.ifindex)
        # Once more, as a runtime may: the same links, nothing twice.
        before = node.link(found.ifindex), node.link(found.ifindex, "egress")
        played = Played(node, {"ok": True})
        assert call("ADD", _add(node, found), found).code == 0
        played.close()
        assert (node.link(found.ifindex), node.link(found.ifindex, "egress")) == before


def test_a_link_left_by_an_interface_that_is_gone_is_replaced(node: Node) -> None:
    _gates(node)
    with pod(node, 1) as found, pod(node, 2) as other:
        played = Played(node, {"ok": True}, {"ok": True})
        assert call("ADD", _add(node, other), other).code == 0
        pins = node.pin_dir / "links"
        for direction in ("ingress", "egress"):
            (pins / f"{other.ifindex}-{direction}").rename(pins / f"{found.ifindex}-{direction}")
        assert call("ADD", _add(node, found), found).code == 0
        played.close()
        assert node.link(found.ifindex)[2] == found.ifindex
        assert node.link(found.ifindex, "egress")[2] == found.ifindex


def test_a_refusal_is_told_in_the_loaders_words(node: Node) -> None:
    _gates(node)
    with pod(node, 1) as found:
        played = Played(node, {"ok": False, "error": "the node is full"})
        answer = call("ADD", _add(node, found), found)
        played.close()
        assert (answer.code, answer.output["code"]) == (1, 102)
        assert answer.message == "tidegate: pod ns/pod-1: the node is full"


def test_a_loader_that_hangs_up_is_asked_again(node: Node) -> None:
    _gates(node)
    with pod(node, 1) as found:
        played = Played(node, None, None, {"ok": True})
        assert call("ADD", _add(node, found), found).code == 0
        assert len(played.close()) == 3


def test_without_a_loader_it_ends_in_time_with_a_reason(node: Node) -> None:
    _gates(node)
    with pod(node, 1) as found:
        answer = call("ADD", _add(node, found, timeoutSeconds=1), found)
        assert (answer.code, answer.output["code"]) == (1, 11)
        assert "the Tidegate loader of this node does not answer" in answer.message
        # Nothing passes meanwhile.
        assert node.link(found.ifindex)[2] == found.ifindex


def test_what_is_no_pair_with_the_node_is_refused(node: Node) -> None:
    _gates(node)
    with pod(node, 1) as found:
        missing = call("ADD", _add(node, found), found, CNI_IFNAME="eth1")
        assert missing.output["code"] == 100
        assert "has no interface eth1" in missing.message
        ip("-n", found.netns, "link", "add", "macvlan0", "link", "eth0", "type", "macvlan")
        other = call("ADD", _add(node, found), found, CNI_IFNAME="macvlan0")
        assert other.output["code"] == 100
        assert "is a macvlan, not one end of a veth pair" in other.message
        # A pair whose two ends are in the pod: its index may well be one of the node's.
        ip("-n", found.netns, "link", "add", "eth2", "type", "veth", "peer", "name", "eth3")
        inside = call("ADD", _add(node, found), found, CNI_IFNAME="eth2")
        assert inside.output["code"] == 100
        assert "is not in the node's network namespace" in inside.message


# ---- with the real loader -----------------------------------------------------------------------


@pytest.fixture
def real(node: Node) -> Node:
    """With the programs that are shipped."""
    node.objects = world.ROOT / "datapath" / "build"
    return node


def _start(node: Node) -> None:
    node.start("--cni-socket", str(node.run_dir / "cni.sock"))


def _files(node: Node) -> set[str]:
    return {path.stem for path in node.paths.interfaces.iterdir() if path.suffix == ".json"}


def test_add_returns_when_the_pod_is_in_force_and_del_cleans_up(real: Node) -> None:
    node, wanted = real, world.World(shards=1)
    node.write(wanted)
    _start(node)
    node.wait_for(wanted, 0)
    with pod(node, 1) as found:
        adding = start("ADD", _add(node, found, timeoutSeconds=20), found)
        poll("the gate", lambda: (node.pin_dir / "links" / f"{found.ifindex}-egress").exists())
        poll("the interface file", lambda: _files(node) == {"uid-1"})
        assert adding.poll() is None
        link = node.link(found.ifindex)
        wanted.endpoints = [world.endpoint(1, 300)]
        node.write(wanted)
        answer = finish(adding)
        assert (answer.code, answer.output) == (0, found.result)
        assert node.realised().endpoints["uid-1"].ifindex == found.ifindex
        # The loader took the step's link over.
        assert node.link(found.ifindex) == link
        assert call("CHECK", _add(node, found), found).code == 0
        # While the interface is there, its file stays: the pod may have been given up on only here.
        assert call("DEL", _add(node, found), found).code == 0
        assert _files(node) == {"uid-1"}
        pins = [node.pin_dir / "links" / f"{found.ifindex}-{d}" for d in ("ingress", "egress")]
    poll("the file to go", lambda: _files(node) == set())
    poll("the pins to go", lambda: not any(pin.exists() for pin in pins))
    # Deleting what is gone is no error, with and without its namespace.
    assert call("DEL", config(node), None, CNI_ARGS=cni_step.environment("", found)["CNI_ARGS"])


def test_add_times_out_with_the_reason(real: Node) -> None:
    node, wanted = real, world.World(shards=1)
    node.write(wanted)
    _start(node)
    node.wait_for(wanted, 0)
    with pod(node, 1) as found:
        answer = call("ADD", _add(node, found, timeoutSeconds=2), found)
        assert (answer.code, answer.output["code"]) == (1, 102)
        assert "the operator has not published this pod (UID uid-1)" in answer.message
    (node.run_dir / "objects" / "nodestates" / f"{world.NODE}.json").unlink()
    with pod(node, 2) as found:
        answer = call("ADD", _add(node, found, timeoutSeconds=2), found)
        assert f"nodestates/{world.NODE}.json is not there" in answer.message


def test_a_pod_waits_through_the_loaders_death(real: Node) -> None:
    node, wanted = real, world.World(shards=1)
    node.write(wanted)
    _start(node)
    node.wait_for(wanted, 0)
    with pod(node, 1) as found:
        adding = start("ADD", _add(node, found, timeoutSeconds=60), found)
        poll("the interface file", lambda: _files(node) == {"uid-1"})
        node.stop(signal.SIGKILL)
        assert adding.poll() is None
        wanted.endpoints = [world.endpoint(1, 300)]
        node.write(wanted)
        _start(node)
        assert finish(adding, 60).code == 0
        assert node.realised().endpoints["uid-1"].ifindex == found.ifindex


def test_files_of_pods_that_went_unseen_go(real: Node) -> None:
    """A file goes only if its interface is gone and the node state has forgotten the pod."""
    node, wanted = real, world.World(shards=1, endpoints=[world.endpoint(1, 300)])
    for number in (1, 2, 3):
        gone = world.interface(number, ifindex=4000 + number)
        world.write_object(node.paths.interfaces, gone.uid, gone)
    with pod(node, 2) as found:
        living = msgspec.structs.replace(world.interface(2), ifindex=found.ifindex)
        world.write_object(node.paths.interfaces, living.uid, living)
        node.write(wanted)
        _start(node)
        node.wait_for(wanted, 0)
        poll("the stale file to go", lambda: _files(node) == {"uid-1", "uid-2"})


def test_a_detached_node_lets_pods_through(real: Node) -> None:
    node, wanted = real, world.World(shards=1)
    node.write(wanted)
    _start(node)
    node.wait_for(wanted, 0)
    poll("the marker", node.paths.enforcing.exists)
    marker = {"enforcingFile": str(node.paths.enforcing)}
    with pod(node, 1) as found:
        adding = start("ADD", _add(node, found, timeoutSeconds=20, **marker), found)
        poll("the interface file", lambda: _files(node) == {"uid-1"})
        wanted.mode = "Detached"
        node.write(wanted)
        assert finish(adding).code == 0
        poll("nothing to be left", lambda: not any(node.pin_dir.iterdir()))
        assert not node.paths.enforcing.exists()
        assert call("ADD", _add(node, found, **marker), found).code == 0


def _plugin(name: str, command: str, given: dict[str, Any], found: Pod) -> dict[str, Any]:
    """One of the CNI project's own plugins, in the node's namespace."""
    program = apiserver.binary(name)
    environment = cni_step.environment(command, found, CNI_PATH=str(program.parent))
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{found.node.namespace}", str(program)],
        input=json.dumps(given),
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout)) if done.stdout.strip() else {}


PLUGINS = [{"type": "ptp"}, {"type": "bridge", "bridge": "cni0", "isGateway": True}]


@pytest.mark.parametrize("version", ["0.3.1", "1.0.0"])
@pytest.mark.parametrize("main", PLUGINS, ids=lambda v: str(v["type"]))
def test_behind_the_plugins_that_clusters_use(
    real: Node, tmp_path: Path, main: dict[str, Any], version: str
) -> None:
    """A whole chain, up and down, as libcni runs it."""
    node = real
    store = {"type": "host-local", "subnet": "10.0.0.0/24", "dataDir": str(tmp_path / "ipam")}
    common = {"cniVersion": version, "name": "net"}
    first = common | main | {"ipam": store}
    wanted = world.World(shards=1, endpoints=[world.endpoint(1, 300)])
    node.write(wanted)
    _start(node)
    node.wait_for(wanted, 0)
    found = Pod(node, 1)
    ip("netns", "add", found.netns)
    try:
        made = _plugin(main["type"], "ADD", first, found)
        answer = call("ADD", config(node, prevResult=made, **common), found)
        assert (answer.code, answer.output) == (0, made)
        (address,) = (entry["address"] for entry in made["ips"])
        assert node.realised().endpoints["uid-1"].addresses == [address.partition("/")[0]]
        if version != "0.3.1":  # it knows no CHECK
            assert call("CHECK", config(node, prevResult=made, **common), found).code == 0
        assert call("DEL", config(node, prevResult=made, **common), found).code == 0
        _plugin(main["type"], "DEL", first | {"prevResult": made}, found)
        poll("the file to go", lambda: _files(node) == set())
    finally:
        ip("netns", "del", found.netns)


SEND = """
import socket, sys, time
target, seconds = sys.argv[1], float(sys.argv[2])
made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in (0, 1)]
end = time.monotonic() + seconds
while time.monotonic() < end:
    for port, s in zip((7000, 7001), made):
        try:
            s.sendto(b"x", (target, port))
        except OSError:
            pass
"""
RECEIVE = """
import select, socket
made = {}
for port in (7000, 7001):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("0.0.0.0", port))
    made[s] = port
print("ready", flush=True)
seen = set()
while True:
    for s in select.select(list(made), [], [])[0]:
        s.recv(16)
        if made[s] not in seen:
            seen.add(made[s])
            print(made[s], flush=True)
"""


@contextlib.contextmanager
def _receiver(found: Pod) -> Iterator[list[str]]:
    """The ports that something arrived at, in the order of their first packets."""
    process, lines = found.run("python3", "-c", RECEIVE), []
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    reader = threading.Thread(target=lambda: lines.extend(map(str.strip, process.stdout)))  # type: ignore[arg-type]
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.communicate()
        reader.join()


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
def test_the_first_packet_meets_the_pods_policy(real: Node, gate: bool) -> None:
    """A pod floods from its first microsecond. Nothing of it passes until the pod is in force,
    and then only what its policy allows. Without the gate the same flood arrives: it could."""
    node = real
    only = world.rule_set(world.term(api.AnyPeer(), 0, "UDP", 7001), direction="Egress")
    wanted = world.World(
        shards=1,
        endpoints=[world.endpoint(2, 301)],
        ipcache={"10.0.0.1/32": 300, "10.0.0.2/32": 301},
    )
    node.write(wanted)
    ip("netns", "exec", node.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    if gate:
        _start(node)
        node.wait_for(wanted, 0)
    with pod(node, 2) as server, pod(node, 1) as client:
        if gate:
            assert call("ADD", _add(node, server), server).code == 0
        with _receiver(server) as arrived:
            adding = start("ADD", _add(node, client, timeoutSeconds=60), client)
            if gate:
                pin = node.pin_dir / "links" / f"{client.ifindex}-egress"
                poll("the gate", pin.exists)
            # A flood that waits for ARP is none.
            gateway = ("neigh", "add", cni_step.GATEWAY, "dev", "eth0", "nud", "permanent")
            ip("-n", client.netns, *gateway, "lladdr", client.mac(node.namespace, client.host))
            flood = client.run("python3", "-c", SEND, server.address, "60")
            try:
                if not gate:
                    poll("the flood to arrive", lambda: {"7000", "7001"} <= set(arrived))
                    return
                _dropped(node, "TG_DROP_PENDING", 1000)
                assert arrived == []
                wanted.endpoints = [
                    world.endpoint(1, 300, egress=only.metadata.name),
                    world.endpoint(2, 301),
                ]
                wanted.rule_sets = [only]
                node.write(wanted)
                assert finish(adding, 60).code == 0
                poll("what is allowed", lambda: "7001" in arrived)
                _dropped(node, "TG_DROP_POLICY", 1000)
                assert arrived == ["7001"]
            finally:
                flood.kill()
                flood.communicate()
                adding.kill()
                adding.communicate()


def _dropped(node: Node, reason: str, packets: int) -> None:
    """Wait until so many more packets were dropped for that reason: the flood is real."""
    number = ObjectFile(node.objects / "pod.o").enums["tg_reason"][reason]
    with Map.open_pinned(str(node.pin_dir / "maps" / "metrics_v1")) as metrics:

        def count() -> int:
            values = (metrics.lookup(struct.pack("=I", number * 2 + d)) for d in (0, 1))
            parts = (part for value in values for part in metrics.split_per_cpu(value))
            return sum(int(struct.unpack_from("=Q", part)[0]) for part in parts)

        before = count()
        poll(f"{packets} times {reason}", lambda: count() >= before + packets)
