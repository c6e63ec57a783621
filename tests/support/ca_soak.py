"""How far a campaign goes, and where its figures are kept.

With TIDEGATE_SOAK=1 campaigns run in full and leave their figures in soak/results.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SOAK = os.environ.get("TIDEGATE_SOAK") == "1"
RESULTS = Path(__file__).parents[2] / "soak" / "results.json"


def scaled(ci: int, soak: int) -> int:
    """How many, at the scale of this run."""
    return soak if SOAK else ci


@dataclass
class Figures:
    """One campaign's: `count` of `what`, and what failed, in words."""

    id: str
    what: str
    count: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def campaign(id: str, what: str) -> Iterator[Figures]:
    """Records the figures of the block, also when it raises; then asserts that nothing failed."""
    figures, begun = Figures(id, what), time.monotonic()
    ended = False
    try:
        yield figures
        ended = True
    finally:
        failures = len(figures.failures) + (not ended)
        seconds = round(time.monotonic() - begun, 1)
        print(f"{id}: {figures.count} {figures.what} in {seconds} s, {failures} failures")
        if SOAK:
            _record(
                {
                    "id": id,
                    "what": figures.what,
                    "count": figures.count,
                    "seconds": seconds,
                    "failures": failures,
                }
            )
    assert not figures.failures, "\n\n".join(figures.failures[:5])


def _record(row: dict[str, object]) -> None:
    """Replaces the row of the same id."""
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = [r for r in json.loads(file.read() or "[]") if r["id"] != row["id"]]
        text = json.dumps(sorted([*rows, row], key=lambda r: str(r["id"])), indent=2)
        file.truncate(0)
        file.write(text + "\n")
