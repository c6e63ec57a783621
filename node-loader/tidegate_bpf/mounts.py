"""What is mounted where, from /proc/self/mountinfo. Reads only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    path: str
    fstype: str
    device: tuple[int, int]


def parse(text: str) -> list[Mount]:
    """Mounts of a mountinfo text, in its order (later ones cover earlier ones)."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        parts = left.split(" ")
        major, _, minor = parts[2].partition(":")
        path = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), parts[4])
        found.append(Mount(path, right.split(" ")[0], (int(major), int(minor))))
    return found


def mounts() -> list[Mount]:
    """The calling process's mounts."""
    with open("/proc/self/mountinfo") as lines:
        return parse(lines.read())


def cgroup2() -> str | None:
    """Where the v2 hierarchy is mounted (`/sys/fs/cgroup`, or `…/unified` on hybrid machines)."""
    return next((m.path for m in mounts() if m.fstype == "cgroup2"), None)


def fstype(path: str | os.PathLike[str]) -> str | None:
    """Type of the filesystem that `path` lies on. Raises OSError when it does not exist."""
    device = os.stat(path).st_dev
    wanted = os.major(device), os.minor(device)
    return next((m.fstype for m in mounts() if m.device == wanted), None)
