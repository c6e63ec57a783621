"""Which process a socket is of, by its cookie, as the socket programs note it (`sock.h`).

A place in the kernel's table is soon another socket's, so it is read whenever records are. Where
none is known, a flow has no process: nobody's name stands for somebody else's.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

from tidegate_bpf import BpfError, LayoutError, Map, ObjectFile

from tidegate_observer.flow import Process

MAP = "processes_v1"
MAX_KNOWN = 16384
"""Sockets whose process is remembered until their record is decoded."""
MAX_SAME = 4096
BUSY = (1 << 64) - 1
"""TG_PROCESS_BUSY."""
_PLACE = struct.Struct("=Q16s")
"""struct tg_process."""
_LOW = (1 << 32) - 1


def name_of(raw: bytes) -> str:
    """Whatever a program calls itself, up to its end."""
    return raw.partition(b"\0")[0].decode(errors="replace")


class Processes:
    """One node's. `read` is for one thread, `get` for any."""

    def __init__(self, spec: ObjectFile, pins: Path) -> None:
        """LayoutError: the object's are other places than this reads."""
        self._pin = pins / "maps" / MAP
        if spec.layout("tg_process").size != _PLACE.size:
            raise LayoutError("struct tg_process is not what this observer reads")
        self._known: dict[int, Process] = {}
        self._same: dict[tuple[int, bytes], Process] = {}
        self._before = b""
        self.get = self._known.get
        """By the low half of a socket's cookie; None: nobody knows."""

    def read(self) -> None:
        """Takes in what was noted since this was called last."""
        try:
            with Map.open_pinned(str(self._pin)) as places:
                first = places.dump()[1]
                if first == self._before:
                    return
                # One that was written while it was read is not the same the next moment.
                second = places.dump()[1]
        except BpfError:  # of a loader of before, or none is there
            return
        self.note(first, second)

    def note(self, first: bytes, second: bytes) -> None:
        """Two looks at all places, one after the other."""
        before = _PLACE.iter_unpack(self._before.ljust(len(first), b"\0"))
        looks = zip(_PLACE.iter_unpack(first), _PLACE.iter_unpack(second), before, strict=True)
        for place, again, held in looks:
            word, name = place
            if place == again and place != held and word not in (0, BUSY):
                self._known[word >> 32] = self._process(word & _LOW, name)
        self._before = first if first == second else b""
        for cookie in list(self._oldest(len(self._known) - MAX_KNOWN)):
            del self._known[cookie]

    def _oldest(self, count: int) -> Iterator[int]:
        return itertools.islice(self._known, max(0, count))

    def _process(self, pid: int, name: bytes) -> Process:
        found = self._same.get((pid, name))
        if found is None:
            if len(self._same) >= MAX_SAME:
                self._same.clear()
            found = self._same[pid, name] = Process(pid, name_of(name))
        return found
