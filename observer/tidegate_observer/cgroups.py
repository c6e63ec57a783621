"""Which pod a cgroup is of, by the directories of cgroup2: a kubelet's and those of `tidegate up`.

An address says nothing of pods in the node's network; the cgroup of their sockets does. Reads only
names and inode numbers, and enters nothing.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

REST = 20
"""For how many times as long as a walk took there is no other: whatever is asked for, walks take
less than a twentieth of a core."""
MAX_CGROUPS = 65536
_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}"
_POD = re.compile(rf"(?:.*-)?pod({_UID}|[0-9a-f]{{32}})(?:\.slice)?|({_UID})")
"""`kubepods-burstable-pod<uid>.slice`, `pod<uid>`, `<uid>`; a static pod's UID is a hash."""


def uid_of(name: str) -> str:
    """The pod UID in a directory's name, as the API writes it; "": it is no pod's."""
    found = _POD.fullmatch(name)
    return (found[1] or found[2]).replace("_", "-") if found else ""


class Cgroups:
    """For one thread."""

    def __init__(self, root: Path | None) -> None:
        """`root`: cgroup2, or a directory in it; None: none is known."""
        self.root = root
        self.pods: dict[int, str] = {}
        """Id of a cgroup → UID of the pod that it or one above it is of; "": of none."""
        self._due = 0.0

    def look(self, cgroup: int) -> str | None:
        """Of `pods`. None: it is not known, and too soon to look for it. One that is looked for
        and is not there is of no pod: whose it was is gone."""
        known = self.pods.get(cgroup)
        if known is None and time.monotonic() >= self._due:
            begin = time.monotonic()
            self.pods = walk(self.root) if self.root is not None else {}
            end = time.monotonic()
            self._due = end + REST * (end - begin)
            known = self.pods.setdefault(cgroup, "")
        return known


def walk(root: Path) -> dict[int, str]:
    """`Cgroups.pods` of everything at and below `root`. What goes meanwhile is left out."""
    found: dict[int, str] = {}
    try:
        # The id of a cgroup is its directory's inode number, on 64 bits.
        found[root.stat().st_ino] = uid_of(root.name)
    except OSError:
        return found
    waiting = [(str(root), uid_of(root.name))]
    while waiting and len(found) < MAX_CGROUPS:
        path, above = waiting.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        uid = uid_of(entry.name) or above
                        found[entry.inode()] = uid
                        waiting.append((entry.path, uid))
        except OSError:
            continue
    return found
