"""The run directory: its paths, its id, `supervisor.json` and the lock.

Format: docs/architecture.md, "The run directory". No network and no cgroup is
touched here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tidegate_cli.standalone.errors import AlreadyUpError, NotUpError, StandaloneError

# AF_UNIX paths hold 107 bytes.
_MAX_PATH_BYTES = 90


class Port(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    name: str = ""
    port: int
    protocol: str
    """TCP, UDP or SCTP."""


class Node(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    name: str
    addresses: list[str]
    """IPv4 and IPv6, in this order, without prefix length."""
    pod_cidrs: list[str]
    netns: str
    cgroup: str


class Pod(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    uid: str
    namespace: str
    name: str
    node: str
    addresses: list[str]
    ports: list[Port]
    host_network: bool
    command: str
    """The annotation `tidegate.dev/command`; "" = the built-in responder."""
    netns: str
    cgroup: str
    labels: dict[str, str] = {}
    """The pod's own, as written: for people to whom flows are shown."""
    workload: str = ""
    workload_kind: str = ""
    """What made the pod; "": it was written as a pod."""
    ifname: str
    """The host side's name in the node's namespace; "" for host-network pods."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    def is_made_as(self, other: Pod) -> bool:
        """Whether one can become the other and live on: labels and what made it are only told."""
        told = {"labels": other.labels, "workload": other.workload}
        told["workload_kind"] = other.workload_kind
        return msgspec.structs.replace(self, **told) == other


class Supervisor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`supervisor.json`. Written first when the lock is taken, and again after
    every change of nodes or pods."""

    pid: int
    start_time: int
    """Field 22 of /proc/<pid>/stat: a reused pid does not have it."""
    folder: str
    id: str
    cgroup: str
    ready: bool
    nodes: list[Node]
    pods: list[Pod]
    excluded_labels: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Label keys that make no identity by labels; absent: those of `relevance.EXCLUDED`."""


_decoder = msgspec.json.Decoder(Supervisor)


@dataclass(frozen=True)
class RunDir:
    path: Path

    @classmethod
    def at(cls, path: Path | str) -> RunDir:
        """Raises StandaloneError for a path that cannot hold the lock."""
        resolved = Path(path).resolve()
        if len(os.fsencode(resolved)) > _MAX_PATH_BYTES:
            raise StandaloneError(
                f"run directory {resolved}: longer than {_MAX_PATH_BYTES} bytes; use a shorter path"
            )
        return cls(resolved)

    @property
    def id(self) -> str:
        """Names everything that this run directory owns outside of itself."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:6]

    @property
    def netns_prefix(self) -> str:
        return f"tg-{self.id}-"

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    @property
    def bpf(self) -> Path:
        return self.path / "bpf"

    @property
    def logs(self) -> Path:
        return self.path / "log"

    @property
    def state(self) -> Path:
        return self.path / "supervisor.json"

    @property
    def observer(self) -> Path:
        """Where the observer serves. As short as the lock's: it is a socket, too."""
        return self.path / "observer.sock"

    @property
    def lock(self) -> Path:
        return self.path / "supervisor.sock"

    def interface(self, node: str, uid: str) -> Path:
        return self.path / "nodes" / node / "interfaces" / f"{uid}.json"

    def realised(self, node: str) -> Path:
        return self.path / "nodes" / node / "realised.json"

    def read(self) -> Supervisor | None:
        """None: no `up` has got as far as the lock. Raises StandaloneError."""
        try:
            return _decoder.decode(self.state.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise StandaloneError(f"{self.state}: {error}") from error

    def require(self) -> Supervisor:
        """Raises NotUpError where nothing is up."""
        state = self.read()
        if state is None:
            raise NotUpError(f"nothing is up in {self.path}: run `tidegate up DIR` first")
        return state


def write_atomic(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.tmp"
    temporary.write_bytes(data)
    temporary.rename(target)


def start_time(pid: int) -> int | None:
    """Of a living process; None if there is none (a zombie is none)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name is in parentheses and may hold anything.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(state: Supervisor) -> bool:
    return start_time(state.pid) == state.start_time


@contextlib.contextmanager
def locked(run_dir: RunDir) -> Iterator[None]:
    """Holds `supervisor.sock`. Raises AlreadyUpError. The flock makes taking
    over the socket of a killed supervisor free of races."""
    guard = _guard(run_dir)
    try:
        run_dir.lock.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(str(run_dir.lock))
            sock.listen(1)
            try:
                yield
            finally:
                run_dir.lock.unlink(missing_ok=True)
                # Only an empty directory goes: whoever cleaned it up meant it to.
                with contextlib.suppress(OSError):
                    run_dir.path.rmdir()
    finally:
        os.close(guard)


def _guard(run_dir: RunDir) -> int:
    while True:
        run_dir.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        guard = os.open(run_dir.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(guard)
            raise AlreadyUpError(_already_up(run_dir)) from None
        # A `down` may have removed the directory between open and flock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(guard), os.stat(run_dir.path)):
                return guard
        os.close(guard)


def _already_up(run_dir: RunDir) -> str:
    state = run_dir.read()
    if state is None:
        return f"another `tidegate up` is starting in {run_dir.path}"
    return (
        f"already up: process {state.pid} follows {state.folder} (run directory {run_dir.path}); "
        "run `tidegate down` first"
    )


def short_name(text: str, limit: int) -> str:
    """A file-name-safe name of at most `limit` characters, unique for `text`."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if safe == text and len(safe) <= limit:
        return safe
    return f"{safe[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
