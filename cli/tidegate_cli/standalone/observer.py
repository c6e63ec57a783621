"""The observer of a cluster: one process that reads every node's events. Nothing waits for it."""

from __future__ import annotations

import sys
from pathlib import Path

from tidegate_cli.live import objects_dir
from tidegate_cli.standalone.children import Child
from tidegate_cli.standalone.rundir import Node, RunDir


class Observer:
    """Implements `supervisor.Companion`."""

    def __init__(self, run_dir: RunDir, policy_log: tuple[str, ...] = ()) -> None:
        """`policy_log`: more of the observer's arguments."""
        self._run_dir = run_dir
        self._policy_log = policy_log
        self._child: Child | None = None

    def start(self, nodes: list[Node], cgroup: Path) -> None:
        argv = [sys.executable, "-m", "tidegate_observer", "--run-dir", str(self._run_dir.path)]
        for node in nodes:
            argv += ["--node", f"{node.name}={self._run_dir.bpf / node.name}"]
        argv += ["--objects", str(objects_dir()), "--socket", str(self._run_dir.observer)]
        # Where the nodes' are, as that of the processes of our own.
        argv += ["--cgroup", str(cgroup.parent)]
        argv += ["--metrics-file", str(self._run_dir.path / "observer.prom")]
        argv += ["--policy-log", str(self._run_dir.logs / "policy_action.log")]
        argv += self._policy_log
        self._child = Child("observer", argv, self._run_dir.logs / "observer.log", cgroup)
        self._child.start()

    def tend(self) -> float | None:
        return self._child.tend() if self._child is not None else None

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
