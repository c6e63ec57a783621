"""This process in a cgroup of its own, for programs that see its sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_bpf import features, mounts


@contextlib.contextmanager
def joined(name: str) -> Iterator[int]:
    """A descriptor of the new cgroup; the process is back where it was afterwards."""
    found, root = features.cgroup2(), mounts.cgroup2()
    if root is None:
        pytest.skip(found.detail)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = next(line[3:] for line in lines if line.startswith("0::"))
    made = Path(root) / name
    made.mkdir()
    try:
        _join(made)
        group = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield group
        finally:
            os.close(group)
    finally:
        _join(Path(root) / home.lstrip("/"))
        made.rmdir()


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
