"""What is taken from the rings is kept, whatever fails beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tidegate_bpf import BpfError, ObjectFile
from tidegate_observer.collector import RETRY_SECONDS, RINGS, Collector, Reader
from tidegate_observer.flow import Flow, Kind, Lost, address_bytes
from tidegate_observer.history import History
from tidegate_observer.metrics import Metrics
from tidegate_observer.rings import Place
from tidegate_observer.rundir import RunDirSource
from unit.observer.test_ob_records import record

SPEC = ObjectFile(Path(__file__).parents[3] / "datapath" / "build" / "pod.o")
ENDS = {"src": address_bytes("10.0.0.1"), "dst": address_bytes("10.0.0.2"), "protocol": 6}


class Drained:
    """Rings that gave one record each, or a failure."""

    def __init__(self, *given: bytes | Exception) -> None:
        self.given = list(given)
        self.more = False
        self.through = 7
        self.taken: list[Place | None] = [None] * len(RINGS)

    def reopen(self) -> None:
        pass

    def take(self, number: int) -> bytes:
        found, self.given[number] = self.given[number], b""
        if isinstance(found, Exception):
            raise found
        return found


def failing(*_: Any, **__: Any) -> Any:
    raise BpfError(5, "torn")


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(SPEC, "n", tmp_path, RunDirSource(tmp_path, "n"), tmp_path / "lost")


DENIAL, START = record("tg_event", **ENDS), record("tg_flow_event", **ENDS)
TORN = ValueError("torn")
ROWS: list[tuple[str, tuple[bytes | Exception, ...], tuple[str, ...], list[Kind]]] = [
    ("nothing fails", (DENIAL, START, b""), (), [Kind.DENIED, Kind.START]),
    ("a ring after it", (DENIAL, TORN, b""), (), [Kind.DENIED]),
    ("a ring before it", (TORN, START, b""), (), [Kind.START]),
    ("the look at floods", (DENIAL, START, b""), ("limits",), [Kind.DENIED, Kind.START]),
    ("the look at tracked flows", (DENIAL, START, b""), ("tracked",), [Kind.DENIED, Kind.START]),
]


@pytest.mark.parametrize(("reason", "given", "broken", "expected"), ROWS, ids=[r[0] for r in ROWS])
def test_what_was_taken_is_kept(
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    given: tuple[bytes | Exception, ...],
    broken: tuple[str, ...],
    expected: list[Kind],
) -> None:
    monkeypatch.setattr(reader, "drain", Drained(*given))
    # As if the ring of flows were open.
    monkeypatch.setattr(reader._rings[1], "_ring", object())
    monkeypatch.setattr(reader.tracked, "sweep", lambda _offset: [])
    for name in broken:
        monkeypatch.setattr(getattr(reader, name), "sweep", failing)
    history = History(10)
    with capture_logs() as logs:
        pause = Collector([reader], history, Metrics()).step()
    kept = history.slice(0, 9)[1]
    assert [entry.kind if isinstance(entry, Flow) else None for entry in kept] == expected
    fails = bool(broken) or TORN in given
    assert [line["event"] for line in logs].count("cannot read") == fails
    assert (pause == RETRY_SECONDS) == fails


class Ring:
    """Of flows: holds what nobody has read, and says how far it was read."""

    open = True
    begun: Place | None = None

    def __init__(self, held: bytes = b"") -> None:
        self.place = Place(4, 0)
        self.held = held

    def reopen(self) -> None:
        self.begun = self.place

    def read(self) -> bytes:
        found, self.held = self.held, b""
        self.place = Place(4, self.place.bytes + len(found))
        return found

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("told", "expected"), [(False, 3), (True, 0)])
def test_what_was_read_and_not_told_is_said_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool, expected: int
) -> None:
    """An observer is killed with records in its memory, which are in no ring any more."""
    monkeypatch.setattr("tidegate_observer.rings.Drain._run", lambda _self: None)
    ring = Ring()

    def observer() -> tuple[Reader, History]:
        made = Reader(SPEC, "n", tmp_path, RunDirSource(tmp_path, "n"), tmp_path / "lost")
        made._rings[1] = made.drain._rings[1] = ring  # type: ignore[assignment, call-overload]
        monkeypatch.setattr(made.tracked, "sweep", lambda _offset: [])
        history = History(10)
        Collector([made], history, Metrics()).step()
        return made, history

    killed, history = observer()
    assert history.added == 0
    ring.held = START * 3
    killed.drain.read()
    if told:
        Collector([killed], history, Metrics()).step()
        assert history.seen == 3
    ring.held = START
    _, history = observer()
    lost = [entry for entry in history.slice(0, 9)[1] if isinstance(entry, Lost)]
    assert [(entry.count, entry.queued) for entry in lost] == [(3, True)] * (not told)
    assert sum(entry.count for entry in lost) == expected
