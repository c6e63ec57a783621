"""The operator inside `up`: it goes on, whatever happens to a step."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tidegate_cli.standalone import feed
from tidegate_cli.standalone.rundir import RunDir
from tidegate_operator import standalone, world

PATIENCE = 60.0


def test_an_accident_does_not_end_the_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    operator = feed.OperatorFeed(RunDir.at(tmp_path / "run"), tmp_path / "f", world.DEFAULTS)
    operator.first()
    again = threading.Event()
    calls: list[int] = []

    def watch(_runner: object, stop: threading.Event, _report: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("an error of ours")
        again.set()
        stop.wait()

    monkeypatch.setattr(standalone.Runner, "watch", watch)
    monkeypatch.setattr(feed, "RETRY_SECONDS", 0.0)
    operator.follow(lambda _layout: None)
    assert again.wait(PATIENCE)
    operator.stop()
