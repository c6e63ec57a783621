"""Who really reaches whom, beside what the model says.

Opens real connections from every pod to every pod's declared ports and to every
service, from inside the pods. Decides no verdict: the model's answers come from
`model`, and a cell that differs is printed, never explained away.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from msgspec import UNSET
from tidegate_api.state import ServicePort

from tidegate_cli import model, objects, prober
from tidegate_cli.prober import Result
from tidegate_cli.standalone import enter
from tidegate_cli.standalone.errors import StandaloneError
from tidegate_cli.standalone.rundir import Pod, RunDir

# A cell that the model allows and nobody answered is asked once more, with more
# time: a busy machine is no policy. A denied cell is never asked twice.
SECOND_ASK_FACTOR = 3.0
# Beyond the probes' own time: forking, joining namespaces, a busy machine.
GRACE_SECONDS = 15.0
DEFAULT_WIDTH = 120


class Judge(Protocol):
    """The model: may `source` open a flow to `address`, which is a pod's or a
    node's and no service's? None: it cannot say."""

    def __call__(self, source: Pod, address: str, port: int, protocol: str) -> bool | None: ...


@dataclass(frozen=True)
class Destination:
    """One column. `backends`: address, port and pod of who may answer; a pod's
    own port has one."""

    name: str
    family: int
    address: str
    port: int
    protocol: str
    backends: tuple[tuple[str, int, str], ...]
    handshake: bool

    @property
    def label(self) -> str:
        return f"{self.name}:{self.port}/{self.protocol}"


@dataclass(frozen=True)
class Cell:
    source: str
    destination: Destination
    reached: bool
    expected: bool | None
    """None: it depends on the backend chosen, or the model cannot say."""
    answer: str
    """Who answered, or what happened instead."""

    @property
    def differs(self) -> bool:
        return self.expected is not None and self.expected != self.reached


def of_cluster(
    run_dir: Path, families: Sequence[int], seconds: float, node: str | None = None
) -> list[Cell]:
    """Measures the cluster that is up; with `node`, from its pods. Raises StandaloneError,
    CliError."""
    state, run = RunDir.at(run_dir).require(), objects.RunObjects(run_dir)
    sources = state.pods if node is None else on(state.pods, run.nodes(node))
    desired = model.Model.from_objects(run.all())
    columns = [
        column
        for family in families
        for column in destinations(state.pods, desired.services, family)
    ]
    nodes = {address: node.name for node in state.nodes for address in node.addresses}
    return measure(sources, columns, judge_by(desired, state.pods, nodes), seconds)


def on(pods: Sequence[Pod], nodes: Sequence[str]) -> list[Pod]:
    return [pod for pod in pods if pod.node in nodes]


def judge_by(desired: model.Model, pods: Sequence[Pod], nodes: Mapping[str, str]) -> Judge:
    """The model's verdicts. `nodes`: address of a node → its name."""
    node_of = {address: pod.node for pod in pods for address in pod.addresses} | dict(nodes)

    def judge(source: Pod, address: str, port: int, protocol: str) -> bool | None:
        own = address_of(source.addresses, 6 if ":" in address else 4)
        if own is None:
            return None
        from_host = source.host_network and node_of.get(address) == source.node
        try:
            verdict = desired.verdict(own, address, port, protocol, from_host=from_host)
        except model.ModelError:
            return None
        return verdict.allowed

    return judge


def address_of(addresses: Sequence[str], family: int) -> str | None:
    """The first of the family."""
    return next((address for address in addresses if (":" in address) == (family == 6)), None)


def destinations(
    pods: Sequence[Pod], services: Mapping[str, Sequence[ServicePort]], family: int
) -> list[Destination]:
    """The columns of one family: pods' ports, then services' (`services`:
    "namespace/name" -> ServicePorts). SCTP has no sockets here and no column."""
    found = []
    owners = {
        (address, port.port, port.protocol): pod
        for pod in pods
        for address in pod.addresses
        for port in pod.ports
    }
    for pod in sorted(pods, key=lambda pod: pod.key):
        address = address_of(pod.addresses, family)
        for port in pod.ports if address else ():
            if port.protocol != "SCTP" and address:
                backends = ((address, port.port, pod.key),)
                found.append(
                    Destination(
                        pod.key,
                        family,
                        address,
                        port.port,
                        port.protocol,
                        backends,
                        bool(pod.command),
                    )
                )
    for name, entries in sorted(services.items()):
        for entry in entries:
            for front in entry.frontends:
                if front.kind is not UNSET:  # only ClusterIPs
                    continue
                if front.protocol == "SCTP" or (":" in front.address) != (family == 6):
                    continue
                behind = [
                    (b, owners.get((b.address, b.port, front.protocol))) for b in entry.backends
                ]
                found.append(
                    Destination(
                        f"svc {name}",
                        family,
                        front.address,
                        front.port,
                        front.protocol,
                        tuple((b.address, b.port, pod.key if pod else "") for b, pod in behind),
                        any(pod is None or pod.command for _, pod in behind),
                    )
                )
    return found


Rows = Sequence[tuple[Pod, Sequence[Destination]]]
"""Each source with what it is to ask."""


class Prober(Protocol):
    """Every row's results, in order; each probe has `seconds`."""

    def __call__(self, rows: Rows, seconds: float) -> list[list[Result]]: ...


# ---- measuring ------------------------------------------------------------------


def measure(
    sources: Sequence[Pod],
    columns: Sequence[Destination],
    judge: Judge,
    seconds: float,
    probe: Prober | None = None,
) -> list[Cell]:
    """Row by row; `probe` asks (default: from inside pods of this machine). Raises
    StandaloneError where a pod cannot be entered."""
    probe = probe or probe_forked
    rows = sorted(sources, key=lambda pod: pod.key)
    # A pod without an address of the family has nothing to ask from.
    asked = [
        [column for column in columns if address_of(pod.addresses, column.family)] for pod in rows
    ]
    cells = _ask(list(zip(rows, asked, strict=True)), judge, seconds, probe)
    again = [
        (pod, [cell.destination for cell in row if cell.differs and cell.expected])
        for pod, row in zip(rows, cells, strict=True)
    ]
    if any(wanted for _, wanted in again):
        second = _ask(again, judge, seconds * SECOND_ASK_FACTOR, probe)
        for row, newer in zip(cells, second, strict=True):
            answers = {cell.destination: cell for cell in newer}
            row[:] = [answers.get(cell.destination, cell) for cell in row]
    return [cell for row in cells for cell in row]


def _ask(rows: Rows, judge: Judge, seconds: float, probe: Prober) -> list[list[Cell]]:
    results = probe(rows, seconds)
    return [
        [cell_of(pod, column, result, judge) for column, result in zip(columns, row, strict=True)]
        for (pod, columns), row in zip(rows, results, strict=True)
    ]


def cell_of(pod: Pod, column: Destination, result: Result, judge: Judge) -> Cell:
    verdicts = {judge(pod, address, port, column.protocol) for address, port, _ in column.backends}
    expected = verdicts.pop() if len(verdicts) == 1 else None if verdicts else False
    answerers = {name for _, _, name in column.backends}
    reached = result.pod in answerers if result.pod else result.detail == prober.CONNECTED
    answer = result.pod or result.detail
    if result.pod and not reached:
        answer = f"{result.pod}, which is none of its pods"
    return Cell(pod.key, column, reached, expected, answer)


def probe_forked(rows: Rows, seconds: float) -> list[list[Result]]:
    """One forked process a row, all at once. Raises StandaloneError."""
    buffers: dict[int, bytearray] = {}
    pids: dict[int, int] = {}
    most = max((len(columns) for _, columns in rows), default=0)
    deadline = time.monotonic() + bound(most, seconds)
    try:
        with selectors.DefaultSelector() as selector:
            for index, (pod, columns) in enumerate(rows):
                read, pids[index] = _fork(pod, columns, seconds)
                buffers[index] = bytearray()
                selector.register(read, selectors.EVENT_READ, index)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise StandaloneError("the probes did not end in time: is the machine busy?")
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    buffers[key.data] += data
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
    finally:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [_results(pod, bytes(buffers[i]), len(columns)) for i, (pod, columns) in enumerate(rows)]


def bound(probes: int, seconds: float) -> float:
    """Seconds that so many probes of one row take at the most."""
    return (probes // prober.MAX_OPEN + 1) * seconds + GRACE_SECONDS


def _fork(pod: Pod, columns: Sequence[Destination], seconds: float) -> tuple[int, int]:
    """The pipe to read from, and the pid."""
    probes = [
        prober.Probe(column.address, column.port, column.protocol, column.handshake)
        for column in columns
    ]
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return read, pid
    code = 1
    try:
        with open(write, "wb") as pipe:
            try:
                enter.enter(Path(pod.netns), Path(pod.cgroup))
                results = prober.run(probes, seconds)
                answer: Any = [[result.pod, result.detail] for result in results]
            except OSError as error:
                answer = str(error)
            pipe.write(json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def _results(pod: Pod, data: bytes, count: int) -> list[Result]:
    answer = json.loads(data) if data else "the prober ended without an answer"
    if isinstance(answer, str) or len(answer) != count:
        raise StandaloneError(f"cannot ask from {pod.key}: {answer}")
    return [Result(name, detail) for name, detail in answer]


# ---- printing -------------------------------------------------------------------


def render(cells: Sequence[Cell], output: str) -> str:
    if output == "table":
        return _tables(cells)
    data = {
        "cells": [
            {
                "source": cell.source,
                "destination": cell.destination.name,
                "family": cell.destination.family,
                "address": cell.destination.address,
                "port": cell.destination.port,
                "protocol": cell.destination.protocol,
                "reached": cell.reached,
                "expected": cell.expected,
                "answer": cell.answer,
            }
            for cell in cells
        ],
        "differences": sum(cell.differs for cell in cells),
    }
    if output == "json":
        return json.dumps(data, indent=2)
    text: str = yaml.safe_dump(data, sort_keys=False)
    return text.rstrip()


def _tables(cells: Sequence[Cell]) -> str:
    width = shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    lines: list[str] = []
    for family in sorted({cell.destination.family for cell in cells}):
        lines += _table([cell for cell in cells if cell.destination.family == family], width)
    different = [cell for cell in cells if cell.differs]
    lines += [_difference(cell) for cell in different]
    reached = sum(cell.reached for cell in cells)
    verdict = f"{len(different)} differ from the model" if different else "all as the model says"
    lines.append(f"{len(cells)} cells: {reached} reached, {len(cells) - reached} not; {verdict}")
    return "\n".join(lines)


def _table(cells: Sequence[Cell], width: int) -> list[str]:
    """A legend of numbered destinations, then the marks, in as many blocks of
    columns as the terminal needs."""
    columns = list(dict.fromkeys(cell.destination for cell in cells))
    by_place = {(cell.source, cell.destination): cell for cell in cells}
    sources = list(dict.fromkeys(cell.source for cell in cells))
    name = max(map(len, sources))
    column = max(2, len(str(len(columns)))) + 1
    lines = [f"IPv{columns[0].family}: `.` the right pod answered, `X` it did not", ""]
    lines += [
        f"{number:>4}  {destination.label}  {destination.address}"
        for number, destination in enumerate(columns, 1)
    ]
    per_block = max(1, (width - name) // column)
    for start in range(0, len(columns), per_block):
        block = columns[start : start + per_block]
        numbers = range(start + 1, start + len(block) + 1)
        lines += ["", _row("", name, [f"{number} " for number in numbers], column)]
        for source in sources:
            marks = [mark(by_place.get((source, destination))) for destination in block]
            lines.append(_row(source, name, marks, column))
    return [*lines, ""]


def _row(name: str, name_width: int, marks: Sequence[str], width: int) -> str:
    return (
        f"{name:<{name_width}}" + "".join(f"{text:>{width + 1}}"[1:] for text in marks)
    ).rstrip()


def mark(cell: Cell | None) -> str:
    """Two characters: the answer, and whether the model says otherwise."""
    if cell is None:
        return "  "
    return ("." if cell.reached else "X") + ("!" if cell.differs else " ")


def _difference(cell: Cell) -> str:
    says = "allows" if cell.expected else "denies"
    where = f"{cell.destination.label} ({cell.destination.address})"
    did = f"{cell.answer} answered" if cell.reached else cell.answer
    return f"! {cell.source} -> {where}: the model {says} it, but: {did}"
