"""`tidegate up`: the one process that owns a run directory.

Holds the lock, follows the folder through a `Feed` (the operator), keeps the
`Cluster` (the kernel's objects) and the loaders (a `Launcher`) as the feed
says. Decides nothing about policy. All kernel work is done by the main thread.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
from msgspec import UNSET
from tidegate_api.state import encode

from tidegate_cli.standalone import cgroups
from tidegate_cli.standalone.cluster import Cluster, Layout
from tidegate_cli.standalone.errors import ReadinessError, StandaloneError
from tidegate_cli.standalone.rundir import (
    Node,
    Pod,
    RunDir,
    Supervisor,
    locked,
    start_time,
    write_atomic,
)
from tidegate_cli.standalone.teardown import cgroup_of, clean

READY_SECONDS = 60.0
# How long the feed waits for the pods of a change before it publishes their policy.
APPLY_SECONDS = 10.0
# While an interface waits for its loader, and until the cluster is ready.
WAIT_POLL_SECONDS = 0.01

log = structlog.get_logger()


class Feed(Protocol):
    """Where layouts come from. `first` publishes and returns the first one;
    `follow` then calls back, in a thread of its own, after each change."""

    def first(self) -> Layout: ...

    def follow(self, changed: Callable[[Layout], None]) -> None: ...

    def summary(self) -> str:
        """What people want to know beyond nodes and pods."""
        ...

    def stop(self) -> None: ...


class Launcher(Protocol):
    """What enforces policy on the nodes; `loaders.Loaders`."""

    def check(self) -> None: ...

    def start(self, nodes: list[Node], cgroup: Path) -> None: ...

    def gate(self, pod: Pod) -> bool: ...

    def realised(self, node: Node) -> bool: ...

    def tend(self) -> float | None: ...

    def failure(self) -> str: ...

    def stop(self) -> None: ...


class Companion(Protocol):
    """A process that nothing depends on; `observer.Observer`."""

    def start(self, nodes: list[Node], cgroup: Path) -> None: ...

    def tend(self) -> float | None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a supervisor is made of."""

    run_dir: RunDir
    folder: Path
    feed: Feed
    launcher: Launcher
    wait: float = READY_SECONDS
    """Seconds until everything must be realised, or `serve` gives up."""
    companion: Companion | None = None
    excluded_labels: tuple[str, ...] | None = None
    """For who counts identities; None: the default."""


class _Stopped(Exception):
    """A signal asked the supervisor to end."""


class _Wakeup:
    """Signals and other threads end the main loop's wait through this socket."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._read, selectors.EVENT_READ)
        self.stopped = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        }
        old = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            self._read.close()
            self._write.close()

    def _on_signal(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self.stopped = True

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._write.send(b"\0")

    def wait(self, timeout: float | None) -> None:
        """Raises _Stopped."""
        if not self.stopped:
            self._selector.select(timeout)
            with contextlib.suppress(BlockingIOError):
                self._read.recv(4096)
        if self.stopped:
            raise _Stopped


class _Main:
    def __init__(self, parts: Parts, cgroup: Path) -> None:
        self._parts = parts
        self._cgroup = cgroup
        self._cluster = Cluster(parts.run_dir, cgroup, parts.launcher.gate)
        self._wakeup = _Wakeup()
        self._latest: deque[Layout] = deque(maxlen=1)
        self._applied = threading.Event()
        self._ready = False
        self._problems: list[str] = []

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Until a signal. Raises StandaloneError when it does not get ready."""
        with self._wakeup.signals():
            try:
                self._write_state()
                self._start()
                self._ready = True
                self._write_state()
                if self._parts.companion is not None:
                    self._parts.companion.start(self._cluster.nodes, self._cluster.system_cgroup)
                on_ready(self._summary())
                log.info("ready")
                self._follow()
            except _Stopped:
                log.info("stopping")
            finally:
                self._parts.feed.stop()
                if self._parts.companion is not None:
                    self._parts.companion.stop()
                self._parts.launcher.stop()
                self._cluster.stop()

    def _start(self) -> None:
        layout = self._parts.feed.first()
        self._cluster.start(layout.nodes)
        # The loaders load their programs while the pods are made.
        self._parts.launcher.start(layout.nodes, self._cluster.system_cgroup)
        self._apply(layout)
        deadline = time.monotonic() + self._parts.wait
        while not self._realised():
            if time.monotonic() > deadline or self._parts.launcher.failure():
                reason = self._parts.launcher.failure() or f"not ready in {self._parts.wait:.0f} s"
                raise ReadinessError(reason)
            self._parts.launcher.tend()
            self._wakeup.wait(WAIT_POLL_SECONDS)

    def _realised(self) -> bool:
        connected = self._cluster.connect()
        return connected and all(map(self._parts.launcher.realised, self._cluster.nodes))

    def _follow(self) -> None:
        self._parts.feed.follow(self._on_change)
        waiting = False
        while True:
            dues = [self._cluster.tend(), self._parts.launcher.tend()]
            if self._parts.companion is not None:
                dues.append(self._parts.companion.tend())
            if waiting:
                dues.append(WAIT_POLL_SECONDS)
            self._wakeup.wait(min((due for due in dues if due is not None), default=None))
            try:
                if self._latest:
                    self._apply(self._latest.pop())
                    self._write_state()
                waiting = not self._cluster.connect()
                self._applied.set()
            except (StandaloneError, OSError) as error:
                # One pod that cannot be made must not end the others.
                log.error("cannot follow the change", error=str(error))
                self._applied.set()

    def _on_change(self, layout: Layout) -> None:
        """Returns when the change is made: what is removed is gone before its
        policy goes, what is new is there before its policy is."""
        self._applied.clear()
        self._latest.append(layout)
        self._wakeup.wake()
        self._applied.wait(APPLY_SECONDS)

    def _apply(self, layout: Layout) -> None:
        self._problems = self._cluster.apply(layout.pods)
        known = {node.name for node in self._cluster.nodes}
        for node in layout.nodes:
            if node.name not in known:
                self._problems.append(
                    f"node {node.name} is new: it joins at the next `tidegate up`"
                )
        for problem in self._problems:
            log.warning("problem", message=problem)

    def _write_state(self) -> None:
        pid, excluded = os.getpid(), self._parts.excluded_labels
        state = Supervisor(
            pid=pid,
            start_time=start_time(pid) or 0,
            folder=str(self._parts.folder),
            id=self._parts.run_dir.id,
            cgroup=str(self._cgroup),
            ready=self._ready,
            nodes=self._cluster.nodes,
            pods=self._cluster.pods,
            excluded_labels=UNSET if excluded is None else list(excluded),
        )
        write_atomic(self._parts.run_dir.state, encode(state))

    def _summary(self) -> str:
        lines = [f"{'NODE':<24} ADDRESSES"]
        for node in self._cluster.nodes:
            lines.append(f"{node.name:<24} {', '.join(node.addresses)}")
        pods = sorted(self._cluster.pods, key=lambda pod: pod.key)
        width = max([len(pod.key) for pod in pods] + [8])
        lines += ["", f"{'POD':<{width}}  {'NODE':<16} {'PORTS':<24} ADDRESSES"]
        for pod in pods:
            ports = ",".join(f"{port.port}/{port.protocol}" for port in pod.ports) or "-"
            addresses = ", ".join(pod.addresses)
            lines.append(f"{pod.key:<{width}}  {pod.node:<16} {ports:<24} {addresses}")
        rest = self._parts.feed.summary()
        if rest:
            lines += ["", rest]
        if self._problems:
            lines += ["", *self._problems]
        return "\n".join(lines)


def serve(parts: Parts, on_ready: Callable[[str], None]) -> None:
    """Runs a cluster in the foreground until SIGTERM or SIGINT, and leaves
    nothing behind, whatever happens but SIGKILL. `on_ready` gets the summary.
    Raises StandaloneError."""
    parts.launcher.check()
    _refuse_foreign(parts.run_dir)
    cgroup = cgroup_of(parts.run_dir)
    with locked(parts.run_dir):
        # What a killed `up` left behind.
        clean(parts.run_dir)
        try:
            parts.run_dir.logs.mkdir()
            cgroups.create(cgroup)
            with _logging(parts.run_dir.logs / "up.log"):
                _Main(parts, cgroup).run(on_ready)
        finally:
            clean(parts.run_dir)


@contextlib.contextmanager
def _logging(target: Path) -> Iterator[None]:
    with target.open("a", buffering=1) as stream:
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            logger_factory=structlog.PrintLoggerFactory(stream),
        )
        try:
            yield
        finally:
            structlog.reset_defaults()


def _refuse_foreign(run_dir: RunDir) -> None:
    """`down` removes what lies in a run directory: never somebody's own folder."""
    with contextlib.suppress(FileNotFoundError):
        entries = {entry.name for entry in run_dir.path.iterdir()}
        if entries and not entries & {run_dir.state.name, run_dir.lock.name}:
            raise StandaloneError(
                f"{run_dir.path} is not empty and no run directory: choose another --run-dir"
            )


def detached(run: Callable[[Callable[[str], None]], None], log_file: Path) -> int:
    """Runs `run(on_ready)` in a background process; returns its exit code once
    it is ready (0, summary printed) or has failed."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        os.setsid()
        _child(run, write, log_file)
    os.close(write)
    with open(read, encoding="utf-8") as answer:
        text = answer.read()
    status, _, rest = text.partition("\n")
    if status == "ready":
        sys.stdout.write(rest)
        return 0
    sys.stderr.write(rest or "tidegate: up ended before it was ready\n")
    return 2


def _child(run: Callable[[Callable[[str], None]], None], pipe: int, log_file: Path) -> None:
    """Never returns: the parent's stack is not this process's to unwind."""
    code = 1
    answer = open(pipe, "w", encoding="utf-8")  # noqa: SIM115 - closed when ready, long before the end

    def on_ready(summary: str) -> None:
        answer.write(f"ready\n{summary}\n")
        answer.close()
        _redirect(log_file)

    try:
        run(on_ready)
        code = 0
    except StandaloneError as error:
        if not answer.closed:
            answer.write(f"failed\ntidegate: {error}\n")
    except Exception:
        # The top of a process; `finally` would swallow it.
        traceback.print_exc()
    finally:
        if not answer.closed:
            answer.close()
        os._exit(code)


def _redirect(log_file: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(fd, target)
    os.close(null)
    os.close(output)
