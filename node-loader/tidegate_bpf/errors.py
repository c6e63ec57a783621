"""What can go wrong at the border to libbpf and the kernel. No logic beyond the mapping from errno.

    BpfError (OSError)         any failed call; `errno` and `strerror` as in OSError
    ├── PermissionDenied       EPERM, EACCES: `doctor` names the missing capability
    ├── NotSupported           this kernel lacks the feature; `.feature` names it
    ├── VerifierError          a program was rejected; its last useful line; `.log`: all
    ├── MapFull                no room for an element (E2BIG, ENOSPC); `.done` = elements written
    ├── LayoutError            object, pin and Python disagree about a layout
    └── LibraryMissing         libbpf.so.1 is absent or too old

`KeyError` is raised only for an absent key in mapping-like access.
"""

from __future__ import annotations

import errno
import os

ENOTSUPP = 524
"""Kernel-internal "not supported" that bpf(2) leaks; the errno module has no name for it."""


class BpfError(OSError):
    """A call failed. `BpfError(errno, what)`."""


class PermissionDenied(BpfError):
    """The kernel refused the call for want of a capability, or by lockdown."""


class NotSupported(BpfError):
    """The running kernel lacks `feature`."""

    def __init__(self, feature: str, code: int = errno.EOPNOTSUPP) -> None:
        super().__init__(code, f"this kernel does not support {feature}")
        self.feature = feature


class VerifierError(BpfError):
    """The verifier rejected `program`; `log` is its whole log."""

    def __init__(self, code: int, program: str, log: str) -> None:
        super().__init__(code, f"program {program}: {last_useful_line(log)}")
        self.program = program
        self.log = log


class MapFull(BpfError):
    """The map has no room; `done` elements of the call were written."""

    def __init__(self, code: int, what: str, done: int = 0) -> None:
        super().__init__(code, what)
        self.done = done


class LayoutError(BpfError):
    """Two descriptions of one layout differ."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)


class LibraryMissing(BpfError):
    """libbpf cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ELIBACC, message)


_NOISE = ("processed ", "verification time", "stack depth", "peak_states")


def last_useful_line(log: str) -> str:
    """The line of a verifier log that says why: the last one that is not a statistic."""
    for line in reversed(log.splitlines()):
        text = line.strip()
        if text and not text.startswith(_NOISE):
            return text
    return "rejected without a log"


def error(code: int, what: str) -> BpfError:
    """The exception for a positive errno of a call that did `what`."""
    text = f"{what}: {os.strerror(code) if code != ENOTSUPP else 'not supported'}"
    if code in (errno.EPERM, errno.EACCES):
        return PermissionDenied(code, text)
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, ENOTSUPP):
        return NotSupported(what, code)
    return BpfError(code, text)
