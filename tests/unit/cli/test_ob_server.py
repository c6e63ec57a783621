"""Whom `tidegate observe` asks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from tidegate_api.state import encode
from tidegate_cli.errors import CliError
from tidegate_cli.main import build_parser
from tidegate_cli.observe import command
from tidegate_cli.standalone.rundir import RunDir, Supervisor, start_time


def ask(run_dir: Path) -> str | None:
    return command.server_of(build_parser().parse_args(["--run-dir", str(run_dir), "observe"]))


def up(run_dir: Path, pid: int, started: int) -> None:
    """What an `up` of this process leaves."""
    state = Supervisor(
        pid=pid, start_time=started, folder="/f", id="x", cgroup="/c", ready=True, nodes=[], pods=[]
    )
    RunDir.at(run_dir).state.write_bytes(encode(state))


def test_an_observer_that_is_starting_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up(tmp_path, os.getpid(), start_time(os.getpid()) or 0)
    looked = threading.Event()
    monkeypatch.setattr(command.time, "sleep", lambda _seconds: looked.set())

    def serve() -> None:
        looked.wait()
        (tmp_path / "observer.sock").touch()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ask(tmp_path) == f"unix:{tmp_path / 'observer.sock'}"
    thread.join()


@pytest.mark.parametrize("reason", ["nothing is up", "it was killed", "it is without one"])
def test_no_observer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    if reason == "it was killed":
        up(tmp_path, os.getpid(), -1)
    if reason == "it is without one":
        up(tmp_path, os.getpid(), start_time(os.getpid()) or 0)
        monkeypatch.setattr(command, "STARTING_SECONDS", 0.0)
    with pytest.raises(CliError, match="no observer serves"):
        ask(tmp_path)
