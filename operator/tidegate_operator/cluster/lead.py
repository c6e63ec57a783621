"""Whether this replica may write; who decides it is `tidegate_operator.leader`."""

from __future__ import annotations

import time
from typing import Protocol


class NotLeader(Exception):
    """Another replica writes, or may by now."""


class Lead(Protocol):
    def check(self) -> None:
        """Raises NotLeader. Called before each write."""

    @property
    def term(self) -> int | None:
        """Of our leadership, higher than that of every leader before; None: another leads."""


class Alone:
    """Without an election: for one replica that is known to be the only one."""

    def __init__(self) -> None:
        # Grows from start to start, as terms have to.
        self.term: int | None = int(time.time())

    def check(self) -> None:
        pass
