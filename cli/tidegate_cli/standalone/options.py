"""What `tidegate up` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class UpOptions:
    folder: Path
    run_dir: Path
    nodes: int | None = None
    """None: as many as the folder has Node objects, or two."""
    detach: bool = False
    observer: bool = True
    """Whether what shows flows runs, too."""
    policy_log: tuple[str, ...] = ()
    """What it writes down, as its arguments."""
    wait: float = 60.0
    """Seconds until everything must be realised."""
    identities: Literal["classes", "labels"] = "classes"
    excluded_labels: tuple[str, ...] | None = None
    """Label keys, or prefixes that end in "/". None: the usual ones."""
    masquerade: tuple[str, ...] | None = None
    """Networks outside to which pods keep their addresses; None: they always do."""
    load_balancer: str = "snat"
    """As a loader's --load-balancer-mode."""
    acceleration: str = "disabled"
    """As a loader's --load-balancer-acceleration."""
