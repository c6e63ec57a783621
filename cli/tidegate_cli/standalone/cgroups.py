"""cgroup2 directories: `tidegate-<id>/<node>/<pod uid>`.

Socket load balancing is attached at a node's directory, so a pod's processes
must be below it. No controller is enabled: the directories only group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from tidegate_bpf import features

from tidegate_cli.standalone.errors import PrerequisiteError, StandaloneError

KILL_SECONDS = 5.0
_POLL_SECONDS = 0.01


def mount_point() -> Path:
    """Where cgroup2 is mounted (`/sys/fs/cgroup/unified` on hybrid systems).
    Raises PrerequisiteError."""
    probe = features.cgroup2()
    if not probe.ok:
        raise PrerequisiteError(f"cgroup2 is {probe.detail}: {probe.remedy}")
    return Path(probe.detail)


def create(directory: Path) -> None:
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)


def join(directory: Path) -> None:
    """Moves the calling process."""
    (directory / "cgroup.procs").write_text("0")


def add(directory: Path, pid: int) -> None:
    (directory / "cgroup.procs").write_text(str(pid))


def processes(directory: Path) -> list[int]:
    """Every process at or below the directory."""
    pids: list[int] = []
    for place, _, _ in os.walk(directory):
        with contextlib.suppress(OSError):
            pids += [int(line) for line in Path(place, "cgroup.procs").read_text().split()]
    return pids


def remove(directory: Path) -> int:
    """Kills what runs below the directory, removes it, and returns how many
    processes it killed. Removing what is absent succeeds. Raises StandaloneError."""
    if not directory.is_dir():
        return 0
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        pids = processes(directory)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        if not pids and _remove_tree(directory):
            return len(killed)
        if time.monotonic() > deadline:
            raise StandaloneError(f"{directory} stays busy: processes {pids}")
        time.sleep(_POLL_SECONDS)


def _remove_tree(directory: Path) -> bool:
    """False: a process that has just died, or just come, keeps it busy."""
    try:
        for place, _, _ in os.walk(directory, topdown=False):
            Path(place).rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
