"""Commands, progress and locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TAIL_CHARACTERS = 4000
_START = time.monotonic()


class Failed(Exception):
    """Something did not do what was asked. The message says what, and what it said last."""


def say(text: str) -> None:
    """One line of progress, with the seconds since the program began."""
    print(
        f"\033[1m==>\033[0m [{time.monotonic() - _START:.0f}s] {text}", file=sys.stderr, flush=True
    )


def run(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | bytes = b"",
) -> str:
    """What the command prints. `env` is added to the environment.

    Raises Failed where it ends with another status than 0 or does not exist."""
    result = attempt(*argv, env=env, cwd=cwd, stdin=stdin)
    if result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip())[-TAIL_CHARACTERS:]
        raise Failed(f"{_line(argv)} ended with status {result.returncode}:\n{said}")
    return result.stdout


def attempt(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | bytes = b"",
) -> subprocess.CompletedProcess[str]:
    """The ended command, whatever its status. Raises Failed where there is no such command."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    try:
        ended = subprocess.run(
            [str(a) for a in argv],
            input=given,
            capture_output=True,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            check=False,
        )
    except FileNotFoundError as error:
        raise Failed(f"{_line(argv)}: no such program") from error
    return subprocess.CompletedProcess(
        ended.args,
        ended.returncode,
        ended.stdout.decode(errors="replace"),
        ended.stderr.decode(errors="replace"),
    )


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock that lies at `path`; waits for another holder, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run holds {path.name}; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(argv: Sequence[str | Path]) -> str:
    return " ".join(str(a) for a in argv[:6]) + (" …" if len(argv) > 6 else "")
