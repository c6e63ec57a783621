"""When each node's loader was last heard of.

A loader says in its status when it wrote it, at least every 90 seconds. A node that is not heard of
for ten minutes counts as dead: nothing waits for it any more, and what it said before is void.
Time is counted from when a report came here, on this machine's own clock, so a node's clock may be
wrong; only of what was there before we were it is asked how old it says it is. While we hear of
no node at all, because the API server is away, no time passes.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import UNSET
from tidegate_api.state import DIGEST_ANNOTATION, NodeState

from tidegate_operator.cluster.kinds import Broken, Held

SILENT_SECONDS = 600.0
"""Without a report for so long a node counts as dead."""

States = Mapping[tuple[str, str], Held[NodeState] | Broken]


@dataclass
class _Heard:
    uid: str
    said: str
    """The time in the newest report; "" before the first, and of a loader that says none."""
    at: float
    """When it came, on our clock."""


class Reports:
    """May be asked by several threads. `clock`: monotonic; `wall`: seconds since 1970."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._heard: dict[str, _Heard] = {}
        self._last = clock()
        self._passed = 0.0
        """Seconds in which we could have heard of nodes."""

    def silent(self, states: States, in_touch: bool = True) -> frozenset[str]:
        """The nodes that count as dead. To be asked every now and then: what came between two
        questions counts from the second. `in_touch`: `states` are as the API server has them."""
        with self._lock:
            now = self._clock()
            if in_touch:
                self._passed += now - self._last
            self._last = now
            held = {name: item for (_, name), item in states.items() if isinstance(item, Held)}
            for name in self._heard.keys() - held.keys():
                del self._heard[name]
            return frozenset(name for name, item in held.items() if self._is_silent(name, item))

    def lagging(self, states: States, in_touch: bool = True) -> list[str]:
        """The nodes that enforce something, and not what was published for them last; but for
        the dead."""
        silent = self.silent(states, in_touch)
        return sorted(
            name
            for (_, name), item in states.items()
            if isinstance(item, Held) and name not in silent and _lags(item.item)
        )

    def _is_silent(self, name: str, held: Held[NodeState]) -> bool:
        status = held.item.status
        said = "" if status is UNSET else status.last_report_time or ""
        known = self._heard.get(name)
        if known is None or known.uid != held.uid:
            # Before the first report its NodeState has to be young.
            age = self._age(said or held.item.metadata.creation_timestamp or "")
            known = self._heard[name] = _Heard(held.uid, said, self._passed - age)
        elif known.said != said:
            known.said, known.at = said, self._passed
        if status is not UNSET and not said:
            return False  # its loader is too old to say when it reports
        return self._passed - known.at >= SILENT_SECONDS

    def _age(self, text: str) -> float:
        """Seconds since a time as the API has it; 0 of one that cannot be read or is to come."""
        try:
            then = datetime.datetime.fromisoformat(text)
        except ValueError:
            return 0.0
        if then.tzinfo is None:
            return 0.0
        return max(0.0, self._wall() - then.timestamp())


def _lags(item: NodeState) -> bool:
    status = item.status
    if status is UNSET or status.realised is UNSET:
        return False
    return status.realised != (item.metadata.annotations or {}).get(DIGEST_ANNOTATION, "")
