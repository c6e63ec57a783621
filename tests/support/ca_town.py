"""A cluster that `tidegate up` made, and real traffic between its pods.

Sockets are opened inside the pods' namespaces by the test's own process; a flood is a process of
its own. Waiting is polling.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from support import waiting
from support.clusters import Manifest
from tidegate_bpf import netns
from tidegate_cli.standalone import teardown
from tidegate_cli.standalone.rundir import Pod, RunDir

WAIT_SECONDS = 60.0
until = functools.partial(waiting.until, seconds=WAIT_SECONDS)
ECHO_SECONDS = 3.0
"""A datagram that has no answer by then is lost."""
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Town:
    run_dir: RunDir
    folder: Path

    def tidegate(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tidegate_cli", *argv]
        environment = os.environ | {"TIDEGATE_RUN_DIR": str(self.run_dir.path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)

    def save(self, name: str, *documents: Manifest) -> None:
        """By rename, as editors save."""
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(yaml.safe_dump_all(documents, sort_keys=False))
        temporary.rename(self.folder / f"{name}.yaml")

    def up(self, *options: str) -> None:
        result = self.tidegate("up", str(self.folder), "--detach", *options)
        assert result.returncode == 0, result.stdout + result.stderr

    def pod(self, name: str) -> Pod:
        """A pod of namespace default."""
        state = self.run_dir.read()
        assert state is not None
        return next(p for p in state.pods if p.key == f"default/{name}")

    @contextlib.contextmanager
    def inside(self, pod: str) -> Iterator[None]:
        place = self.pod(pod).netns
        with netns.inside(place if place.startswith("/") else f"/run/netns/{place}"):
            yield

    def udp(self, pod: str, port: int = 0) -> socket.socket:
        with self.inside(pod):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        if port:
            sock.bind(("0.0.0.0", port))
        return sock

    def connect(self, pod: str, to: str, port: int, timeout: float = 1.0) -> socket.socket | None:
        """None: no connection came about."""
        with self.inside(pod):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect((self.pod(to).addresses[0], port))
        except OSError:
            sock.close()
            return None
        return sock

    def reaches(self, pod: str, to: str, port: int) -> bool:
        sock = self.connect(pod, to, port, timeout=0.3)
        if sock is None:
            return False
        sock.close()
        return True

    def loaders(self) -> dict[str, int]:
        """Node -> pid of its living loader."""
        found = {}
        for entry in Path("/proc").iterdir():
            argv = _cmdline(entry)
            if "tidegate_loader" in argv and str(self.run_dir.path) in argv:
                found[argv[argv.index("--node") + 1]] = int(entry.name)
        return found


def _cmdline(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else []
    except OSError:
        return []


@contextlib.contextmanager
def town(directory: Path) -> Iterator[Town]:
    made = Town(RunDir.at(directory / "run"), directory / "manifests")
    made.folder.mkdir()
    try:
        yield made
    finally:
        teardown.down(made.run_dir)


def pod(name: str, node: int = 1, **labels: str) -> Manifest:
    ports = [
        {"containerPort": 8080, "protocol": "TCP"},
        {"containerPort": 8081, "protocol": "UDP"},
    ]
    spec = {"nodeName": f"node-{node}", "containers": [{"name": "c", "image": "x", "ports": ports}]}
    metadata = {"name": name, "labels": {"app": name} | labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def policy(name: str, app: str, *roles: str) -> Manifest:
    """Into pods of `app` from pods of these roles, one rule each."""
    rules = [{"from": [{"podSelector": {"matchLabels": {"role": role}}}]} for role in roles]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, "ingress": rules},
    }


def node(number: int) -> Manifest:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"node-{number}"}}


def ask(sock: socket.socket, timeout: float = 1.0) -> bool:
    """Whether an open connection still carries a request and its answer."""
    sock.settimeout(timeout)
    try:
        sock.sendall(REQUEST)
        return sock.recv(4096).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


@dataclass
class Traffic:
    """Datagrams to an echo, one after the other, each answered before the next; and a connection
    that asks and asks. `lost`: what went unanswered."""

    town: Town
    pod: str
    to: str
    answered: int = 0
    lost: list[str] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._end = threading.Event()
        self._threads = [threading.Thread(target=t) for t in (self._datagrams, self._requests)]
        self._sock = self.town.udp(self.pod)
        self._sock.connect((self.town.pod(self.to).addresses[0], 8081))
        self._sock.settimeout(ECHO_SECONDS)
        stream = self.town.connect(self.pod, self.to, 8080)
        assert stream is not None
        self._stream = stream
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._sock.close()
        self._stream.close()

    def _datagrams(self) -> None:
        number = 0
        while not self._end.wait(0.002):
            number += 1
            try:
                self._sock.send(b"%d" % number)
                got = self._sock.recv(4096)
                self.answered += 1
                if not got.endswith(b" %d" % number):
                    self.lost.append(f"datagram {number}: {got!r}")
            except OSError as error:
                self.lost.append(f"datagram {number}: {error}")

    def _requests(self) -> None:
        while not self._end.wait(0.005):
            # TCP repeats what is lost: a broken flow is one that stays silent.
            if not ask(self._stream, 10.0):
                self.lost.append("connection")
                return
            self.answered += 1


class Sink:
    """A port of a pod that must stay silent, and those who try it all the time."""

    def __init__(self, town: Town, at: str, port: int, *senders: str) -> None:
        self._address = (town.pod(at).addresses[0], port)
        self._sink = town.udp(at, port)
        self._sink.setblocking(False)
        self._senders = [town.udp(name) for name in senders]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._try)
        self.tried = 0
        self.got: list[object] = []

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for sock in (*self._senders, self._sink):
            sock.close()

    def _try(self) -> None:
        while not self._end.wait(0.001):
            for sock in self._senders:
                with contextlib.suppress(OSError):
                    sock.sendto(b"forbidden", self._address)
                    self.tried += 1
            with contextlib.suppress(BlockingIOError):
                self.got.append(self._sink.recvfrom(4096))
