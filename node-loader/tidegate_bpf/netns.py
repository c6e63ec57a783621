"""Working inside another network namespace."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from tidegate_bpf.errors import error
from tidegate_bpf.lib import libc

_CLONE_NEWNET = 0x40000000


def _enter(fd: int) -> None:
    # Python 3.11 has no os.setns.
    if libc().setns(fd, _CLONE_NEWNET):
        raise error(ctypes.get_errno(), "enter network namespace")


@contextlib.contextmanager
def inside(namespace: str | os.PathLike[str] | int) -> Iterator[None]:
    """The calling thread, and no other, is in `namespace` (a path or a descriptor) for the block;
    descriptors made there stay valid. Raises OSError, PermissionDenied."""
    with contextlib.ExitStack() as stack:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        if isinstance(namespace, int):
            target = namespace
        else:
            target = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, target)
        _enter(target)
        stack.callback(_enter, home)
        yield
