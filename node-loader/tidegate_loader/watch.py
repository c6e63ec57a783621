"""Waits until files of a run directory change. What they say is `source`'s.

A module of its own, imported when there is something to wait for: a start puts the state in
force first.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from inotify_simple import INotify, flags  # type: ignore[import-untyped]

from tidegate_loader.local import NodePaths
from tidegate_loader.source import is_object

DEBOUNCE_SECONDS = 0.008
"""A burst of events is over when none came for this long."""
QUIET_SECONDS = 0.1
"""After this long without an event, the next one is acted on at once."""


class Watch:
    """Waits until files of the run directory change. Bursts are one change."""

    _FILES = (
        flags.MOVED_TO
        | flags.MOVED_FROM
        | flags.CLOSE_WRITE
        | flags.DELETE
        | flags.DELETE_SELF
        | flags.ONLYDIR
    )
    _DIRECTORIES = flags.CREATE | flags.MOVED_TO | flags.ONLYDIR

    def __init__(self, paths: NodePaths, wake_fd: int) -> None:
        """`wake_fd` becomes readable when a signal came; it is drained."""
        self._inotify = INotify()
        self._leaves = [
            *(paths.objects / kind for kind in ("nodestates", "rulesets", "stateslices")),
            paths.interfaces,
        ]
        self._parents = [paths.objects.parent, paths.objects, paths.node]
        self._wake_fd = wake_fd
        self._poll = select.poll()
        self._poll.register(self._inotify.fileno(), select.POLLIN)
        self._poll.register(wake_fd, select.POLLIN)
        self._last_event = 0.0
        self._parent_watches: set[int] = set()
        self._watch_all()

    def _watch_all(self) -> None:
        """Directories may come later, or come back: adding a watch twice is harmless."""
        self._parent_watches = self._add(self._parents, self._DIRECTORIES)
        self._add(self._leaves, self._FILES)

    def _add(self, paths: list[Path], mask: int) -> set[int]:
        added = set()
        for path in paths:
            try:
                added.add(self._inotify.add_watch(str(path), mask))
            except (FileNotFoundError, NotADirectoryError):
                continue
        return added

    def wait(self, timeout: float) -> bool:
        """Up to `timeout` seconds; True when something changed. Returns early on a signal."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            ready = dict(self._poll.poll(max(0.0, left) * 1000))
            if self._wake_fd in ready:
                os.read(self._wake_fd, 4096)
            if self._inotify.fileno() in ready and self._relevant():
                return self._settle()
            if self._wake_fd in ready or left <= 0:
                return False

    def _settle(self) -> bool:
        first = time.monotonic() - self._last_event > QUIET_SECONDS
        while not first and self._poll.poll(DEBOUNCE_SECONDS * 1000):
            if not self._relevant():
                break
        self._last_event = time.monotonic()
        self._watch_all()
        return True

    def _relevant(self) -> bool:
        """Drains the events. Those of parents count only for directories."""
        found = False
        for event in self._inotify.read(timeout=0):
            always = flags.ISDIR | flags.DELETE_SELF | flags.IGNORED | flags.Q_OVERFLOW
            if event.mask & always:
                found = True
            elif event.wd not in self._parent_watches:
                found = found or is_object(event.name)
        return found

    def close(self) -> None:
        self._inotify.close()
