"""What is taken from the rings is kept, whatever fails beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from tidegate_bpf import BpfError, ObjectFile
from tidegate_observer.collector import RETRY_SECONDS, Collector, Reader
from tidegate_observer.flow import Flow, Kind, address_bytes
from tidegate_observer.history import History
from tidegate_observer.metrics import Metrics
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
