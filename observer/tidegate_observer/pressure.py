"""How full the programs' maps are. Counts entries by reading them; changes nothing.

A map whose size is fixed by what it holds (scratch, counters, node table, rings) has no pressure.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tidegate_bpf import BpfError, Map, MapType, ObjectFile

LOOK_SECONDS = 30.0
"""Counting reads every entry."""
COUNTED = (MapType.HASH, MapType.LRU_HASH, MapType.LPM_TRIE)

INNER = {"rule_sets": "rule_sets_v2", "half_open": "half_open_v2"}
"""Pinned inner maps, one file each, and the outer map whose slots they take."""

_BACKEND = struct.Struct("=16x3xB4x")
_LIMIT = struct.Struct("=Q40x")

Usage = dict[str, tuple[int, int]]
"""Map without its layout's version → (entries, how many it can hold)."""


def stem(name: str) -> str:
    return name.rpartition("_v")[0]


class Pressure:
    """One node's."""

    def __init__(self, spec: ObjectFile, pins: Path) -> None:
        self._pins = pins
        self._maps = [name for name in spec.maps if stem(name)]
        self._due = 0.0
        self._found: Usage = {}

    def look(self, *, now: bool = False) -> Usage:
        """As it was when it was looked at last. BpfError."""
        if now or time.monotonic() >= self._due:
            self._due = time.monotonic() + LOOK_SECONDS
            self._found = dict(self._usage())
        return self._found

    def _usage(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for name in self._maps:
            try:
                with Map.open_pinned(str(self._pins / "maps" / name)) as opened:
                    used = self._used(stem(name), opened)
                    if used is not None:
                        yield stem(name), used
            except BpfError as error:
                if error.errno != errno.ENOENT:  # of an object that this node does not load
                    raise
        for directory, outer in INNER.items():
            if (self._pins / directory).is_dir():
                held = sum(1 for path in (self._pins / directory).iterdir() if path.name.isdigit())
                with Map.open_pinned(str(self._pins / "maps" / outer)) as opened:
                    yield directory, (held, opened.info.max_entries)

    def _used(self, name: str, opened: Map) -> tuple[int, int] | None:
        """None: it has no pressure."""
        info = opened.info
        if info.type in COUNTED:
            return len(opened.dump()[0]) // info.key_size, info.max_entries
        if name == "slots":  # filled from its beginning
            return -(-len(opened.dump(dense=True)[1].rstrip(b"\0")) // 4), info.max_entries
        if name == "backends":
            values = opened.dump(dense=True)[1]
            return sum(state for (state,) in _BACKEND.iter_unpack(values)), info.max_entries
        if name == "limits":
            ways = [serial for (serial,) in _LIMIT.iter_unpack(opened.dump()[1])]
            return sum(1 for serial in ways if serial), len(ways)
        return None
