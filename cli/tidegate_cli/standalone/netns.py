"""Named network namespaces, as `ip netns` makes and shows them.

Only namespaces: links and routes are `network`'s. Nothing here touches the
namespace that the process was started in.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from tidegate_bpf.netns import inside

from tidegate_cli.standalone.errors import NetworkError

__all__ = ["DIRECTORY", "create", "delete", "inside", "join", "names", "path", "unmount"]

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SHARED = 1 << 20
_MNT_DETACH = 2
_OWN = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, flags: int) -> None:
    _check(
        _libc.mount(source.encode(), target.encode(), b"none", flags, None),
        f"mount {source} on {target}",
    )


def unmount(target: Path) -> None:
    """Detaches the mount at `target`; one that is not mounted is no error."""
    if _libc.umount2(str(target).encode(), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOENT):
            raise OSError(number, f"umount {target}: {os.strerror(number)}")


def path(name: str) -> Path:
    return DIRECTORY / name


def join(netns: Path) -> None:
    """Moves the calling thread into the namespace, for good."""
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), f"setns {netns}")
    finally:
        os.close(fd)


def _prepare_directory() -> None:
    """`/run/netns` is a shared mount of itself, as `ip netns add` makes it:
    otherwise the first `ip netns add` after us would cover our mounts."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        _mount("", str(DIRECTORY), _MS_SHARED | _MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _mount(str(DIRECTORY), str(DIRECTORY), _MS_BIND | _MS_REC)
        _mount("", str(DIRECTORY), _MS_SHARED | _MS_REC)


def create(name: str, sysctls: dict[str, str]) -> Path:
    """Makes a namespace with `sysctls` (keys below /proc/sys/net) set before
    any link exists. Raises NetworkError."""
    target = path(name)
    try:
        _prepare_directory()
        target.touch(mode=0o444, exist_ok=False)
        own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.unshare(_CLONE_NEWNET), "unshare")
            try:
                _mount(_OWN, str(target), _MS_BIND)
                for key, value in sysctls.items():
                    Path("/proc/sys/net", key).write_text(value)
            finally:
                _check(_libc.setns(own, _CLONE_NEWNET), "setns back")
        finally:
            os.close(own)
    except OSError as error:
        delete(name)
        raise NetworkError(f"network namespace {name}: {error}") from error
    return target


def delete(name: str) -> bool:
    """True if there was one. The kernel frees it when its last process and
    socket are gone."""
    target = path(name)
    if not target.exists():
        return False
    try:
        unmount(target)
    except OSError as error:
        raise NetworkError(f"network namespace {name}: {error}") from error
    target.unlink(missing_ok=True)
    return True


def names(prefix: str) -> list[str]:
    if not DIRECTORY.is_dir():
        return []
    return sorted(entry.name for entry in DIRECTORY.iterdir() if entry.name.startswith(prefix))
