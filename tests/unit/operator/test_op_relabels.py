"""Whose labels wait for what changes policies, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from tidegate_operator.relabels import WAIT_SECONDS, Relabels


@dataclass(frozen=True)
class Pod:
    uid: str
    labels: dict[str, str] = field(default_factory=dict)


OLD = Pod("1", {"app": "a"})


@pytest.mark.parametrize(
    ("why", "old", "now", "waits"),
    [
        ("other labels", {"p": OLD}, {"p": Pod("1", {"app": "b"})}, True),
        ("one less", {"p": OLD}, {"p": Pod("1")}, True),
        ("the same labels, otherwise changed", {"p": OLD}, {"p": Pod("1", {"app": "a"})}, False),
        ("another pod of that name", {"p": OLD}, {"p": Pod("2", {"app": "b"})}, False),
        ("a new one", {}, {"p": Pod("1", {"app": "b"})}, False),
        ("one that is gone", {"p": OLD}, {}, False),
    ],
)
def test_who_waits(why: str, old: dict[str, Pod], now: dict[str, Pod], waits: bool) -> None:
    assert Relabels().waiting(old, now, True, 0.0) == ({"p": OLD} if waits else {}), why
    assert Relabels().waiting(old, now, False, 0.0) == {}, why


def test_nobody_waits_for_longer_than_is_said() -> None:
    relabels, old, now = Relabels(), {"p": OLD}, {"p": Pod("1", {"app": "b"})}
    assert relabels.waiting(old, now, True, 7.0)
    assert relabels.waiting(old, now, True, 6.9 + WAIT_SECONDS)
    assert not relabels.waiting(old, now, True, 7.0 + WAIT_SECONDS)
    # That was it; the next one's time begins anew.
    assert not relabels.waiting(now, now, True, 8.0 + WAIT_SECONDS)
    assert relabels.waiting(now, old, True, 9.0 + WAIT_SECONDS)
