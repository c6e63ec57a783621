"""The loaders of a cluster, one process a node, as `up` sees them.

Starts, restarts and asks them through their files; knows nothing of maps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tidegate_api.state import NodeState, digest
from tidegate_bpf import bpffs, features
from tidegate_loader.local import NodePaths, Realised, read_realised

from tidegate_cli.live import objects_dir
from tidegate_cli.standalone.children import Child
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.network import index_of
from tidegate_cli.standalone.rundir import Node, Pod, RunDir


def check() -> None:
    """Raises CliError with every missing thing and its remedy."""
    probes = [
        features.capabilities(),
        features.library(),
        features.kernel_btf(),
        features.cgroup2(),
    ]
    lines = [f"{probe.name}: {probe.detail}: {probe.remedy}" for probe in probes if not probe.ok]
    if lines:
        raise PrerequisiteError("\n".join(lines))
    objects_dir()


class Loaders:
    """Implements `supervisor.Launcher`."""

    def __init__(self, run_dir: RunDir, more: Sequence[str] = ()) -> None:
        """`more`: arguments of every loader."""
        self._run_dir = run_dir
        self._more = more
        self._children: dict[str, Child] = {}
        self._netns: dict[str, str] = {}
        self._read: dict[str, tuple[int, Realised | None]] = {}

    def check(self) -> None:
        check()

    def start(self, nodes: list[Node], cgroup: Path) -> None:
        self._run_dir.bpf.mkdir(exist_ok=True)
        bpffs.mount(self._run_dir.bpf)
        objects = objects_dir()
        self._netns = {node.name: node.netns for node in nodes}
        for node in nodes:
            argv = [sys.executable, "-m", "tidegate_loader", "--node", node.name]
            argv += ["--run-dir", str(self._run_dir.path)]
            argv += ["--pin-dir", str(self._run_dir.bpf / node.name)]
            argv += ["--netns", node.netns, "--cgroup", node.cgroup, "--objects", str(objects)]
            argv += self._more
            log_file = self._run_dir.logs / f"loader-{node.name}.log"
            child = Child(f"loader of {node.name}", argv, log_file, cgroup)
            child.start()
            self._children[node.name] = child

    def gate(self, pod: Pod) -> bool:
        realised = self._realised(pod.node)
        endpoint = realised.endpoints.get(pod.uid) if realised else None
        # A pod that was made again keeps its UID; its new interface is another one.
        namespace = Path(self._netns[pod.node])
        return endpoint is not None and endpoint.ifindex == index_of(namespace, pod.ifname)

    def realised(self, node: Node) -> bool:
        """The node enforces the NodeState that was last published."""
        paths = NodePaths(self._run_dir.path, node.name)
        try:
            data = (paths.objects / "nodestates" / f"{node.name}.json").read_bytes()
        except FileNotFoundError:
            return False
        realised = self._realised(node.name)
        desired = digest(msgspec.json.decode(data, type=NodeState).spec)
        return realised is not None and realised.digest == desired

    def tend(self) -> float | None:
        dues = [child.tend() for child in self._children.values()]
        return min((due for due in dues if due is not None), default=None)

    def failure(self) -> str:
        """Why a loader keeps ending, from its log; "" while none does."""
        for child in self._children.values():
            if child.restarts > 1:
                return f"{child.name} keeps ending: {child.log_tail()}"
        return ""

    def stop(self) -> None:
        for child in self._children.values():
            child.stop()

    def _realised(self, node: str) -> Realised | None:
        # Asked for every waiting pod: decoded once per change.
        path = self._run_dir.realised(node)
        try:
            stamp = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._read.get(node)
        if known is None or known[0] != stamp:
            known = (stamp, read_realised(path))
            self._read[node] = known
        return known[1]
