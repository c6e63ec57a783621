"""Records of one fixed size out of pinned ring buffers, a batch at a time.

Knows no meaning of a record. One process reads a ring: `locked` keeps a second one out. A thread
empties the rings into memory, because a ring holds half a second of a busy node and whoever makes
something of the records is sometimes away for longer: looking through a table, waiting for a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tidegate_bpf import BpfError, Map, RingBuffer

HEADER = 8
"""Bytes of the kernel's before each record."""
DRAIN_SECONDS = 0.025
MAX_BUFFERED = 32 << 20
"""Bytes held in memory for one ring, four seconds of 50,000 flows a second; beyond, the ring fills
and the programs count what they lose."""
BATCH = 4 << 20
"""Bytes taken at once, or a little more: what is made of them is held at once, too."""


def step(size: int) -> int:
    """Bytes that a record of `size` bytes takes in a ring."""
    return (HEADER + size + 7) & ~7


class Place(NamedTuple):
    """Somewhere in all that one ring ever held."""

    map: int
    """The kernel's number of it, which no other gets while the machine runs."""
    bytes: int


class Ring:
    """A ring buffer by its pin; follows the pin where another map takes its place."""

    def __init__(self, pin: Path, size: int) -> None:
        """`size`: of every record, bytes."""
        self._pin = pin
        self._size = size
        self._inode = 0
        self._map: Map | None = None
        self._ring: RingBuffer | None = None
        self.begun: Place | None = None
        """Where reading of what is open began."""

    @property
    def place(self) -> Place:
        """How far what is open has been read."""
        assert self._map is not None and self._ring is not None  # noqa: PT018
        return Place(self._map.info.id, self._ring.consumed)

    @property
    def open(self) -> bool:
        return self._ring is not None

    def reopen(self) -> None:
        """Opens what is pinned now, if it is not open; nothing is pinned: closes. BpfError."""
        try:
            inode = os.stat(self._pin).st_ino
        except FileNotFoundError:
            self.close()
            return
        if inode == self._inode:
            return
        self.close()
        self._map = Map.open_pinned(str(self._pin))
        self._ring = RingBuffer(self._map)
        self._inode = inode
        self.begun = self.place

    def read(self) -> bytes:
        """Whole records one after the other, oldest first; b"": there is none."""
        return self._ring.read_fixed(self._size) if self._ring is not None else b""

    def close(self) -> None:
        ring, self._ring = self._ring, None
        held, self._map = self._map, None
        self._inode = 0
        if ring is not None:
            ring.close()
        if held is not None:
            held.close()


class Drain:
    """Empties rings, of which each has its own queue. `reopen`, `take` and `close` are for one
    thread."""

    def __init__(self, rings: Sequence[Ring], beside: Callable[[], None] | None = None) -> None:
        """`beside`: called once records have been read, before they can be taken."""
        self._rings = list(rings)
        self._beside = beside
        self._queues: list[deque[tuple[bytes, Place]]] = [deque() for _ in rings]
        self.taken: list[Place | None] = [None for _ in rings]
        """How far what was read has been taken, of each ring."""
        self._held = [0 for _ in rings]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.through = 0
        """Everything the rings got by then has been read; nanoseconds since 1970."""
        self._error: BpfError | ValueError | None = None
        self._thread: threading.Thread | None = None

    def reopen(self) -> None:
        """Opens what is pinned now; the first time, begins to read. BpfError."""
        with self._lock:
            for ring in self._rings:
                ring.reopen()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
            self._thread.start()

    def take(self, number: int) -> bytes:
        """Whole records of that ring, oldest first, a batch of them; b"": there is none. BpfError,
        ValueError: reading failed, and goes on."""
        with self._lock:
            error, self._error = self._error, None
            if error is not None:
                raise error
            queue, taken, size = self._queues[number], [], 0
            while queue and size < BATCH:
                piece, self.taken[number] = queue.popleft()
                taken.append(piece)
                size += len(piece)
            self._held[number] -= size
        return b"".join(taken)

    @property
    def more(self) -> bool:
        """Whether a batch was not all."""
        return any(self._queues)

    def pressed(self) -> bool:
        """Whether half of what memory there is for a ring is full."""
        return max(self._held) > MAX_BUFFERED // 2

    def read(self) -> None:
        """Empties the rings once, as the thread does all the time."""
        came, began, whole = False, time.time_ns(), True
        with self._lock:
            for number, ring in enumerate(self._rings):
                if self._held[number] >= MAX_BUFFERED:
                    whole = False
                    continue
                try:
                    data = ring.read()
                except (BpfError, ValueError) as error:
                    self._error = error
                    whole = False
                    continue
                if data:
                    came = True
                    self._queues[number].append((data, ring.place))
                    self._held[number] += len(data)
            if came and self._beside is not None:
                self._beside()
            if whole:
                self.through = began

    def _run(self) -> None:
        while not self._stop.wait(DRAIN_SECONDS):
            self.read()

    def stop(self) -> None:
        """Nothing is read any more; what was may be taken."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Closes the rings; what was not taken is gone."""
        self.stop()
        for ring in self._rings:
            ring.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process alone reads; the lock goes with it, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
