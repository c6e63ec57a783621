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
    root: str
    """What of the filesystem is mounted; "/../.." is above the reader's own cgroup."""


def parse(text: str) -> list[Mount]:
    """Mounts of a mountinfo text, in its order (later ones cover earlier ones)."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        parts = left.split(" ")
        major, _, minor = parts[2].partition(":")
        root, path = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), p) for p in parts[3:5])
        found.append(Mount(path, right.split(" ")[0], (int(major), int(minor)), root))
    return found


def mounts() -> list[Mount]:
    """The calling process's mounts."""
    with open("/proc/self/mountinfo") as lines:
        return parse(lines.read())


def cgroup2() -> str | None:
    """Where the v2 hierarchy is mounted (`/sys/fs/cgroup`, or `…/unified` on hybrid machines);
    of several mounts, as in a container, the one that shows most of it."""
    return highest([m for m in mounts() if m.fstype == "cgroup2"])


def highest(found: list[Mount]) -> str | None:
    """The path of the mount whose root is highest in its hierarchy, the first of equals."""
    best = min(found, key=lambda m: _depth(m.root), default=None)
    return best.path if best is not None else None


def _depth(root: str) -> int:
    """Of a mount's root below the reader's own cgroup; above it is negative."""
    parts = [part for part in root.split("/") if part]
    return sum(-1 if part == ".." else 1 for part in parts)


def fstype(path: str | os.PathLike[str]) -> str | None:
    """Type of the filesystem that `path` lies on. Raises OSError when it does not exist."""
    device = os.stat(path).st_dev
    wanted = os.major(device), os.minor(device)
    return next((m.fstype for m in mounts() if m.device == wanted), None)
