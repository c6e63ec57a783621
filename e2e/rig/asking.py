"""Questions asked from inside pods, from their networks, and from nodes.

A pod is asked by a process inside its container that the node's container runtime starts, not by
`kubectl exec`: so it can be asked while the API server is away, and many times without much ado."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kind import settings
from kind.run import run
from rig.pods import Pod

ANSWER_SECONDS = 1.0
# How long an asker may take beyond what its questions may.
GRACE_SECONDS = 30.0
# So many lines fit into a pipe that nobody reads yet.
MAX_LINES = 200
ON_NODE = "/kind/probe"
# In /proc/net/tcp.
ESTABLISHED = "01"


@dataclass(frozen=True)
class Question:
    """What `probe ask` reads; see e2e/probe/ask.go."""

    address: str
    port: int = 0
    protocol: str = "TCP"
    op: str = "probe"
    seconds: float = ANSWER_SECONDS
    path: str = ""
    stream: int = 0
    reopen: bool = False
    """Of a stream: where the server says that it takes no more, it goes on over another connection,
    as clients of gRPC do."""


@dataclass(frozen=True)
class Answer:
    pod: str
    detail: str
    client: str = ""
    body: str = ""
    addresses: tuple[str, ...] = ()
    answered: int = 0
    gap: float = 0.0
    heard: dict[str, list[int]] = field(default_factory=dict)
    """Of a pulse: pod → when the first question since the last look, and the latest, that it
    answered were sent; nanoseconds of Unix time, 0 = none."""


class Asker:
    """A process that answers questions as long as this object is open."""

    _ids = itertools.count(1)

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Every question's answer, in their order; all are under way at once."""
        answers: list[Answer] = []
        for start in range(0, len(questions), MAX_LINES):
            ids = [self._send(q) for q in questions[start : start + MAX_LINES]]
            found = dict(self._receive() for _ in ids)
            answers += [found[i] for i in ids]
        return answers

    def begin_stream(self, question: Question) -> int:
        """Opens a connection on which requests follow each other every `seconds`; its number.

        The first must be answered."""
        number = self._send(dataclasses.replace(question, op="stream"))
        _, first = self._receive()
        assert not first.detail, f"{self.name} -> {question.address}: {first.detail}"
        return number

    def begin_pulse(self, question: Question) -> int:
        """Asks by UDP every `seconds`, each time from a new socket; its number."""
        number = self._send(dataclasses.replace(question, op="pulse"))
        self._receive()
        return number

    def peek(self, number: int) -> Answer:
        """How a stream goes: how many answers, the longest gap, what ended it if it has ended."""
        (answer,) = self.ask([Question("", op="peek", stream=number)])
        return answer

    def end_stream(self, number: int) -> Answer:
        """Ends it; how it went."""
        (answer,) = self.ask([Question("", op="stop", stream=number)])
        return answer

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _send(self, question: Question) -> int:
        number = next(self._ids)
        assert self._process.stdin is not None
        line = json.dumps({"id": number, **dataclasses.asdict(question)}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is said where its answer is read
        return number

    def _receive(self) -> tuple[int, Answer]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            raise AssertionError(f"cannot ask from {self.name}: {said.decode().strip()}")
        fields = json.loads(line)
        number = fields.pop("id")
        return number, Answer(**{**fields, "addresses": tuple(fields.get("addresses", ()))})


def in_pod(pod: Pod) -> Asker:
    """Asks as the pod's own programs do: in its namespaces and its cgroup."""
    name = f"ask-{time.monotonic_ns()}"
    return Asker(
        pod.key,
        ["docker", "exec", "-i", pod.node, "ctr", "-n", "k8s.io", "tasks", "exec",
         "--exec-id", name, pod.container, "/probe", "ask"],
    )  # fmt: skip


def in_network_only(pod: Pod) -> Asker:
    """Asks from the pod's network, but from outside every cgroup of its node: no program at a
    cgroup sees its sockets, so what a Service needs is done packet by packet."""
    program = settings.cache() / "probe"
    return Asker(f"{pod.key}'s network", ["nsenter", "-t", str(pid(pod)), "-n", program, "ask"])


def on_node(node: str) -> Asker:
    """Asks as a process of the node, in no pod."""
    run("docker", "cp", settings.cache() / "probe", f"{node}:{ON_NODE}")
    return Asker(node, ["docker", "exec", "-i", node, ON_NODE, "ask"])


def pid(pod: Pod) -> int:
    """A process of the pod, as this machine numbers it."""
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            if pod.container in path.read_text():
                return int(path.parent.name)
        except OSError:
            continue  # it has ended
    raise AssertionError(f"{pod.key} has no process on this machine")


def peers(pod: Pod) -> set[tuple[str, int]]:
    """Whom the pod has connections to; see `connections`."""
    return set(connections(pod))


def connections(pod: Pod) -> list[tuple[str, int]]:
    """Address and port at the other end of every IPv4 connection of the pod, as its kernel has
    them: what a program at a cgroup translated is translated here."""
    found = []
    for line in Path(f"/proc/{pid(pod)}/net/tcp").read_text().splitlines()[1:]:
        remote, state = line.split()[2:4]
        if state == ESTABLISHED:
            address, port = remote.split(":")
            found.append((socket.inet_ntoa(int(address, 16).to_bytes(4, "little")), int(port, 16)))
    return found


@dataclass
class Askers:
    """One asker a pod, opened when first needed."""

    _open: dict[str, Asker] = field(default_factory=dict)

    def of(self, pod: Pod) -> Asker:
        if pod.container not in self._open:
            self._open[pod.container] = in_pod(pod)
        return self._open[pod.container]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
