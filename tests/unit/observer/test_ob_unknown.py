"""Flows of addresses that nobody knows, by the ten thousand: what the observer holds of them and
does for them is bounded.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tidegate_bpf import Codec, ObjectFile
from tidegate_observer import rundir
from tidegate_observer.history import History
from tidegate_observer.metrics import Metrics
from tidegate_observer.policylog import PolicyLog, Settings
from tidegate_observer.records import Denials, Flows
from tidegate_observer.rundir import RunDirSource

SPEC = ObjectFile(Path(__file__).parents[3] / "datapath" / "build" / "pod.o")
ROUND = 2000
MAPPED = bytes(10) + b"\xff\xff"


def records(struct_name: str, first: int) -> bytes:
    """Of ROUND other addresses each, of identities that are nobody's."""
    codec = Codec(SPEC.layout(struct_name))
    plain: dict[str, Any] = dict.fromkeys(codec.names, 0)
    plain |= {name: bytes(16) for name in ("src", "dst", "frontend") if name in plain}
    plain |= {"src_identity": 300, "dst_identity": 400, "protocol": 6, "sport": 1, "dport": 2}
    plain |= {name: 133 for name in ("reason",) if name in plain}
    row = bytearray(bytes(8) + codec.pack(**plain))
    places = {f.name: 8 + f.offset for f in SPEC.layout(struct_name).fields}
    rows = []
    for number in range(first, first + ROUND):
        for name in ("src", "dst"):
            row[places[name] : places[name] + 16] = MAPPED + struct.pack(">I", 0x0A000000 + number)
        rows.append(bytes(row))
    return b"".join(rows)


def test_memory_stays_flat(tmp_path: Path) -> None:
    source = RunDirSource(tmp_path, "node-1")
    flows, denials = Flows(SPEC, "node-1", 1000), Denials(SPEC, "node-1")
    kept, figures = History(1000), Metrics()
    log = PolicyLog(Settings(target=str(tmp_path / "log"), max_aggregated=100))

    def feed(first: int) -> None:
        for name, reader in (("tg_flow_event", flows), ("tg_event", denials)):
            found = reader.flows(records(name, first), 0, source.directory)
            kept.extend(found)
            figures.add(found)
            log.add(found, 0.0)

    for at in range(0, 3 * ROUND, ROUND):  # every table is as full as it gets
        feed(at)
    tracemalloc.start()
    try:
        feed(3 * ROUND)
        before = tracemalloc.get_traced_memory()[0]
        for at in range(4 * ROUND, 8 * ROUND, ROUND):
            feed(at)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # 16,000 more were looked at: a hundred bytes of each would be more than this.
    assert after - before < 1 << 20
    assert len(source._unknown) <= rundir.MAX_UNKNOWN
    assert kept.held == 1000


def test_strangers_make_nobody_read_files_over_and_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RunDirSource(tmp_path, "node-1")
    reads = []
    monkeypatch.setattr(source, "refresh", lambda: reads.append(time.monotonic()))
    flows = Flows(SPEC, "node-1")
    data = records("tg_flow_event", 0)
    began = time.monotonic()
    assert len(flows.flows(data, 0, source.directory)) == ROUND
    took = time.monotonic() - began
    patience = rundir.WAIT_SECONDS["address"] * (1 + took / rundir.UNKNOWN_SECONDS)
    assert len(reads) <= patience / rundir.STEP_SECONDS + took / rundir.REREAD_SECONDS + 2


def test_a_name_is_not_waited_for_while_records_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RunDirSource(tmp_path, "node-1")
    asked: list[int] = []

    def pressed() -> bool:
        asked.append(1)
        return len(asked) > 3

    monkeypatch.setattr(source, "hurry", pressed)
    assert source.directory.decision(9, 0) is None
    assert len(asked) == 4, "it waited on"
