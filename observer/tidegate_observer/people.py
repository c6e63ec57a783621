"""Who lives where: pods with what flows show of them, and what identities stand for.

`People` is what a `rundir.RunDirSource` asks; here from the files of a run directory, in `informer`
from an API server. Also reading files again only where they changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import structlog
from tidegate_api.state import Identity

from tidegate_observer.directory import identity_end, pod_labels
from tidegate_observer.flow import End

log = structlog.get_logger()
T = TypeVar("T")
Stamp = tuple[int, int, int]
PodKey = tuple[str, str]
"""(namespace, name)"""


class Pod(msgspec.Struct, frozen=True):
    """What is shown of a pod."""

    addresses: tuple[str, ...] = ()
    """None once it has ended, or while it has none: they may be another's."""
    host_network: bool = False
    labels: tuple[str, ...] = ()
    """As `directory.pod_labels` makes them."""
    workload: str = ""
    workload_kind: str = ""
    node: str = ""
    observes: bool = False
    """An observer is in it, if it is of the right namespace."""
    uid: str = ""
    """That its cgroup is named by, if it is in the node's network; else ""."""


class People(Protocol):
    """Asked by one thread."""

    def fresh(self) -> bool:
        """Whether anything changed since this was asked last."""

    @property
    def pods(self) -> Mapping[PodKey, Pod]: ...

    @property
    def identities(self) -> Mapping[int, End]:
        """What each number stands for, as far as it is known."""


class Files:
    """Files read as JSON, each only if it changed since it was read last."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamp] = {}

    def fresh(self, path: Path, kind: type[T]) -> T | None:
        """None: it did not change, is not there, or is not one of these, which is logged."""
        try:
            found = os.stat(path)
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if self._stamps.get(path) == stamp:
                return None
            value = msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            log.warning("not readable, left out", file=str(path), error=str(error))
            self._stamps[path] = stamp
            return None
        self._stamps[path] = stamp
        return value

    def known(self, path: Path) -> bool:
        """Whether it was read."""
        return path in self._stamps

    def forget(self, path: Path) -> None:
        self._stamps.pop(path, None)


def objects_in(directory: Path) -> Iterator[Path]:
    """The objects' files there, by name."""
    try:
        with os.scandir(directory) as entries:
            names = [e.name for e in entries if e.name.endswith(".json") and e.name[0] != "."]
    except FileNotFoundError:
        return
    for name in sorted(names):
        yield directory / name


class _Pod(msgspec.Struct, frozen=True, rename="camel"):
    namespace: str
    name: str
    uid: str = ""
    addresses: list[str] = []
    host_network: bool = False
    labels: dict[str, str] = {}
    workload: str = ""
    workload_kind: str = ""


class _Supervisor(msgspec.Struct, frozen=True):
    """What supervisor.json says that matters here; other members pass."""

    pods: list[_Pod] = []


class RunDirPeople:
    """Of a run directory of `tidegate up`: `supervisor.json` and the objects' identities/."""

    def __init__(self, run_dir: Path, objects: Path) -> None:
        self.pods: Mapping[PodKey, Pod] = {}
        self.identities: dict[int, End] = {}
        self._supervisor = run_dir / "supervisor.json"
        self._directory = objects / "identities"
        self._files = Files()

    def fresh(self) -> bool:
        changed = False
        for path in objects_in(self._directory):
            # They never change.
            if path.stem.isdigit() and not self._files.known(path):
                item = self._files.fresh(path, Identity)
                if item is not None:
                    number = int(path.stem)
                    self.identities[number] = identity_end(item, number)
                    changed = True
        found = self._files.fresh(self._supervisor, _Supervisor)
        if found is not None:
            self.pods = {(pod.namespace, pod.name): _shown(pod) for pod in found.pods}
            changed = True
        return changed


def _shown(pod: _Pod) -> Pod:
    labels = pod_labels(pod.namespace, pod.labels)
    uid = pod.uid if pod.host_network else ""
    made = pod.workload, pod.workload_kind
    return Pod(tuple(pod.addresses), pod.host_network, labels, *made, uid=uid)
