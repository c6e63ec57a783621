"""The files of a folder: which there are, and what they hold, also while others write, move and
link them. Knows nothing of what is written in them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tidegate_operator.problems import Problem

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 16 << 20
MAX_FILES = 10_000


class Unusable(Exception):
    """It is there and is not what we read; says why."""


class Gone(Exception):
    """There is no such file any more."""


@dataclass(frozen=True)
class Listing:
    """`names` is None if the folder itself could not be listed; `unreadable` are
    directories below it that could not."""

    names: tuple[str, ...] | None
    unreadable: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def listed(root: Path) -> Listing:
    """Names relative to `root`, sorted; those that begin with a dot left out."""
    names: list[str] = []
    links: list[str] = []
    failed: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        failed.append((os.path.relpath(error.filename, root), error.strerror or "unreadable"))

    for where, directories, files in os.walk(root, onerror=note, followlinks=False):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        below = "" if where == str(root) else f"{os.path.relpath(where, root)}/"
        links += [below + name for name in directories if os.path.islink(os.path.join(where, name))]
        for name in files:
            if not name.startswith(".") and name.endswith(SUFFIXES):
                names.append(below + name)
    problems = [
        Problem(
            severity="error",
            file="" if name == "." else name,
            message=f"the folder cannot be read: {reason}; what it held stays in force",
            remedy="bring it back, or make it readable",
        )
        for name, reason in failed
    ]
    problems += [
        Problem(
            severity="warning",
            file=name,
            message="is a link to a folder; what is in there is not read",
            remedy="put the manifests themselves here",
        )
        for name in links
    ]
    if any(name == "." for name, _ in failed):
        return Listing(None, (), tuple(problems))
    if not root.is_dir():
        text = "the folder is not there; what it held stays in force"
        problem = Problem(severity="error", message=text, remedy="bring it back")
        return Listing(None, (), (problem,))
    if len(names) > MAX_FILES:
        text = f"{len(names)} files; what was in force stays"
        remedy = f"keep at most {MAX_FILES} manifests in one folder"
        return Listing(None, (), (Problem(severity="error", message=text, remedy=remedy),))
    return Listing(tuple(sorted(names)), tuple(name for name, _ in failed), tuple(problems))


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None: it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def contents(path: Path) -> bytes:
    """Raises Gone, Unusable or OSError. A link is there as long as it is, also if what it points
    to is not."""
    try:
        # O_NONBLOCK: a FIFO named x.yaml must not stop us.
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ENOENT, "it is a link to a file that is not there") from None
        raise Gone from None
    with open(opened, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("it is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise Unusable(f"it has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
        return file.read(MAX_FILE_BYTES + 1)
