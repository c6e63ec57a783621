"""Whether this replica may write; `tidegate_operator.leader.Leader` is one who decides it."""

from __future__ import annotations

import time
from typing import Protocol

from tidegate_operator.leader import NotLeader

UNBOUNDED_SECONDS = 3600.0


class Lead(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None:
        """Hands over."""

    def check(self) -> float:
        """Called before each write. Seconds that each wait of its request may take.
        NotLeader: do not write."""

    @property
    def term(self) -> int:
        """Of our leadership, higher than that of every leader before. NotLeader."""

    @property
    def alive(self) -> bool: ...


class Alone:
    """Without an election: for one replica that is known to be the only one."""

    def __init__(self) -> None:
        # Grows from start to start, as terms have to.
        self.term = int(time.time())
        self.alive = True

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def check(self) -> float:
        return UNBOUNDED_SECONDS


def term_of(lead: Lead) -> int | None:
    """None: another leads, or nobody."""
    try:
        lead.check()
        return lead.term
    except NotLeader:
        return None
