"""Answers of many nodes by the time of what they tell, as they come. Pure: no clock, no thread."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterator
from typing import Any

WINDOW_SECONDS = 0.3
"""For how long an answer waits for earlier ones of nodes that do not say how far they are."""
HELD_SECONDS = 1.0
"""None waits longer, whatever its node's clock says."""
SLACK = 256
"""Answers that were told already and may still be in the heap."""


class _Waiting:
    """One answer until its turn. Compared by when it happened."""

    __slots__ = ("answer", "arrived", "at", "told")

    def __init__(self, at: int, arrived: float, answer: Any) -> None:
        self.at = at
        self.arrived = arrived
        self.answer = answer
        self.told = False

    def __lt__(self, other: _Waiting) -> bool:
        return self.at < other.at


class Order:
    """An answer's turn is when every node has said that it has told all of that time, or when it
    has waited for a moment: never long, so that a node whose clock is wrong keeps back nobody's
    flows, its own neither, and one that is slow keeps back those of the others for a moment."""

    def __init__(self) -> None:
        self._by_time: list[_Waiting] = []
        self._by_arrival: collections.deque[_Waiting] = collections.deque()
        self._marks: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_time)

    def mark(self, node: str, at: int) -> None:
        """The node has told everything until then; 0: it is asked, and has not said so yet."""
        self._marks[node] = at

    def forget(self, node: str) -> None:
        """Nobody waits for that node."""
        self._marks.pop(node, None)

    def add(self, at: int, arrived: float, answer: Any) -> None:
        one = _Waiting(at, arrived, answer)
        heapq.heappush(self._by_time, one)
        self._by_arrival.append(one)

    def due(self, now: float) -> Iterator[Any]:
        """`now`: seconds of the clock that `arrived` is of."""
        heap, queued = self._by_time, self._by_arrival
        told = min(self._marks.values(), default=0)
        while heap and (
            heap[0].told or (told and heap[0].at <= told) or heap[0].arrived <= now - WINDOW_SECONDS
        ):
            one = heapq.heappop(heap)
            if not one.told:
                one.told = True
                yield one.answer
        while queued and (queued[0].told or queued[0].arrived <= now - HELD_SECONDS):
            one = queued.popleft()
            if not one.told:
                one.told = True
                yield one.answer
        # Those from the future would stay at the end of the heap.
        if len(heap) > 2 * len(queued) + SLACK:
            self._by_time = [one for one in heap if not one.told]
            heapq.heapify(self._by_time)

    def rest(self) -> Iterator[Any]:
        yield from (one.answer for one in sorted(self._by_time) if not one.told)
