"""The cluster in the kernel: makes namespaces, cgroups, links and processes
equal to a `Layout`.

No policy, and no reading of manifests: a layout comes from `layout`, verdicts
are the loaders' business. Not thread-safe: one thread owns a Cluster.
"""

from __future__ import annotations

import json
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from tidegate_api.state import encode
from tidegate_loader.local import LocalInterface

from tidegate_cli.standalone import cgroups, network
from tidegate_cli.standalone.children import Child
from tidegate_cli.standalone.errors import StandaloneError
from tidegate_cli.standalone.rundir import Node, Pod, RunDir, write_atomic

GATE_WARNING_SECONDS = 10.0
RESPONDER_BACKOFF_SECONDS = 1.0
_REPLY_SECONDS = 10.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Layout:
    """What should exist."""

    nodes: list[Node]
    pods: list[Pod]


@dataclass
class _Running:
    pod: Pod
    child: Child | None = None
    connected: bool = False
    waiting_since: float = field(default_factory=time.monotonic)
    warned: bool = False


class Cluster:
    """`gate(pod)` says whether the pod's programs are in place: its interface
    comes up only then, so that its first packet already meets its policy."""

    def __init__(self, run_dir: RunDir, cgroup: Path, gate: Callable[[Pod], bool]) -> None:
        self._run_dir = run_dir
        self._cgroup = cgroup
        self._gate = gate
        self._nodes: dict[str, Node] = {}
        self._running: dict[str, _Running] = {}
        self._responder: _ResponderClient | None = None

    @property
    def system_cgroup(self) -> Path:
        """For our own processes. `_` is in no node's name."""
        return self._cgroup / "_system"

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    @property
    def pods(self) -> list[Pod]:
        return [running.pod for running in self._running.values()]

    def start(self, nodes: list[Node]) -> None:
        """Makes the fabric and the nodes, and starts the responder."""
        cgroups.create(self.system_cgroup)
        self._responder = _ResponderClient(self._run_dir, self.system_cgroup)
        for node in nodes:
            cgroups.create(host_cgroup(node))
        fabric = network.create_fabric(f"{self._run_dir.netns_prefix}_fabric")
        network.create_nodes(fabric, nodes)
        self._nodes = {node.name: node for node in nodes}

    def apply(self, pods: Iterable[Pod]) -> list[str]:
        """Removes and makes pods; says what could not be done. A pod that
        changed is a new one, unless only people are told otherwise of it."""
        wanted = {pod.uid: pod for pod in pods if pod.node in self._nodes}
        for uid, running in list(self._running.items()):
            now = wanted.get(uid)
            if now is not None and now.is_made_as(running.pod):
                running.pod = now
            else:
                self._remove(running)
                del self._running[uid]
        added = [pod for uid, pod in wanted.items() if uid not in self._running]
        problems = []
        for node in self._nodes.values():
            here = [pod for pod in added if pod.node == node.name]
            try:
                self._create(node, here)
            except StandaloneError as error:
                problems.append(str(error))
                for pod in here:
                    self._erase(pod)
        for pod in added:
            if pod.uid in self._running:
                problems += self._serve(pod)
        self.connect()
        return problems

    def connect(self) -> bool:
        """Brings up the interfaces whose gate has opened; False: some wait."""
        done = True
        for node in self._nodes.values():
            ready = []
            for running in self._running.values():
                if running.connected or running.pod.node != node.name:
                    continue
                if running.pod.host_network or self._gate(running.pod):
                    ready.append(running)
                else:
                    done = False
                    _warn_when_late(running)
            network.connect_pods(
                node, [running.pod for running in ready if not running.pod.host_network]
            )
            for running in ready:
                running.connected = True
        return done

    def tend(self) -> float | None:
        """Keeps the processes alive; see `Child.tend`."""
        dues = [running.child.tend() for running in self._running.values() if running.child]
        if self._responder is not None:
            dues.append(self._responder.tend())
        return min((due for due in dues if due is not None), default=None)

    def stop(self) -> None:
        """Ends the processes. What is in the kernel is `down`'s to remove."""
        for running in self._running.values():
            if running.child:
                running.child.stop()
        if self._responder is not None:
            self._responder.close()

    def _create(self, node: Node, pods: list[Pod]) -> None:
        for pod in pods:
            cgroups.create(Path(pod.cgroup))
        networked = [pod for pod in pods if not pod.host_network]
        network.create_pods(node, networked)
        for pod in networked:
            interface = LocalInterface(
                uid=pod.uid,
                namespace=pod.namespace,
                name=pod.name,
                ifname=pod.ifname,
                ifindex=network.index_of(Path(node.netns), pod.ifname),
                pod_mac=network.pod_mac(pod),
                host_mac=network.host_mac(pod),
                addresses=pod.addresses,
            )
            write_atomic(self._run_dir.interface(node.name, pod.uid), encode(interface))
        for pod in pods:
            self._running[pod.uid] = _Running(pod)
            log.info("pod added", pod=pod.key, node=pod.node, addresses=pod.addresses)

    def _serve(self, pod: Pod) -> list[str]:
        if not pod.command:
            assert self._responder is not None
            return self._responder.add(pod)
        try:
            command = shlex.split(pod.command)
            if not command:
                raise ValueError("no command")
        except ValueError as error:
            return [f"{pod.key}: annotation tidegate.dev/command: {error}"]
        child = Child(
            pod.key,
            _enter_argv(pod, command),
            self._run_dir.logs / f"pod-{pod.uid}.log",
            Path(pod.cgroup),
        )
        child.start()
        self._running[pod.uid].child = child
        return []

    def _remove(self, running: _Running) -> None:
        pod = running.pod
        if running.child:
            running.child.stop()
        elif self._responder is not None:
            self._responder.remove(pod)
        self._erase(pod)
        log.info("pod removed", pod=pod.key, node=pod.node)

    def _erase(self, pod: Pod) -> None:
        cgroups.remove(Path(pod.cgroup))
        if not pod.host_network:
            network.delete_pod(self._nodes[pod.node], pod)
            self._run_dir.interface(pod.node, pod.uid).unlink(missing_ok=True)


class _ResponderClient:
    """Drives the responder process. One that died has lost its sockets: the
    next one gets all pods again."""

    def __init__(self, run_dir: RunDir, cgroup: Path) -> None:
        self._pods: dict[str, Pod] = {}
        self._log = run_dir.logs / "responder.log"
        self._cgroup = cgroup
        self._launch()

    def _launch(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_REPLY_SECONDS)
        self._replies = self._control.makefile("rb")
        self._launched = time.monotonic()
        argv = [sys.executable, "-m", "tidegate_cli.standalone.responder", str(theirs.fileno())]
        self.child = Child("responder", argv, self._log, self._cgroup, theirs.fileno())
        with theirs:
            self.child.start()

    def tend(self) -> float | None:
        if self.child.alive():
            return None
        due = self._launched + RESPONDER_BACKOFF_SECONDS - time.monotonic()
        if due > 0:
            return due
        log.warning("the responder ended and is started again")
        self.close()
        self._launch()
        for pod in list(self._pods.values()):
            self._request_add(pod)
        return None

    def close(self) -> None:
        self.child.stop()
        self._replies.close()
        self._control.close()

    def add(self, pod: Pod) -> list[str]:
        self._pods[pod.uid] = pod
        return self._request_add(pod)

    def remove(self, pod: Pod) -> None:
        if self._pods.pop(pod.uid, None):
            self._ask({"op": "remove", "uid": pod.uid})

    def _request_add(self, pod: Pod) -> list[str]:
        return self._ask(
            {
                "op": "add",
                "uid": pod.uid,
                "pod": pod.key,
                "address": pod.addresses[0] if pod.addresses else "",
                "netns": pod.netns,
                "ports": [[port.port, port.protocol] for port in pod.ports],
            }
        )

    def _ask(self, request: dict[str, Any]) -> list[str]:
        """A dead responder is no error: `tend` starts another."""
        try:
            self._control.sendall(json.dumps(request).encode() + b"\n")
            line = self._replies.readline()
        except OSError as error:
            return [f"the responder does not answer: {error}"]
        if not line:
            return [f"the responder has ended: {self.child.log_tail()}"]
        problems: list[str] = json.loads(line)["problems"]
        return problems


def host_cgroup(node: Node) -> Path:
    """For the node's own and its host-network pods' processes."""
    return Path(node.cgroup) / "host"


def _enter_argv(pod: Pod, command: list[str]) -> list[str]:
    enter = [sys.executable, "-m", "tidegate_cli.standalone.enter"]
    return [*enter, pod.netns, pod.cgroup, *command]


def _warn_when_late(running: _Running) -> None:
    if not running.warned and time.monotonic() - running.waiting_since > GATE_WARNING_SECONDS:
        running.warned = True
        log.warning("interface stays down: the loader has not realised it", pod=running.pod.key)
