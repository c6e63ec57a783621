"""Waiting is polling: for a condition, not for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], object], what: str, seconds: float, every: float = 0.01) -> None:
    """AssertionError: `condition()` never held. `every`: seconds between two looks at it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(every)


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached every thread of it: until then the others go on."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)
