"""Labels of living pods that change wait for what changes policies. Pure but for its clock.

A pod that gets other labels moves to another number; so do pods that a policy tells apart. Each
alone is published so that no node, wherever its reader stops, judges an address by what never
was together (`publish`). Both in one publish, or one while another is not written whole, cannot
be: policies go first, then labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from tidegate_operator.changes import changed

WAIT_SECONDS = 5.0
"""The longest that labels wait: an object that can never be written must not keep a pod what it
was."""


class Labelled(Protocol):
    @property
    def uid(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


_K = TypeVar("_K")
_P = TypeVar("_P", bound=Labelled)


def relabelled(old: Mapping[_K, _P], now: Mapping[_K, _P]) -> dict[_K, _P]:
    """What those pods of `now` were that have other labels than in `old`."""
    both = ((key, old[key], now[key]) for key in changed(old, now) if key in old)
    return {
        key: was for key, was, item in both if was.uid == item.uid and was.labels != item.labels
    }


class Relabels:
    """Which of them wait, where one publish may fail and be tried again."""

    def __init__(self) -> None:
        self._since: float | None = None
        """When the first of them began to wait; None: nobody waits."""

    def waiting(
        self, old: Mapping[_K, _P], now: Mapping[_K, _P], reason: bool, clock: float
    ) -> dict[_K, _P]:
        """Of pods whose labels are to stay as they were: what they were. `reason`: are there
        other policies in `now`, or is `old` not published whole?"""
        found = relabelled(old, now) if reason else {}
        if not found:
            self._since = None
            return {}
        if self._since is None:
            self._since = clock
        return found if clock - self._since < WAIT_SECONDS else {}
