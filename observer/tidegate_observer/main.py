"""The observer's process: reads the rings, joins, keeps the last flows and serves them."""

from __future__ import annotations

import argparse
import secrets
import signal
import struct
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import structlog
from tidegate_bpf import BpfError, LayoutError, Map, ObjectFile

from tidegate_observer import history, rings
from tidegate_observer.flow import Entry, Lost
from tidegate_observer.records import Denials, Flows
from tidegate_observer.rundir import RunDirSource
from tidegate_observer.server import About, ObserverService, Server
from tidegate_observer.tracked import MAX_LIVE, Tracked

POLL_SECONDS = 0.05
"""Programs wake nobody: a flood of denials must not buy CPU time."""
REFRESH_SECONDS = 1.0
RETRY_SECONDS = 1.0
LOST_REASON = 254
"""TG_REASON_EVENT_LOST: records that found a ring full, counted by the programs."""
COUNTER = struct.Struct("=QQ")
MAX_HISTORY = 1 << 20

log = structlog.get_logger()


class Reader:
    """One node's rings, its counters of losses, and who is who on it."""

    def __init__(self, spec: ObjectFile, node: str, pins: Path, source: RunDirSource) -> None:
        self.node = node
        self.source = source
        flows = Flows(spec, node, MAX_LIVE)
        self._sources = [
            (records, rings.Ring(pins / "maps" / name, records.size))
            for name, records in (("events_v1", Denials(spec, node)), ("flows_v1", flows))
        ]
        self._tracked = Tracked(spec, node, pins, flows.live)
        self._metrics = pins / "maps" / "metrics_v1"
        self._lost: int | None = None
        self._looked = time.time_ns()
        self._due = 0.0

    def read(self, offset: int) -> list[Entry]:
        """Everything that has come since; `offset` from the kernel's clock to the time of day, in
        nanoseconds. BpfError."""
        found: list[Entry] = []
        if time.monotonic() >= self._due:
            for _, ring in self._sources:
                ring.reopen()
            self.source.refresh()
            lost = self._losses()
            if lost is not None:
                found.append(lost)
            self._due = time.monotonic() + REFRESH_SECONDS
        for records, ring in self._sources:
            data = ring.read()
            if data:
                found += records.flows(data, offset, self.source.directory)
        if self._sources[1][1].open:
            found += self._tracked.sweep(offset)
        return found

    def _losses(self) -> Lost | None:
        """What the programs could not send since this was asked last."""
        try:
            with Map.open_pinned(str(self._metrics)) as counters:
                total = sum(
                    COUNTER.unpack(row)[0]
                    for index in (LOST_REASON * 2, LOST_REASON * 2 + 1)
                    for row in counters.split_per_cpu(
                        counters.lookup(index.to_bytes(4, sys.byteorder))
                    )
                )
        except (BpfError, KeyError):
            return None
        before, self._lost = self._lost, total
        first, self._looked = self._looked, time.time_ns()
        if before is None or total <= before:
            return None
        log.warning("events lost", node=self.node, count=total - before)
        return Lost(self.node, self._looked, total - before, first)

    def close(self) -> None:
        for _, ring in self._sources:
            ring.close()


class Collector:
    """Every node's events into one history, in the order of time."""

    def __init__(self, readers: Sequence[Reader], kept: history.History) -> None:
        self._readers = readers
        self._history = kept

    def step(self) -> float:
        """Seconds to wait until the next one."""
        offset = time.time_ns() - time.monotonic_ns()
        found: list[Entry] = []
        pause = POLL_SECONDS
        for reader in self._readers:
            try:
                found += reader.read(offset)
            except (BpfError, ValueError) as error:
                log.warning("cannot read", node=reader.node, error=str(error))
                pause = RETRY_SECONDS
        if found:
            found.sort(key=_time)
            self._history.extend(found)
        return pause

    def namespaces(self) -> list[str]:
        """Of every pod that is known."""
        ends = [end for r in self._readers for end in list(r.source.directory.addresses.values())]
        return sorted({end.namespace for end in ends if end.pod})

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _time(entry: Entry) -> int:
    return entry.time


def own_version() -> str:
    try:
        return f"tidegate {version('tidegate')}"
    except PackageNotFoundError:
        return "tidegate (from a source tree)"


def run(args: argparse.Namespace, stop: threading.Event) -> int:
    """Exit code."""
    spec = ObjectFile(args.objects / "pod.o")
    kept = history.History(args.flows)
    readers = [
        Reader(spec, node, pins, RunDirSource(args.run_dir, node, args.state))
        for node, pins in args.node
    ]
    collector = Collector(readers, kept)
    about = About(
        nodes=tuple(reader.node for reader in readers),
        version=own_version(),
        address=args.listen or f"unix:{args.socket}",
        namespaces=collector.namespaces,
        instance=secrets.randbits(64),
    )
    service = ObserverService(kept, about)
    addresses = [f"unix:{args.socket}", *([args.listen] if args.listen else [])]
    with rings.locked(args.socket.with_suffix(".lock")) as alone:
        if not alone:
            log.error("another observer reads these rings", socket=str(args.socket))
            return 1
        try:
            with Server(service, addresses):
                log.info("serving", addresses=addresses, nodes=about.nodes)
                pause = 0.0
                while not stop.wait(pause):
                    pause = collector.step()
                    service.cut_stuck()
                kept.close()
        finally:
            collector.close()
            args.socket.unlink(missing_ok=True)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate-observer", description="Show what flows on a node, as Hubble's API has it."
    )
    add = made.add_argument
    add(
        "--node",
        type=_node,
        action="append",
        required=True,
        metavar="NAME=PINS",
        help="a node and its loader's pins; several, if they are on one machine",
    )
    add("--run-dir", type=Path, required=True, help="where supervisor.json and nodes/ are")
    add("--state", type=Path, help="where the objects in force are (default: RUN_DIR/objects)")
    add("--objects", type=Path, required=True, help="where pod.o is")
    add("--socket", type=Path, required=True, help="Unix socket to serve on")
    add("--listen", default="", metavar="HOST:PORT", help="serve there, too")
    add(
        "--flows",
        type=_flows,
        default=history.DEFAULT_SIZE,
        metavar="N",
        help=f"how many flows are held (default: {history.DEFAULT_SIZE})",
    )
    return made


def _node(text: str) -> tuple[str, Path]:
    name, equals, pins = text.partition("=")
    if not (name and equals and pins):
        raise argparse.ArgumentTypeError("is NAME=PINS")
    return name, Path(pins)


def _flows(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_HISTORY:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_HISTORY}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        return run(args, stop)
    except (BpfError, LayoutError, OSError) as error:
        log.error("cannot go on", error=str(error))
        return 1
