"""How far each ring of a node has been told, in a file that outlives the process however it ends.

What an observer has read is in its memory, and in no ring any more. One that is killed takes with
it what it has not told yet; by this the next one knows how much that was.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from tidegate_observer.rings import Place


class Progress:
    """A place for each ring. Written to memory that the kernel keeps; close once."""

    def __init__(self, path: Path, rings: int) -> None:
        """OSError."""
        size = 16 * rings
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, size)
            self._pages = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        # Native words: each is moved by one access, and is never half written.
        self._words = memoryview(self._pages).cast("Q")

    def untold(self, number: int, begun: Place) -> int:
        """Bytes of that ring which were read and not told before it was begun; of another ring
        than that which was told of before: 0, nothing is known."""
        before = Place(*self._words[2 * number : 2 * number + 2])
        return max(0, begun.bytes - before.bytes) if before.map == begun.map else 0

    def keep(self, places: Sequence[Place | None]) -> None:
        """Everything until there has been told; None: as before."""
        for number, place in enumerate(places):
            if place is not None:
                # Whoever finds another ring's number beside a place asks no further.
                if self._words[2 * number] != place.map:
                    self._words[2 * number] = 0
                self._words[2 * number + 1] = place.bytes
                self._words[2 * number] = place.map

    def close(self) -> None:
        self._words.release()
        self._pages.close()
