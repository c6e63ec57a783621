"""Runs clusters without operator and loaders (`bare_cluster`), and waits."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import waiting
from tidegate_cli.standalone.rundir import RunDir, Supervisor

WAIT_SECONDS = 20.0
until = functools.partial(waiting.until, seconds=WAIT_SECONDS)


@dataclass
class Bare:
    """A supervisor process over `bare_cluster.py`, which reads a layout file."""

    run_dir: RunDir
    layout: Path
    process: subprocess.Popen[str] | None = None

    def up(self) -> Supervisor:
        script = Path(__file__).parent / "bare_cluster.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self.run_dir.path), str(self.layout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line.strip() != "ready":
            self.process.kill()
            pytest.fail(f"not ready: {line}{self.process.communicate()}")
        return self.state()

    def state(self) -> Supervisor:
        state = self.run_dir.read()
        assert state is not None
        return state

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.communicate(timeout=WAIT_SECONDS)
            self.process = None

    def run(self, pod: str, *argv: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from tidegate_cli import standalone as s; "
        code += "s.exec_in(sys.argv[2], sys.argv[3:], sys.argv[1])"
        command = [sys.executable, "-c", code, str(self.run_dir.path), pod, *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
