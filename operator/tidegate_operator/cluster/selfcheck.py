"""The operator's doubt of itself: is what was published what a new start would publish?

A change costs what it touches because most of the result is kept: of the world, of the ledger's
counts, of what was compiled. Now and then, in a thread of its own, all of it is made once more from
the objects that were watched, and compared. Only the numbers are taken as they are: they are
the one thing that has a history. What differs is a fault of ours: it is said, and the runner starts
over with what it keeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest

import structlog
from tidegate_api.state import encode

from tidegate_operator.cluster import world
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.world import ClusterWorld
from tidegate_operator.compile import Desired, compile
from tidegate_operator.identities import Ledger, wanted

VERIFY_SECONDS = 600.0
SHOWN = 5
"""Keys that an error names."""

log = structlog.get_logger()


def differences(held: Desired, whole: Desired) -> Iterator[str]:
    """ "table/key" of what is not the same byte for byte, or is in one of them only; of problems
    their places."""
    for table in ("rule_sets", "nodes", "ipcache", "services", "peers"):
        one: Mapping[str, object] = getattr(held, table)
        other: Mapping[str, object] = getattr(whole, table)
        for key in dict.fromkeys((*one, *other)):
            if key not in one or key not in other or encode(one[key]) != encode(other[key]):
                yield f"{table}/{key}"
    for place, (said, right) in enumerate(zip_longest(held.problems, whole.problems)):
        if said != right:
            yield f"problems/{place}"


class SelfCheck:
    """`offer` and `take` are the runner's thread's; `found` is called in the check's own.

    A check reads only what never changes after it was made, and all of one publish, so it need
    not stop anybody. It shares the interpreter: a publish beside it gets every other slice."""

    def __init__(self, seconds: float, metrics: Metrics, found: Callable[[], None]) -> None:
        """`seconds` from the end of a check, or the start, to the next; 0: never."""
        self._seconds = seconds
        self._metrics = metrics
        self._found = found
        self._ended = time.monotonic()
        self._thread: threading.Thread | None = None
        self._faulty = threading.Event()

    def offer(self, world: ClusterWorld, ledger: Ledger, desired: Desired) -> None:
        """Check it if it is time. `desired` was compiled of the other two."""
        if not self._seconds or (self._thread is not None and self._thread.is_alive()):
            return
        if self._faulty.is_set() or time.monotonic() - self._ended < self._seconds:
            return
        self._thread = threading.Thread(
            target=self._check, args=(world, ledger, desired), name="self-check", daemon=True
        )
        self._thread.start()

    def take(self) -> bool:
        """Has a check since the last call found what is kept faulty?"""
        faulty = self._faulty.is_set()
        self._faulty.clear()
        return faulty

    def _check(self, held: ClusterWorld, ledger: Ledger, desired: Desired) -> None:
        began = time.monotonic()
        try:
            # `hold`: numbers that are kept apart for nodes that are behind are no fault.
            fresh, _ = world.build(
                held.snapshot,
                world.anew(held),
                held.asked.settings,
                held.of_services,
                hold=held.relevance != held.asked,
            )
            names = [f"world/{name}" for name in world.unlike(held, fresh)]
            names += [f"ledger/{key}" for key in sorted(wanted(fresh).keys() ^ ledger.live.keys())]
            # Without numbers for what it holds there is nothing to compile.
            if not names:
                names += differences(desired, compile(fresh, ledger))
        except Exception:  # what cannot be compiled anew cannot have been right
            log.exception("self-check failed")
            names = ["?"]
        self._ended = time.monotonic()
        self._metrics.self_check_seconds.observe(self._ended - began)
        self._metrics.self_checks.labels("different" if names else "equal").inc()
        if names:
            log.error(
                "what is published is not what the cluster says; making it anew",
                differing=len(names),
                first=names[:SHOWN],
            )
            self._faulty.set()
            self._found()
