"""What `tidegate up` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class UpOptions:
    folder: Path
    run_dir: Path
    nodes: int | None = None
    """None: as many as the folder has Node objects, or two."""
    detach: bool = False
    wait: float = 60.0
    """Seconds until everything must be realised."""
