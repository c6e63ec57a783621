"""A loader as a process, on a node that is a network namespace: for the tests that start them."""

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
from support import loader_world as world
from tidegate_bpf import Link, Program, bpffs
from tidegate_loader.local import LocalInterface, NodePaths, Realised, read_realised

TIMEOUT = 20.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def poll(what: str, check: Callable[[], object]) -> None:
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
        self.roots = world.ROOT
        """Where the loader's code is."""
        self.entered: tuple[str, ...] = ()
        """What starts the loader inside the namespace; () where it enters it by itself."""

    def start(self, *more: str) -> None:
        command = [*self.entered, sys.executable, "-m", "tidegate_loader", "--node", world.NODE]
        command += ["--run-dir", str(self.run_dir), "--pin-dir", str(self.pin_dir)]
        command += ["--objects", str(self.objects)]
        if not self.entered:
            command += ["--netns", f"/run/netns/{self.namespace}"]
        roots = ("crds", "node-loader")
        paths = os.pathsep.join(str(self.roots / r) for r in roots)
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

        poll("the state to be realised", done)

    def write(self, wanted: world.World) -> None:
        wanted.write(self.run_dir)

    def add_interface(self, number: int) -> LocalInterface:
        name = f"veth{number}"
        ip("-n", self.namespace, "link", "add", name, "type", "veth", "peer", "name", f"p{number}")
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


@contextlib.contextmanager
def made(directory: Path) -> Iterator[Node]:
    """A node that leaves nothing behind."""
    found = Node(directory, f"tgl-{os.getpid()}-{time.monotonic_ns() % 100000}")
    with contextlib.ExitStack() as stack:
        ip("netns", "add", found.namespace)
        stack.callback(ip, "netns", "del", found.namespace)
        found.mount.mkdir()
        bpffs.mount(str(found.mount))
        stack.callback(bpffs.unmount, str(found.mount))
        stack.callback(lambda: found.stop(signal.SIGKILL) if found.process else None)
        yield found
