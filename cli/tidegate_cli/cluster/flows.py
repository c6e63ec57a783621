"""The observers of a cluster, each by a tunnel through the API server."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tidegate_observer.client import Client, ObserverError

from tidegate_cli.cluster.state import OBSERVER_CONTAINER, ClusterState, LoaderPod
from tidegate_cli.cluster.tunnel import Tunnel
from tidegate_cli.errors import CliError

SOCKET = "/run/tidegate-observer/observer.sock"
"""In the observer's container."""
PIPE = ["/usr/lib/tidegate/tidegate-cni", "pipe", SOCKET]
FRESH_SECONDS = 5.0
"""For how long it is known which pods there are."""
READY_SECONDS = 10.0
"""An exec goes by way of the API server and the node's kubelet."""


class _Through(Client):
    """A client whose errors say what happened in the tunnel."""

    def __init__(self, tunnel: Tunnel) -> None:
        super().__init__(f"unix:{tunnel.path}")
        self._tunnel = tunnel

    def wait_ready(self, seconds: float) -> None:
        try:
            super().wait_ready(max(seconds, READY_SECONDS))
        except ObserverError as error:
            raise ObserverError(self._tunnel.trouble or str(error)) from None


class Observers:
    """Which there are, and how to ask each. A context manager. May be asked by many threads."""

    def __init__(self, state: ClusterState, only: str | None = None) -> None:
        """`only`: a node. CliError: there is no such node."""
        self._state = state
        self._nodes = state.nodes(only)
        self._directory = Path(tempfile.mkdtemp(prefix="tidegate-"))
        self._tunnels: dict[str, Tunnel] = {}
        self._pods: dict[str, LoaderPod] = {}
        self._read = -FRESH_SECONDS
        self._lock = threading.Lock()

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, *_exception: object) -> None:
        for tunnel in self._tunnels.values():
            tunnel.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def peers(self) -> Mapping[str, str]:
        """Every node, whether or not it has an observer: a `relay.Peers`."""
        return {node: node for node in self._nodes}

    def connect(self, node: str) -> Client:
        """A `relay.Connect`. ObserverError: it cannot be asked."""
        try:
            with self._lock:
                pod = self._pod(node)
                # Another pod, another way: one that was replaced leads nowhere.
                tunnel = self._tunnels.get(pod.name)
                if tunnel is None:
                    tunnel = self._tunnels[pod.name] = self._dig(pod)
        except CliError as error:
            raise ObserverError(str(error)) from error
        return _Through(tunnel)

    def _pod(self, node: str) -> LoaderPod:
        if time.monotonic() - self._read >= FRESH_SECONDS:
            found: dict[str, LoaderPod] = {}
            for pod in self._state.loader_pods():
                if pod.node not in found or pod.observer == "running":
                    found[pod.node] = pod
            self._pods, self._read = found, time.monotonic()
        chosen = self._pods.get(node)
        if chosen is None:
            raise CliError("no pod of Tidegate's is there")
        if chosen.observer != "running":
            what = f"is {chosen.observer}" if chosen.observer else "is not there"
            raise CliError(f"the observer in pod {chosen.namespace}/{chosen.name} {what}")
        return chosen

    def _dig(self, pod: LoaderPod) -> Tunnel:
        path = self._directory / str(len(self._tunnels))
        api, where = self._state.api, (pod.namespace, pod.name, OBSERVER_CONTAINER)
        return Tunnel(path, lambda: api.begin(*where, PIPE))
