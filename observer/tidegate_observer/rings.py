"""Records of one fixed size out of a pinned ring buffer, a batch at a time.

Knows no meaning of a record. One process reads a ring: `locked` keeps a second one out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tidegate_bpf import Map, RingBuffer


class Ring:
    """A ring buffer by its pin; follows the pin where another map takes its place."""

    def __init__(self, pin: Path, size: int) -> None:
        """`size`: of every record, bytes."""
        self._pin = pin
        self._size = size
        self._inode = 0
        self._map: Map | None = None
        self._ring: RingBuffer | None = None

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
