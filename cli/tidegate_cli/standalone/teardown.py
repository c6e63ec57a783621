"""`tidegate down`: removes everything that belongs to one run directory.

Works from names alone (every name carries the run directory's id), so that it
needs no record of what a killed or half-done `up` had made. Removing what is
absent succeeds; nothing without the id in its name is touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tidegate_bpf import mounts

from tidegate_cli.standalone import cgroups, netns
from tidegate_cli.standalone.errors import PrerequisiteError, StandaloneError
from tidegate_cli.standalone.rundir import RunDir, Supervisor, is_alive, locked, start_time

TERM_SECONDS = 15.0
KILL_SECONDS = 5.0
_POLL_SECONDS = 0.01

_OWN_DIRECTORIES = ("objects", "nodes", "log", "bpf")
_OWN_FILES = (
    ".supervisor.json.tmp",
    "supervisor.json",
    "observer.sock",
    "observer.lock",
    "observer.prom",
    ".observer.prom.tmp",
)
_OWN_PATTERNS = ("lost-*", ".lost-*", "told-*", "carried-*", ".carried-*")
"""One a node."""


@dataclass(frozen=True)
class Inventory:
    """What of a run directory exists on this machine."""

    supervisor: int | None
    namespaces: list[str]
    cgroup: Path | None
    processes: int
    mounts: list[str]
    run_dir: bool

    def __bool__(self) -> bool:
        return bool(
            self.supervisor or self.namespaces or self.cgroup or self.mounts or self.run_dir
        )

    def __str__(self) -> str:
        parts = []
        if self.supervisor:
            parts.append(f"supervisor {self.supervisor}")
        if self.processes:
            parts.append(f"{self.processes} processes")
        if self.namespaces:
            parts.append(f"{len(self.namespaces)} network namespaces")
        if self.cgroup:
            parts.append(f"cgroup {self.cgroup}")
        parts += [f"mount {mount}" for mount in self.mounts]
        if self.run_dir:
            parts.append("run directory")
        return ", ".join(parts)


def cgroup_of(run_dir: RunDir) -> Path:
    """Raises PrerequisiteError."""
    return cgroups.mount_point() / f"tidegate-{run_dir.id}"


def inventory(run_dir: RunDir) -> Inventory:
    cgroup = None
    with contextlib.suppress(PrerequisiteError):
        cgroup = cgroup_of(run_dir)
    if cgroup is not None and not cgroup.is_dir():
        cgroup = None
    state = _state(run_dir)
    own = [run_dir.lock, *(run_dir.path / name for name in (*_OWN_DIRECTORIES, *_OWN_FILES))]
    return Inventory(
        supervisor=state.pid if state and is_alive(state) else None,
        namespaces=netns.names(run_dir.netns_prefix),
        cgroup=cgroup,
        processes=len(cgroups.processes(cgroup)) if cgroup else 0,
        mounts=_mounts(run_dir),
        run_dir=any(place.exists() for place in own),
    )


def down(run_dir: RunDir) -> Inventory:
    """Ends the supervisor and removes what is left; returns what there was.
    Raises StandaloneError for what will not go."""
    before = inventory(run_dir)
    state = _state(run_dir)
    if state is not None:
        _end(state)
    if run_dir.path.is_dir():
        with locked(run_dir):
            clean(run_dir)
    else:
        clean(run_dir)
    return before


def clean(run_dir: RunDir) -> None:
    """Removes everything but a living supervisor, the lock and the directory
    itself: those go with the lock, which the caller holds."""
    with contextlib.suppress(PrerequisiteError):
        cgroups.remove(cgroup_of(run_dir))
    for name in netns.names(run_dir.netns_prefix):
        netns.delete(name)
    for mount in reversed(_mounts(run_dir)):
        netns.unmount(Path(mount))
    for name in _OWN_DIRECTORIES:
        shutil.rmtree(run_dir.path / name, ignore_errors=True)
    for path in (run_dir.path / name for name in _OWN_FILES):
        path.unlink(missing_ok=True)
    for path in itertools.chain.from_iterable(map(run_dir.path.glob, _OWN_PATTERNS)):
        path.unlink(missing_ok=True)


def _state(run_dir: RunDir) -> Supervisor | None:
    try:
        return run_dir.read()
    except StandaloneError:
        return None


def _mounts(run_dir: RunDir) -> list[str]:
    """Mount points below the run directory, in the order of mounting."""
    below = f"{run_dir.path}/"
    return [mount.path for mount in mounts.mounts() if mount.path.startswith(below)]


def _end(state: Supervisor) -> None:
    try:
        fd = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return
    try:
        # Checked after the open: the descriptor cannot move to another process.
        if start_time(state.pid) != state.start_time:
            return
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not is_alive(state):
                    return
                time.sleep(_POLL_SECONDS)
    finally:
        os.close(fd)
    raise StandaloneError(f"process {state.pid} (tidegate up) does not die: look at it")
