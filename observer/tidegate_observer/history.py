"""The last flows, in the order they came, and who waits for the next.

One thread adds, any number read. What is held is bounded by count; a reader that is too slow finds
that what it wanted is gone, and is told how much.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import cast

from tidegate_observer.flow import Entry, Flow

DEFAULT_SIZE = 65536
RATE_SECONDS = 60.0
"""What is said to come in a second is the average of so many."""


class History:
    """Entries have numbers that grow by one from 0 and are never used twice."""

    def __init__(self, size: int = DEFAULT_SIZE) -> None:
        self.size = size
        self.added = 0
        """Entries in all; the number of the next one."""
        self.seen = 0
        """Flows in all."""
        self.through = 0
        """Everything until then that will come has come; nanoseconds since 1970."""
        # One more than is said to be held: the slot being written belongs to no reader.
        self._slots: list[Entry | None] = [None] * (size + 1)
        self._rates: deque[tuple[float, int]] = deque(maxlen=int(RATE_SECONDS) + 1)
        """Once a second at most: when, and how many flows there had been before."""
        self._began = time.monotonic()
        self._grown = threading.Condition()
        self._closed = False

    @property
    def oldest(self) -> int:
        """Number of the oldest entry that is held."""
        return max(0, self.added - self.size)

    @property
    def held(self) -> int:
        return min(self.added, self.size)

    @property
    def closed(self) -> bool:
        return self._closed

    def rate(self) -> float:
        """Flows a second, of the last minute."""
        now = time.monotonic()
        before = [seen for when, seen in tuple(self._rates) if now - when <= RATE_SECONDS]
        came = self.seen - before[0] if before else 0
        return came / min(max(now - self._began, 1.0), RATE_SECONDS)

    def extend(self, entries: Iterable[Entry], through: int = 0) -> None:
        """Adds in order, then wakes who waits. `through` as it is of `self`; 0: no word of it."""
        before = at = self.added
        slots, flows = self._slots, 0
        length = len(slots)
        for entry in entries:
            slots[at % length] = entry
            at += 1
            flows += isinstance(entry, Flow)
            self.added = at
        now = time.monotonic()
        if flows and (not self._rates or now - self._rates[-1][0] >= 1.0):
            self._rates.append((now, self.seen))
        self.seen += flows
        self.through = max(self.through, through)
        if at != before:
            with self._grown:
                self._grown.notify_all()

    def slice(self, start: int, stop: int) -> tuple[int, list[Entry]]:
        """What is still held of [start, stop), in order, and the number of the first of it."""
        slots = self._slots
        length = len(slots)
        stop = min(stop, self.added)
        start = max(start, self.oldest)
        if start >= stop:
            return start, []
        first, last = start % length, stop % length
        held = slots[first:last] if first < last else slots[first:] + slots[:last]
        # What was written over meanwhile is another entry by now.
        gone = max(0, self.oldest - start)
        found = cast("list[Entry]", held[gone:])
        return start + gone, found

    def wait(self, number: int, seconds: float) -> bool:
        """Until there is an entry of this number; False: time is over, or there will be none."""
        with self._grown:
            self._grown.wait_for(lambda: self.added > number or self._closed, seconds)
        return self.added > number

    def close(self) -> None:
        """Nothing will be added: wakes who waits."""
        self._closed = True
        with self._grown:
            self._grown.notify_all()
