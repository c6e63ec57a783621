"""Who reaches whom: real connections from every pod and node, against the oracle.

The oracle reads the very objects that the API server holds. It shares no code with Tidegate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from support import oracle

from rig import api
from rig.asking import ANSWER_SECONDS, Answer, Asker, Askers, Question
from rig.pods import Pod, running

# A busy machine may be late with an answer that policy allows: asked again, with more patience.
PATIENT_SECONDS = 5.0
SETTLE_ROUNDS = 20


@dataclass(frozen=True)
class Target:
    """One column: a port of one pod, at one of its addresses."""

    pod: Pod
    address: str
    port: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.pod.key} {self.address} {self.protocol}:{self.port}"


@dataclass(frozen=True)
class Cell:
    source: str
    target: Target
    allowed: bool
    """By the oracle."""
    answer: Answer

    @property
    def reached(self) -> bool:
        return self.answer.pod == self.target.pod.key

    @property
    def differs(self) -> bool:
        # Somebody else's answer is wrong whatever policy says.
        return self.reached != self.allowed or bool(self.answer.pod and not self.reached)


def judge() -> oracle.Oracle:
    """The oracle for what the API server holds now."""
    found: dict[str, Any] = {
        kind: api.items(kind) for kind in ("namespaces", "pods", "networkpolicies")
    }
    pods = [p for p in found["pods"] if p["status"].get("podIPs")]
    return oracle.Oracle(
        {
            "namespaces": found["namespaces"],
            "pods": pods,
            "policies": found["networkpolicies"],
            "addresses": {_key(p): [a["ip"] for a in p["status"]["podIPs"]] for p in pods},
            "nodes": {_key(p): p["spec"]["nodeName"] for p in pods},
        }
    )


def targets(pods: Iterable[Pod], ports: Sequence[str]) -> list[Target]:
    """Every port ("TCP:80") at every address of every pod."""
    return [
        Target(pod, address, int(port.split(":")[1]), port.split(":")[0])
        for pod in pods
        for address in pod.addresses
        for port in ports
    ]


def measure(
    askers: Askers, sources: Sequence[Pod], columns: Sequence[Target], by: oracle.Oracle
) -> list[Cell]:
    """Every source's answers from every target, with what the oracle says."""

    def row(source: Pod) -> list[Cell]:
        asker = askers.of(source)
        # An address of another family than any of its own cannot be asked.
        reachable = [
            c for c in columns if any((":" in a) == (":" in c.address) for a in source.addresses)
        ]
        answers = _ask(asker, reachable, ANSWER_SECONDS)
        cells = [
            Cell(source.key, column, _allows(by, source, column), answer)
            for column, answer in zip(reachable, answers, strict=True)
        ]
        late = [i for i, cell in enumerate(cells) if cell.allowed and not cell.reached]
        again = _ask(asker, [cells[i].target for i in late], PATIENT_SECONDS)
        for i, answer in zip(late, again, strict=True):
            cells[i] = Cell(source.key, cells[i].target, True, answer)
        return cells

    for source in sources:
        askers.of(source)
    with ThreadPoolExecutor(len(sources)) as pool:
        return [cell for cells in pool.map(row, sources) for cell in cells]


def settle(
    askers: Askers, sources: Sequence[Pod], columns: Sequence[Target], by: oracle.Oracle
) -> list[Cell]:
    """Measures until nothing differs, or until enough rounds have; then once more.

    A policy takes a moment to reach the nodes; how long is not asked here."""
    for _ in range(SETTLE_ROUNDS):
        if not any(cell.differs for cell in measure(askers, sources, columns, by)):
            break
    return measure(askers, sources, columns, by)


def table(cells: Sequence[Cell]) -> str:
    """`.` reached, `X` not, `!` not as the oracle says; then the differences in words."""
    columns = list(dict.fromkeys(cell.target for cell in cells))
    by_place = {(cell.source, cell.target): cell for cell in cells}
    sources = list(dict.fromkeys(cell.source for cell in cells))
    width = max(map(len, sources), default=0)
    lines = [f"{n:>4} {column}" for n, column in enumerate(columns, 1)]
    for source in sources:
        marks = (_mark(by_place.get((source, column))) for column in columns)
        lines.append(f"{source:<{width}} {''.join(marks)}")
    for cell in cells:
        if cell.differs:
            should = "should reach" if cell.allowed else "must not reach"
            got = cell.answer.pod or cell.answer.detail
            lines.append(f"{cell.source} {should} {cell.target}: {got}")
    return "\n".join(lines)


def _mark(cell: Cell | None) -> str:
    if cell is None:
        return " "
    return "!" if cell.differs else "." if cell.reached else "X"


def _allows(by: oracle.Oracle, source: Pod, target: Target) -> bool:
    here = oracle.Pod(source.namespace, source.name, 6 if ":" in target.address else 4)
    there = oracle.Pod(target.pod.namespace, target.pod.name)
    return by.verdict(here, there, target.port, target.protocol).allowed


def _ask(asker: Asker, columns: Sequence[Target], seconds: float) -> list[Answer]:
    return asker.ask([Question(c.address, c.port, c.protocol, seconds=seconds) for c in columns])


def _key(item: Any) -> str:
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"


def pods_of(*namespaces: str) -> list[Pod]:
    """Running pods of these namespaces that have a network of their own, by name."""
    found = [pod for n in namespaces for pod in running(n).values() if not pod.host_network]
    return sorted(found, key=lambda pod: pod.key)
