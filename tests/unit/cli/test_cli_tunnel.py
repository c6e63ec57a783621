"""A cluster's observers asked through tunnels: real observers, real pipes; only exec is played."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tidegate_cli.cluster import flows
from tidegate_cli.cluster.flows import Observers
from tidegate_cli.cluster.state import LoaderPod
from tidegate_cli.cluster.tunnel import ERR, OUT
from tidegate_cli.errors import CliError
from tidegate_observer.api import observer_pb2
from tidegate_observer.client import ObserverError
from tidegate_observer.history import History
from tidegate_observer.relay import merged
from tidegate_observer.server import About, ObserverService, Server
from unit.observer.flows import SECOND, flow

PIPE = Path(__file__).parents[3] / "node-loader/cni/build/tidegate-cni"


class Stream:
    """As kubernetes.stream's, of a process of this machine."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.sock = SimpleNamespace(sock=self.process.stdout)
        self._channels = {OUT: b"", ERR: b""}
        self._open = True

    def is_open(self) -> bool:
        return self._open

    def update(self, timeout: float) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        data = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        if not data:
            self._open = False
            self._channels[ERR] += self.process.stderr.read()
        self._channels[OUT] += data

    def read_channel(self, channel: int) -> bytes:
        found, self._channels[channel] = self._channels[channel], b""
        return found

    def write_stdin(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


class Cluster:
    """Of ClusterState what is asked: nodes, their pods, and exec in them."""

    def __init__(self, directory: Path) -> None:
        self.api = self
        self.directory = directory
        self.observers = {"n1": "running", "n2": "running", "n3": "waiting"}
        self.streams: list[Stream] = []
        self.refuses = False

    def nodes(self, only: str | None) -> list[str]:
        return [only] if only else [*self.observers, "n4"]

    def loader_pods(self) -> list[LoaderPod]:
        return [
            LoaderPod("tidegate-system", f"pod-{node}", node, True, "", state)
            for node, state in self.observers.items()
        ]

    def begin(self, namespace: str, pod: str, container: str, command: list[str]) -> Any:
        assert (namespace, container, command) == ("tidegate-system", "observer", flows.PIPE)
        if self.refuses:
            raise CliError(f"cannot run a command in pod {namespace}/{pod}: Forbidden")
        made = Stream([str(PIPE), "pipe", str(self.directory / pod.removeprefix("pod-"))])
        self.streams.append(made)
        return made


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Cluster, dict[str, History]]]:
    histories = {name: History(100) for name in ("n1", "n2")}
    servers = {
        name: Server(ObserverService(held, About((name,), "t")), [f"unix:{tmp_path}/{name}"])
        for name, held in histories.items()
    }
    with servers["n1"], servers["n2"]:
        yield Cluster(tmp_path), histories
        for held in histories.values():
            held.close()


def seconds(answers: list[observer_pb2.GetFlowsResponse]) -> list[int]:
    return [a.time.seconds for a in answers if a.HasField("flow")]


def add(histories: dict[str, History], node: str, *times: int) -> None:
    histories[node].extend(flow(node=node, time=t * SECOND) for t in times)


def test_all_nodes_are_one_and_who_does_not_answer_is_named(
    cluster: tuple[Cluster, dict[str, History]],
) -> None:
    state, histories = cluster
    add(histories, "n1", 1, 4)
    add(histories, "n2", 2, 3)
    request = observer_pb2.GetFlowsRequest(number=10)
    with Observers(state) as found:  # type: ignore[arg-type]
        answers = list(merged(found.peers, request, lambda: True, found.connect))
    assert seconds(answers) == [1, 2, 3, 4]
    said = {a.node_status.node_names[0]: a.node_status.message for a in answers[4:]}
    assert said == {
        "n3": "the observer in pod tidegate-system/pod-n3 is waiting",
        "n4": "no pod of Tidegate's is there",
    }
    # Nothing is left of the processes in the pods.
    for stream in state.streams:
        assert stream.process.wait(20) == 0


def test_what_comes_is_followed_and_a_node_may_come_later(
    cluster: tuple[Cluster, dict[str, History]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, histories = cluster
    monkeypatch.setattr(flows, "FRESH_SECONDS", 0.0)
    state.observers["n2"] = "waiting"
    request = observer_pb2.GetFlowsRequest(follow=True)
    now = time.time_ns() // SECOND

    def active() -> bool:
        # When a call has reached its node is not to be seen from here.
        add(histories, "n2", now)
        return True

    with Observers(state) as found:  # type: ignore[arg-type]
        stream = merged(found.peers, request, active, found.connect)
        said: dict[str, int] = {}
        while said.keys() != {"n1", "n2", "n3", "n4"}:
            status = next(stream).node_status
            said[status.node_names[0]] = status.state_change
        assert said == {"n1": 1, "n2": 2, "n3": 2, "n4": 2}
        state.observers["n2"] = "running"
        status = next(stream).node_status
        assert (status.node_names, status.state_change) == (["n2"], 1)
        assert next(stream).flow.node_name == "n2"
        stream.close()


def test_a_refusal_is_told_as_it_was(
    cluster: tuple[Cluster, dict[str, History]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = cluster
    monkeypatch.setattr(flows, "READY_SECONDS", 0.1)
    state.refuses = True
    with (
        Observers(state, "n1") as found,  # type: ignore[arg-type]
        found.connect("n1") as client,
        pytest.raises(ObserverError, match="pod-n1: Forbidden"),
    ):
        client.wait_ready(1.0)


def test_the_pipe_says_why_it_cannot(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path / ("x" * 200), "too long")):
        done = subprocess.run([PIPE, "pipe", path], capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        assert why in done.stderr
        assert done.stdout == ""
