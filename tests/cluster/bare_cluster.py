"""Runs a supervisor on a layout file instead of a folder, without loaders.

The file holds {"nodes": n, "pods": [{name, node, ip, ports, ...}]}; it is read
again when its modification time changes.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tidegate_cli.standalone import supervisor
from tidegate_cli.standalone.cluster import Layout
from tidegate_cli.standalone.layout import place_node, place_pod
from tidegate_cli.standalone.rundir import Node, Pod, Port, RunDir
from tidegate_cli.standalone.teardown import cgroup_of


class FileFeed:
    def __init__(self, run_dir: RunDir, path: Path) -> None:
        self._run_dir = run_dir
        self._path = path
        self._end = threading.Event()
        self._stamp = 0

    def first(self) -> Layout:
        self._stamp = self._path.stat().st_mtime_ns
        cgroup = cgroup_of(self._run_dir)
        data = json.loads(self._path.read_text())
        nodes = [
            place_node(
                self._run_dir,
                cgroup,
                name=f"node{i}",
                addresses=[f"172.18.0.{2 + i}", f"fc00:f853:ccd:e793::{2 + i:x}"],
                pod_cidrs=[f"10.244.{i}.0/24", f"fd00:10:244:{i:x}::/64"],
            )
            for i in range(data["nodes"])
        ]
        return Layout(nodes, [self._pod(nodes, cgroup, entry) for entry in data["pods"]])

    def _pod(self, nodes: list[Node], cgroup: Path, entry: dict[str, object]) -> Pod:
        number = int(str(entry["node"]))
        host = bool(entry.get("hostNetwork"))
        ip = entry.get("ip")
        addresses = [f"10.244.{number}.{ip}", f"fd00:10:244:{number:x}::{ip}"]
        ports = entry.get("ports", [])
        assert isinstance(ports, list)
        return place_pod(
            self._run_dir,
            nodes[number],
            Pod(
                uid=str(entry.get("uid", f"uid-{entry['name']}")),
                namespace="default",
                name=str(entry["name"]),
                node=nodes[number].name,
                addresses=nodes[number].addresses if host else addresses,
                ports=[Port(port=port, protocol=protocol) for port, protocol in ports],
                host_network=host,
                command=str(entry.get("command", "")),
                netns="",
                cgroup="",
                ifname="",
            ),
        )

    def follow(self, changed: Callable[[Layout], None]) -> None:
        def watch() -> None:
            while not self._end.wait(0.01):
                if self._path.stat().st_mtime_ns != self._stamp:
                    changed(self.first())

        threading.Thread(target=watch, daemon=True).start()

    def summary(self) -> str:
        return ""

    def stop(self) -> None:
        self._end.set()


class NoLoaders:
    def check(self) -> None:
        pass

    def start(self, nodes: list[Node], cgroup: Path) -> None:
        pass

    def gate(self, pod: Pod) -> bool:
        return True

    def realised(self, node: Node) -> bool:
        return True

    def tend(self) -> float | None:
        return None

    def failure(self) -> str:
        return ""

    def stop(self) -> None:
        pass


def main() -> None:
    run_dir, layout = RunDir.at(sys.argv[1]), Path(sys.argv[2])
    parts = supervisor.Parts(run_dir, layout, FileFeed(run_dir, layout), NoLoaders())
    try:
        supervisor.serve(parts, lambda summary: print("ready", flush=True))
    except supervisor.StandaloneError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
