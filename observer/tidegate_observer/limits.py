"""Denials that were not told one by one, because there were too many of their kind (`limit.h`): how
many more there were, of each kind. Exact: what was sent and what is said here is what happened.

The programs count at a kind's place; how much of it has been said is kept beside it in the kernel,
so that an observer that follows another says neither less nor twice. Writes nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace
from tidegate_bpf import BpfError, Map, ObjectFile

from tidegate_observer.directory import Directory
from tidegate_observer.flow import NOBODY, Flow, Kind

SWEEP_SECONDS = 1.0
MAX_KINDS = 8192
"""Kinds of which one denial is remembered, to say what the others were like."""
AUDIT, LOG = 1, 2
"""enum tg_event_flags: it passed, and policies in audit mode deny it, or its rule asks for this."""

DenialKind = tuple[int, int, int, int, int, int]
"""Members of struct tg_denial_kind, in its order."""
_WAY = struct.Struct("=Q6IQQ")
"""struct tg_limit."""
_SAID = struct.Struct("=QQ")
"""struct tg_limit_said."""


class Place(NamedTuple):
    """A kind's, in use."""

    number: int
    serial: int
    kind: DenialKind
    suppressed: int


def places(values: bytes) -> list[Place]:
    """Of limits_v1: those where something was suppressed."""
    found = []
    for number, (serial, *kind, _until, suppressed) in enumerate(_WAY.iter_unpack(values)):
        if suppressed and serial and not serial & 1:
            found.append(Place(number, serial, tuple(kind), suppressed))
    return found


class Limits:
    """One node's. `seen` is filled as denials are read (`records.Denials`)."""

    def __init__(self, spec: ObjectFile, node: str, pins: Path) -> None:
        self._node = node
        self._limits = pins / "maps" / "limits_v1"
        self._record = pins / "maps" / "limits_said_v1"
        self._said: dict[int, tuple[int, int]] | None = None
        self.known = {"limits_v1", "limits_said_v1"} <= spec.maps.keys()
        if self.known and spec.layout("tg_limit").size != _WAY.size:
            raise ValueError("struct tg_limit is not what this observer reads")
        self.seen: dict[DenialKind, Flow] = {}
        """The last denial of each kind that was told by itself."""
        self._due = 0.0

    def sweep(self, offset: int, directory: Directory, *, now: bool = False) -> list[Flow]:
        """What is to be said since the last time, if it is time to look: one entry a kind, with
        `more`. `offset` as of `records`. BpfError."""
        if not self.known or (not now and time.monotonic() < self._due):
            return []
        self._due = time.monotonic() + SWEEP_SECONDS
        try:
            with Map.open_pinned(str(self._limits)) as limits:
                held = places(limits.dump()[1])
            return self._told(held, time.monotonic_ns() + offset, directory)
        except BpfError as error:
            if error.errno == errno.ENOENT:  # a loader of before
                return []
            raise

    def _told(self, held: list[Place], when: int, directory: Directory) -> list[Flow]:
        if self._said is None:
            self._said = self._recorded()
        found, changed = [], []
        for place in held:
            serial, said = self._said.get(place.number, (0, 0))
            more = place.suppressed - (said if serial == place.serial else 0)
            if more <= 0:
                continue
            self._said[place.number] = place.serial, place.suppressed
            changed.append(place)
            if not place.kind[5] >> 16 & LOG:
                found.append(self._entry(place.kind, more, when, directory))
        # Without it this observer still knows; the next one would say it again.
        with contextlib.suppress(BpfError):
            self._write(changed)
        return found

    def _recorded(self) -> dict[int, tuple[int, int]]:
        with Map.open_pinned(str(self._record)) as record:
            rows = enumerate(_SAID.iter_unpack(record.dump()[1]))
            return {number: (serial, said) for number, (serial, said) in rows if serial}

    def _write(self, changed: list[Place]) -> None:
        with Map.open_pinned(str(self._record)) as record:
            record.update_items(
                (p.number.to_bytes(4, sys.byteorder), _SAID.pack(p.serial, p.suppressed))
                for p in changed
            )

    def _entry(self, kind: DenialKind, more: int, when: int, directory: Directory) -> Flow:
        last = self.seen.get(kind)
        if last is not None:
            return replace(last, time=max(when, last.time), more=more, process=None)
        # Whoever looked before us has seen them: only what they have in common is known.
        rule_set, rule, source, destination, endpoint, what = kind
        leaves = what >> 8 & 0xFF == 1
        audit = bool(what >> 16 & AUDIT)
        verdict = directory.decision(rule_set, rule, audit) if rule_set else None
        return Flow(
            self._node,
            when,
            (Kind.AUDITED if audit else Kind.DENIED).value,
            what & 0xFF,
            what >> 8 & 0xFF,
            NOBODY,
            NOBODY,
            0,
            0,
            0,
            0,
            0,
            directory.end(NOBODY, source, endpoint if leaves else 0),
            directory.end(NOBODY, destination, 0 if leaves else endpoint),
            verdict if leaves else None,
            None if leaves else verdict,
            more=more,
        )
