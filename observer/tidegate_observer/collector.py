"""From the kernel's rings to the history, the figures and the policy log. No serving here."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import structlog
from tidegate_bpf import BpfError, Map, ObjectFile

from tidegate_observer import agent, carried, rings, standing
from tidegate_observer.flow import Entry, Flow, Lost
from tidegate_observer.history import History
from tidegate_observer.limits import Limits
from tidegate_observer.metrics import Metrics
from tidegate_observer.policylog import PolicyLog
from tidegate_observer.pressure import Pressure
from tidegate_observer.processes import Processes
from tidegate_observer.progress import Progress
from tidegate_observer.records import Denials, Flows, Traces
from tidegate_observer.rundir import RunDirSource
from tidegate_observer.tracked import MAX_LIVE, Tracked

RINGS = ("events_v1", "flows_v1", "traces_v1")
POLL_SECONDS = 0.05
"""Programs wake nobody: a flood of denials must not buy CPU time."""
REFRESH_SECONDS = 1.0
COUNT_SECONDS = 5.0
RETRY_SECONDS = 1.0
LOST_REASON = 254
"""TG_REASON_EVENT_LOST: records that found a ring full, counted by the programs."""
COUNTER = struct.Struct("=QQ")

log = structlog.get_logger()


class Reader:
    """One node's rings, its counters of losses, and who is who on it."""

    def __init__(
        self, spec: ObjectFile, node: str, pins: Path, source: RunDirSource, memory: Path
    ) -> None:
        """`memory`: a file that outlives this process, so that the next one tells what was lost
        while there was none."""
        self.node = node
        self._memory = memory
        self.source = source
        processes = Processes(spec, pins)
        flows = Flows(spec, node, MAX_LIVE, processes)
        self.limits = Limits(spec, node, pins)
        denials = Denials(spec, node, self.limits.seen, processes)
        self._records: list[Denials | Flows | Traces] = [denials, flows, Traces(spec, node)]
        self._rings = [
            rings.Ring(pins / "maps" / name, records.size)
            for name, records in zip(RINGS, self._records, strict=True)
        ]
        self.drain = rings.Drain(self._rings, processes.read)
        source.hurry = self.drain.pressed
        self.pressure = Pressure(spec, pins)
        self.tracked = Tracked(spec, node, pins, flows.live)
        self._progress = Progress(memory.with_name(f"told-{node}"), len(RINGS))
        self._carried = carried.Carried(memory.with_name(carried.file_name(node)))
        self._watch = agent.Watch(node)
        self.changed: list[agent.AgentEvent] = []
        """What changed on the node since this was last taken."""
        self._metrics = pins / "maps" / "metrics_v1"
        self._lost, self._looked = self._remembered()
        self._due = 0.0
        self.failed: BpfError | ValueError | None = None
        self.through = 0
        """Everything until then has been returned; nanoseconds since 1970."""

    def read(self, offset: int) -> list[Entry]:
        """Everything that has come since; `offset` from the kernel's clock to the time of day, in
        nanoseconds. BpfError: nothing was read. `failed`: some was not."""
        found: list[Entry] = []
        self.failed = None
        if time.monotonic() >= self._due:
            self.drain.reopen()
            found += self._untold()
            self.source.refresh()
            self.changed += self._watch.look(self.source.directory, time.time_ns())
            lost = self._losses()
            if lost is not None:
                found.append(lost)
            self._due = time.monotonic() + REFRESH_SECONDS
        through = self.drain.through
        for number, records in enumerate(self._records):
            with self._noted():
                data = self.drain.take(number)
                if data:
                    found += records.flows(data, offset, self.source.directory)
        if not self.drain.more:
            self.through = through
        with self._noted():
            found += self.limits.sweep(offset, self.source.directory)
        if self._rings[1].open and not self.drain.more:
            with self._noted():
                found += self.tracked.sweep(offset)
        self._carried.add(found)
        return found

    def _untold(self) -> list[Lost]:
        """What an observer before this one had read when it was killed, and told nobody."""
        count = 0
        for number, ring in enumerate(self._rings):
            begun, ring.begun = ring.begun, None
            if begun is not None:
                step = rings.step(self._records[number].size)
                count += self._progress.untold(number, begun) // step
                self.drain.taken[number] = self.drain.taken[number] or begun
        if not count:
            return []
        log.warning("events were read and not told", node=self.node, count=count)
        return [Lost(self.node, time.time_ns(), count, self._looked, queued=True)]

    def told(self) -> None:
        """What `read` returned is where it belongs."""
        self._progress.keep(self.drain.taken)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """What fails is told by `failed`: what was taken from the rings is nowhere else."""
        try:
            yield
        except (BpfError, ValueError) as error:
            self.failed = error

    def tell_carried(self) -> None:
        """Not before it is known what is served."""
        directory = self.source.directory
        if not directory.services:
            return
        try:
            self._carried.write(self.tracked.under_way(), directory.service)
        except OSError as error:
            log.debug("cannot write what was carried", node=self.node, error=str(error))

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(reason, direction) → (packets, bytes) of the programs, without zeros. BpfError."""
        found = {}
        with Map.open_pinned(str(self._metrics)) as counters:
            for key, value in counters.items():
                rows = [COUNTER.unpack(row) for row in counters.split_per_cpu(value)]
                packets = sum(row[0] for row in rows)
                if packets:
                    index = int.from_bytes(key, sys.byteorder)
                    found[index >> 1, index & 1] = packets, sum(row[1] for row in rows)
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
        self._remember()
        if before is None or total <= before:
            return None
        log.warning("events lost", node=self.node, count=total - before)
        return Lost(self.node, self._looked, total - before, first)

    def _remembered(self) -> tuple[int | None, int]:
        """What an observer before this one had counted, and when it looked last. None: nobody
        has; what is counted so far was lost before anybody looked."""
        try:
            lost, looked = map(int, self._memory.read_text().split())
        except (OSError, ValueError):
            return None, time.time_ns()
        return lost, looked

    def _remember(self) -> None:
        temporary = self._memory.with_name(f".{self._memory.name}.tmp")
        try:
            temporary.write_text(f"{self._lost} {self._looked}\n")
            os.replace(temporary, self._memory)
        except OSError as error:
            log.debug("cannot remember what was lost", error=str(error))

    def close(self) -> None:
        self.drain.close()
        self._progress.close()


class Collector:
    """Every node's events into one history, in the order of time."""

    def __init__(
        self,
        readers: Sequence[Reader],
        kept: History,
        figures: Metrics,
        policy_log: PolicyLog | None = None,
    ) -> None:
        self._readers = readers
        self._history = kept
        self._figures = figures
        self._policy_log = policy_log
        self.agent = agent.history()
        """Agent events."""
        self._due = 0.0

    def step(self) -> float:
        """Seconds to wait until the next one."""
        offset = _offset()
        found: list[Entry] = []
        pause = POLL_SECONDS
        for reader in self._readers:
            try:
                found += reader.read(offset)
                error: Exception | None = reader.failed
            except BpfError as failed:
                error = failed
            if error is not None:
                log.warning("cannot read", node=reader.node, error=str(error))
                pause = RETRY_SECONDS
        for reader in self._readers:
            changed, reader.changed = reader.changed, []
            self.agent.extend(cast("list[Any]", changed))
            self._figures.changes.add(changed)
        through = min(reader.through for reader in self._readers)
        found.sort(key=_time)
        self._history.extend(found, through)
        if found:
            self._figures.add(found)
            if self._policy_log is not None:
                self._logged(found)
        for reader in self._readers:
            reader.told()
        if any(reader.drain.more for reader in self._readers):
            pause = 0.0
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + COUNT_SECONDS
            self._count()
            self._logged(())
        return pause

    def _logged(self, entries: Iterable[Entry]) -> None:
        if self._policy_log is None:
            return
        try:
            self._policy_log.add((e for e in entries if isinstance(e, Flow)), time.monotonic())
            self._policy_log.flush(time.monotonic())
        except OSError as error:
            log.warning("cannot write the policy log", error=str(error))

    def _count(self) -> None:
        """What is asked of the kernel and not told by it."""
        total: Counter[tuple[int, int, int]] = Counter()
        used: Counter[str] = Counter()
        room: Counter[str] = Counter()
        for reader in self._readers:
            try:
                for (reason, direction), values in reader.counters().items():
                    for at, value in enumerate(values):
                        total[reason, direction, at] += value
                for name, (entries, size) in reader.pressure.look().items():
                    used[name] += entries
                    room[name] += size
                reader.tell_carried()
            except BpfError as error:
                log.debug("cannot count", node=reader.node, error=str(error))
        self._figures.programs = {
            (reason, direction): (total[reason, direction, 0], total[reason, direction, 1])
            for reason, direction, _ in total
        }
        self._figures.maps = {name: (used[name], size) for name, size in room.items()}
        tracked = [reader.tracked for reader in self._readers]
        self._figures.tracked = (
            sum(t.entries for t in tracked),
            sum(t.size for t in tracked) or 1,
            sum(t.seconds for t in tracked),
        )
        measured = [reader.source.programming for reader in self._readers]
        self._figures.programming = (
            [sum(counts) for counts in zip_longest(*(m.counts for m in measured), fillvalue=0)],
            sum(m.seconds for m in measured),
        )
        self._figures.changes.standing = standing.look(r.source for r in self._readers)
        self._figures.sweeps = sum(t.sweeps for t in tracked)
        self._figures.held = (self._history.held, self._history.size)

    def namespaces(self) -> list[str]:
        """Of every pod that is known."""
        ends = [end for r in self._readers for end in list(r.source.directory.addresses.values())]
        return sorted({end.namespace for end in ends if end.pod})

    def close(self) -> None:
        """Once what has been read is where it belongs: in the policy log, too."""
        for reader in self._readers:
            reader.drain.stop()
        while any(reader.drain.more for reader in self._readers):
            self.step()
        for reader in self._readers:
            reader.close()
        if self._policy_log is not None:
            with contextlib.suppress(OSError):
                self._policy_log.flush(time.monotonic(), every=True)


def _offset() -> int:
    """From the monotonic clock to the time of day, in nanoseconds. The largest of a few looks:
    one that is interrupted between both clocks tells too little, which would disorder flows."""
    return max(time.time_ns() - time.monotonic_ns() for _ in range(3))


def _time(entry: Entry) -> int:
    return entry.time
