"""Where published objects lie: what any such place can do, and the run directory.

A store knows no meaning and no order: both are the Publisher's. It reads a kind whole,
writes a batch whose members do not depend on each other, and drops a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
from tidegate_api.state import Identity, NodeState, RuleSet, StateObject, StateSlice, encode

from tidegate_operator.problems import Problem

KIND_DIRECTORIES = {
    "Identity": "identities",
    "RuleSet": "rulesets",
    "StateSlice": "stateslices",
    "NodeState": "nodestates",
}
RELEASED_LABEL = "tidegate.dev/released"
"""On an Identity that nothing uses: when it was released, on the ledger's own count."""
MAX_FAILURES = 10
"""Failed writes that one error names."""

T = TypeVar("T", RuleSet, StateSlice, NodeState, Identity)


class PublishError(Exception):
    """Not everything could be written. What was written stands, and the next publish goes
    on from there."""


def failed(failures: Mapping[str, str]) -> PublishError:
    """One error for path -> reason."""
    names = sorted(failures)
    text = "; ".join(f"{name}: {failures[name]}" for name in names[:MAX_FAILURES])
    more = len(names) - MAX_FAILURES
    return PublishError(f"cannot write {text}" + (f"; and {more} more" if more > 0 else ""))


def path_of(item: StateObject) -> str:
    """The object's file below `objects/`; the name it goes by in errors and logs."""
    return path_to(item.kind, item.metadata.name)


def path_to(kind: str, name: str) -> str:
    return f"{KIND_DIRECTORIES[kind]}/{name}.json"


def alike(held: T, wanted: T) -> bool:
    """Equal as far as it is ours: other people's labels and annotations do not count, nor
    does a status."""
    if held.spec != wanted.spec:
        return False
    there, ours = held.metadata, wanted.metadata
    labels = there.labels or {}
    return (
        labels.get(RELEASED_LABEL) == (ours.labels or {}).get(RELEASED_LABEL)
        and (ours.labels or {}).items() <= labels.items()
        and (ours.annotations or {}).items() <= (there.annotations or {}).items()
        and (there.owner_references or []) == (ours.owner_references or [])
    )


class ObjectStore(Protocol):
    """Used by one thread. Errors that concern one object are returned, path -> reason, so that
    its neighbours are not stopped; whatever makes every write pointless is raised as
    PublishError."""

    def held(self, kind: type[T]) -> Mapping[str, T]:
        """name -> object, as far as we know what is there: an object is the same Python
        object until somebody changes it, and what was put is held as it was put. What
        cannot be understood is absent."""

    def put(self, batch: Sequence[StateObject]) -> Mapping[str, str]:
        """Create or replace each; in force when it returns."""

    def drop(self, kind: type[T], names: Sequence[str]) -> Mapping[str, str]:
        """Remove each; dropping what is not there succeeds."""

    def report(self, problems: Sequence[Problem]) -> Sequence[str]:
        """Say what is wrong with the input; what was written for it."""


# ---- The run directory -----------------------------------------------------------------


class FileStore:
    """`run_dir/objects`, whose only writer this is: read once, then known."""

    def __init__(self, run_dir: Path) -> None:
        self._objects = run_dir / "objects"
        self._held: dict[type[StateObject], dict[str, StateObject]] = {}
        self._problems: bytes | None = None
        self._followed: bytes | None = None

    def held(self, kind: type[T]) -> Mapping[str, T]:
        if kind not in self._held:
            self._held[kind] = {**read_all(self._objects, kind)}
        return self._held[kind]  # type: ignore[return-value]

    def put(self, batch: Sequence[StateObject]) -> Mapping[str, str]:
        for item in batch:
            try:
                self._put(item)
            except OSError as error:
                raise _unwritable(error) from error
            held = self._held.setdefault(type(item), {})
            held[item.metadata.name] = item
        return {}

    def drop(self, kind: type[T], names: Sequence[str]) -> Mapping[str, str]:
        for name in names:
            try:
                self._drop(path_to(kind.__name__, name))
            except OSError as error:
                raise _unwritable(error) from error
            self._held.setdefault(kind, {}).pop(name, None)
        return {}

    def report(self, problems: Sequence[Problem]) -> Sequence[str]:
        data = encode(list(problems))
        if data == self._problems:
            return ()
        try:
            _write(self._objects / "problems.json", data)
        except OSError as error:
            raise _unwritable(error) from error
        self._problems = data
        return ("problems.json",)

    def follow(self, files: Mapping[str, str], policies: Sequence[str]) -> None:
        """Say of what content of a folder this is the whole, and which policies it has. Raises
        PublishError."""
        data = encode({"files": dict(files), "policies": list(policies)})
        if data != self._followed:
            try:
                _write(self._objects / "folder.json", data)
            except OSError as error:
                raise _unwritable(error) from error
            self._followed = data

    def _put(self, item: StateObject) -> None:
        _write(self._objects / path_of(item), encode(item))

    def _drop(self, path: str) -> None:
        (self._objects / path).unlink(missing_ok=True)


def _unwritable(error: OSError) -> PublishError:
    return PublishError(f"cannot write {error.filename}: {error.strerror}")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_all(objects: Path, kind: type[T]) -> dict[str, T]:
    """name -> object for every readable file of `kind`. One that cannot be read or
    decoded counts as absent: it is written anew."""
    directory = objects / KIND_DIRECTORIES[kind.__name__]
    decoder = msgspec.json.Decoder(kind)
    found: dict[str, T] = {}
    for path in _files(directory):
        try:
            item = decoder.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError):
            continue
        if item.metadata.name == path.name.removesuffix(".json"):
            found[item.metadata.name] = item
    return found


def _files(directory: Path) -> Iterable[Path]:
    return sorted(directory.glob("*.json"))
