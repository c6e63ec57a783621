"""How long to wait before trying again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Doubles from `first` to `longest` seconds, each delay cut by up to half at random, so
    that the many who lost one server do not come back at one moment."""

    first: float
    longest: float
    failures: int = 0

    def failed(self, at_least: float | None = None) -> float:
        """Seconds to wait now. `at_least`: what the server asked for (Retry-After)."""
        whole = min(self.longest, self.first * 2.0 ** min(self.failures, 32))
        self.failures += 1
        delay = whole * random.uniform(0.5, 1.0)
        return delay if at_least is None else at_least + delay

    def succeeded(self) -> None:
        self.failures = 0
