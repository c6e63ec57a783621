"""What kstatus itself, which Flux and others read status by, makes of objects. Needs Go."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

from kind import golang

SOURCES = Path(__file__).parents[1] / "kstatus"


def kstatus(*objects: Any) -> list[str]:
    """Of each object, as the API server gives it: Current, InProgress, Failed and so on."""
    lines = "".join(json.dumps(item) + "\n" for item in objects)
    done = subprocess.run([_program()], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.split()


@functools.cache
def _program() -> Path:
    return golang.build_local("kstatus", SOURCES, fetch=True)
