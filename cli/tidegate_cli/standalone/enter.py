"""Runs a command inside a pod: its network namespace and its cgroup.

Also `python -m tidegate_cli.standalone.enter NETNS CGROUP CMD…`, by which `up`
starts the command that a pod's annotation names. No policy, no state: two
moves and an exec. Stays slim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tidegate_cli.standalone import cgroups, netns

NOT_FOUND = 127
NOT_EXECUTABLE = 126


def enter(namespace: Path, cgroup: Path) -> None:
    """Moves this process (not only the thread: call it while there is one)."""
    cgroups.join(cgroup)
    netns.join(namespace)


def run(namespace: Path, cgroup: Path, argv: Sequence[str]) -> NoReturn:
    """Replaces this process; exits as a shell does where `argv` cannot run."""
    enter(namespace, cgroup)
    sys.stdout.flush()
    try:
        os.execvp(argv[0], list(argv))
    except FileNotFoundError:
        sys.stderr.write(f"tidegate: {argv[0]}: command not found\n")
        os._exit(NOT_FOUND)
    except OSError as error:
        sys.stderr.write(f"tidegate: {argv[0]}: {error.strerror}\n")
        os._exit(NOT_EXECUTABLE)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
