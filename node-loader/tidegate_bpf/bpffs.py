"""Mounting a bpffs, where pins live."""

from __future__ import annotations

import ctypes
import os

from tidegate_bpf import mounts
from tidegate_bpf.errors import error
from tidegate_bpf.lib import libc

_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_DETACH = 2


def is_bpffs(path: str | os.PathLike[str]) -> bool:
    """Whether `path` exists and lies on a bpffs."""
    try:
        return mounts.fstype(path) == "bpf"
    except FileNotFoundError:
        return False


def mount(path: str | os.PathLike[str]) -> None:
    """Mount a new bpffs (mode 0700) on directory `path`. Raises BpfError, PermissionDenied."""
    code = libc().mount(
        b"bpf",
        os.fsencode(path),
        b"bpf",
        ctypes.c_ulong(_NOSUID | _NODEV | _NOEXEC),
        b"mode=0700",
    )
    if code:
        raise error(ctypes.get_errno(), f"mount bpffs on {os.fspath(path)}")


def unmount(path: str | os.PathLike[str]) -> None:
    """Unmount at once, even if in use: what is pinned there alone goes when its last user does."""
    if libc().umount2(os.fsencode(path), _DETACH):
        raise error(ctypes.get_errno(), f"unmount {os.fspath(path)}")
