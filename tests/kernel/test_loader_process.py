"""The loader as a process: gates, upgrades, signals, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from support import loader_world as world
from tidegate_api import state as api
from tidegate_bpf import Link, Program, bpffs, clsact, mounts, netns
from tidegate_loader import addresses, kernel
from tidegate_loader.local import LocalInterface, NodePaths, Realised, read_realised

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

TIMEOUT = 20.0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _poll(what: str, check: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not check():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


class Node:
    """A run directory, a bpffs, a namespace with two interfaces; loaders come and go."""

    def __init__(self, directory: Path, name: str) -> None:
        self.namespace = name
        self.run_dir = directory / "run"
        self.mount = directory / "bpf"
        self.pin_dir = self.mount / "node"
        self.objects = world.stub_object(directory / "objects")
        self.paths = NodePaths(self.run_dir, world.NODE)
        self.paths.interfaces.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "loader.log"

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "tidegate_loader", "--node", world.NODE]
        command += ["--run-dir", str(self.run_dir), "--pin-dir", str(self.pin_dir)]
        command += ["--objects", str(self.objects), "--netns", f"/run/netns/{self.namespace}"]
        roots = ("crds", "node-loader")
        paths = os.pathsep.join(str(world.ROOT / r) for r in roots)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *more], stderr=log, env=os.environ | {"PYTHONPATH": paths}
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        code, self.process = self.process.wait(TIMEOUT), None
        return code

    def realised(self) -> Realised:
        return read_realised(self.paths.realised) or Realised(node="", epoch=0)

    def wait_for(self, wanted: world.World, endpoints: int) -> None:
        digest = wanted.state().digest

        def done() -> bool:
            if self.process is not None:
                assert self.process.poll() is None, self.log.read_text()
            found = self.realised()
            return found.digest == digest and len(found.endpoints) == endpoints

        _poll("the state to be realised", done)

    def write(self, wanted: world.World) -> None:
        wanted.write(self.run_dir)

    def add_interface(self, number: int) -> LocalInterface:
        name = f"veth{number}"
        _ip("-n", self.namespace, "link", "add", name, "type", "veth", "peer", "name", f"p{number}")
        shown = subprocess.run(
            ["ip", "-n", self.namespace, "-j", "link", "show", name],
            check=True, capture_output=True,
        )  # fmt: skip
        index = json.loads(shown.stdout)[0]["ifindex"]
        found = msgspec.structs.replace(world.interface(number), ifindex=index)
        world.write_object(self.paths.interfaces, found.uid, found)
        return found

    def link(self, index: int, direction: str = "ingress") -> tuple[int, int, int | None]:
        """(link id, program id, target)."""
        pin = self.pin_dir / "links" / f"{index}-{direction}"
        with Link.open_pinned(str(pin)) as link:
            return link.info.id, link.info.program_id, link.info.target

    def program(self, name: str) -> int:
        with Program.open_pinned(str(self.pin_dir / "progs" / name)) as program:
            return program.info.id


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    found = Node(tmp_path, f"tgl-{os.getpid()}-{time.monotonic_ns() % 100000}")
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", found.namespace)
        stack.callback(_ip, "netns", "del", found.namespace)
        found.mount.mkdir()
        bpffs.mount(str(found.mount))
        stack.callback(bpffs.unmount, str(found.mount))
        stack.callback(lambda: found.stop(signal.SIGKILL) if found.process else None)
        yield found


def test_gates_stay_when_the_loader_goes_and_come_back_unchanged(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    before = node.link(one.ifindex), node.link(one.ifindex, "egress")
    assert before[0][1:] == (node.program("from_pod"), one.ifindex)
    assert before[1][1:] == (node.program("to_pod"), one.ifindex)
    epoch = node.realised().epoch
    assert node.stop() == 0
    assert (node.link(one.ifindex), node.link(one.ifindex, "egress")) == before
    node.paths.realised.touch()
    node.start()
    node.add_interface(2)
    node.wait_for(world.example(), 2)
    assert node.link(one.ifindex) == before[0]
    assert node.realised().epoch == epoch + 1
    # Killed while it cleans up, the next one would rightly bump the epoch once more.
    _poll("the apply to end", lambda: not node.paths.applying.exists())
    assert node.stop(signal.SIGKILL) == -signal.SIGKILL
    node.start("--once")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 0
    assert node.realised().epoch == epoch + 1
    assert node.link(one.ifindex) == before[0]


def test_a_new_object_is_put_in_place_of_the_old(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    node.stop()
    link, program, _ = node.link(one.ifindex)
    world.stub_object(node.objects, verdict=0)
    node.start()
    _poll("the new program", lambda: node.program("from_pod") != program)
    _poll("the link to run it", lambda: node.link(one.ifindex)[1] == node.program("from_pod"))
    assert node.link(one.ifindex)[0] == link
    node.wait_for(world.example(), 1)
    assert len(node.realised().rule_sets) == 2
    # The stub's own map changed its size with the verdict: it is nobody else's.
    assert not (node.pin_dir / "maps" / "scratch").exists()


def test_clsact_does_the_same(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start("--force-clsact")
    node.wait_for(world.example(), 1)
    with netns.inside(f"/run/netns/{node.namespace}"):
        assert clsact.query(one.ifindex, ingress=True) == node.program("from_pod")
        assert clsact.query(one.ifindex, ingress=False) == node.program("to_pod")
    assert not list((node.pin_dir / "links").iterdir())
    node.stop()
    node.start()
    _poll("a link instead", lambda: (node.pin_dir / "links" / f"{one.ifindex}-egress").exists())
    with netns.inside(f"/run/netns/{node.namespace}"):
        _poll("no filter", lambda: clsact.query(one.ifindex, ingress=False) is None)


def test_an_interface_that_goes_takes_its_links_and_endpoint(node: Node) -> None:
    one, two = node.add_interface(1), node.add_interface(2)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 2)
    _ip("-n", node.namespace, "link", "del", two.ifname)
    (node.paths.interfaces / f"{two.uid}.json").unlink()
    node.wait_for(world.example(), 1)
    assert {p.name for p in (node.pin_dir / "links").iterdir()} == {
        f"{one.ifindex}-ingress",
        f"{one.ifindex}-egress",
    }


def test_a_lost_interface_file_does_not_open_the_gate(node: Node) -> None:
    one = node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    (node.paths.interfaces / f"{one.uid}.json").unlink()
    node.wait_for(world.example(), 0)
    assert node.link(one.ifindex)[1:] == (node.program("from_pod"), one.ifindex)


def test_a_saved_file_is_enforced(node: Node) -> None:
    node.add_interface(1)
    wanted = world.example()
    node.write(wanted)
    node.start()
    node.wait_for(wanted, 1)
    switches = node.realised().counters.switches
    for number in range(5):
        added = world.rule_set(world.term(api.AnyPeer(), 0, "TCP", 1000 + number))
        wanted.rule_sets = [*world.example().rule_sets, added]
        wanted.endpoints = [
            world.endpoint(1, 300, added.metadata.name),
            *world.example().endpoints[1:],
        ]
        node.write(wanted)
        node.wait_for(wanted, 1)
    assert node.realised().counters.switches == switches + 5
    assert len(node.realised().rule_sets) == 1


def test_drift_is_repaired_on_a_signal(node: Node) -> None:
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 0)
    layouts = kernel.Layouts(_spec(node))
    opened = kernel.Kernel(node.pin_dir, layouts)
    opened.map("ipcache_v1").delete(addresses.pack("10.0.0.1"))
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR1)
    _poll("the repair", lambda: node.realised().counters.drift == 1)
    assert addresses.pack("10.0.0.1") in opened.read_ipcache()
    opened.close()


def _spec(node: Node) -> kernel.ObjectFile:
    return kernel.ObjectFile(node.objects / "pod.o")


def test_detach_leaves_nothing(node: Node) -> None:
    node.add_interface(1)
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 1)
    node.stop()
    node.start("--detach")
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 0
    assert list(node.pin_dir.iterdir()) == []


def test_what_cannot_be_used_is_one_line(node: Node) -> None:
    (node.objects / "pod.o").unlink()
    node.start()
    assert node.process is not None
    assert node.process.wait(TIMEOUT) == 1
    text = node.log.read_text()
    assert "no pod.o in" in text
    assert "Traceback" not in text


def test_idle_memory_is_small(node: Node) -> None:
    """The bar itself is the benchmark's; this keeps heavy imports out."""
    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 0)
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    rss = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS"))
    assert rss < 64 * 1024, status


def test_socket_programs_attach_to_a_cgroup(node: Node) -> None:
    root = mounts.cgroup2()
    if root is None:
        pytest.skip("cgroup2 is not mounted")
    source = node.objects / "sock.bpf.c"
    source.write_text(
        world.STUB.split('SEC("tc")')[0].replace("SCRATCH", "8")
        + 'SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *c) { return 1; }'
    )
    world.compile_object(source, node.objects / "sock.o")
    cgroup = Path(root) / node.namespace
    cgroup.mkdir()
    try:
        node.write(world.example())
        node.start("--cgroup", str(cgroup))
        node.wait_for(world.example(), 0)
        with Link.open_pinned(str(node.pin_dir / "links" / "cgroup-connect4")) as link:
            assert link.info.target == cgroup.stat().st_ino
            before = link.info.id
        node.stop()
        node.start("--cgroup", str(cgroup), "--once")
        assert node.process is not None
        assert node.process.wait(TIMEOUT) == 0
        with Link.open_pinned(str(node.pin_dir / "links" / "cgroup-connect4")) as link:
            assert link.info.id == before
    finally:
        cgroup.rmdir()
