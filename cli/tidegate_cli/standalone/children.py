"""Processes that must live as long as the cluster does."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from tidegate_cli.standalone import cgroups

FIRST_BACKOFF_SECONDS = 0.1
LAST_BACKOFF_SECONDS = 10.0
# A process that lived this long starts again without delay.
STABLE_SECONDS = 10.0
STOP_SECONDS = 3.0
LOG_TAIL_BYTES = 2000

log = structlog.get_logger()


class Child:
    """One command, started again with back-off when it ends.

    Its output goes to `log_file`. It gets a process group of its own, so that
    the terminal's ^C reaches only the supervisor, which ends it in order."""

    def __init__(
        self, name: str, argv: Sequence[str], log_file: Path, cgroup: Path, *fds: int
    ) -> None:
        self.name = name
        self.restarts = 0
        self._argv = list(argv)
        self._log_file = log_file
        self._cgroup = cgroup
        self._fds = fds
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._backoff = 0.0
        self._next_start = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Raises OSError where the command cannot run."""
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=self._fds,
            )
        self._started = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            cgroups.add(self._cgroup, self._process.pid)

    def tend(self) -> float | None:
        """Starts the process again when its time has come. Seconds until the
        next call is due; None: only when a child ends."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            self._process = None
            lived = now - self._started
            grown = min(max(self._backoff * 2, FIRST_BACKOFF_SECONDS), LAST_BACKOFF_SECONDS)
            self._backoff = 0.0 if lived >= STABLE_SECONDS else grown
            self._next_start = now + self._backoff
            log.warning(
                "process ended", process=self.name, code=code, again_in_seconds=self._backoff
            )
        if now < self._next_start:
            return self._next_start - now
        self.restarts += 1
        self.start()
        return None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_tail(self) -> str:
        try:
            return self._log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
