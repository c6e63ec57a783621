"""`tidegate sysdump`: one archive with what is needed to find out what is wrong.

What cannot be had is named in errors.txt; the rest is there all the same.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tidegate_kube import resources
from tidegate_kube.resources import Resource
from tidegate_operator.cluster.events import CONTROLLER

from tidegate_cli.cluster import doctor, progress
from tidegate_cli.cluster.api import Api, ApiError, connect
from tidegate_cli.cluster.redact import redact
from tidegate_cli.cluster.state import (
    DAEMON_SETS,
    DEPLOYMENTS,
    KINDS,
    LOADER_CONTAINER,
    LOADER_SELECTOR,
    OPERATOR_SELECTOR,
    ClusterState,
)
from tidegate_cli.errors import CliError

LOG_LINES = 20_000
"""Of each container, the newest; and as many of the one before."""
NOT_FOUND = 404
NODE_COMMANDS = (
    ("status", "-v"),
    ("endpoint", "list"),
    ("policy", "get"),
    ("lb", "list"),
    ("lb", "list", "--backends"),
    ("ct", "list"),
    ("ipcache", "list"),
    ("metrics", "list"),
    ("doctor",),
)
WHOLE_CLUSTER: tuple[Resource, ...] = (
    *KINDS,
    resources.POLICY_STATUSES,
    resources.CLUSTER_POLICY_STATUSES,
    resources.TRAFFIC_POLICIES,
    resources.NETWORK_POLICIES,
    resources.CLUSTER_NETWORK_POLICIES,
    resources.NAMESPACES,
    resources.NODES,
    resources.PODS,
    resources.SERVICES,
    resources.ENDPOINT_SLICES,
    resources.CRDS,
)
OPTIONAL = (resources.CLUSTER_NETWORK_POLICIES,)
"""Kinds that users install, or not."""
OF_OURS: tuple[Resource, ...] = (
    DEPLOYMENTS,
    DAEMON_SETS,
    resources.CONFIG_MAPS,
    resources.LEASES,
    resources.EVENTS,
)
"""Only in the namespaces where Tidegate runs."""


def sysdump(args: argparse.Namespace) -> int:
    """0: the archive is written, and has all; 1: written, errors.txt says what it lacks."""
    api = connect(args.kubeconfig, args.context)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(args.output_file or f"tidegate-sysdump-{stamp}.tar.gz")
    try:
        with tarfile.open(path, "w:gz") as archive:
            dump = Dump(api, archive, f"tidegate-sysdump-{stamp}")
            dump.collect()
    except CliError:  # no archive is better than one with nothing in it
        path.unlink()
        raise
    print(f"{path}: {dump.files} files, {path.stat().st_size / 1e6:.1f} MB")
    if dump.errors:
        print(f"{len(dump.errors)} things could not be had; errors.txt in it names them")
    return 1 if dump.errors else 0


class Dump:
    def __init__(self, api: Api, archive: tarfile.TarFile, root: str) -> None:
        self.files = 0
        self.errors: list[str] = []
        self._api = api
        self._place = ClusterState(api)
        self._archive = archive
        self._root = root

    def collect(self) -> None:
        """Everything. CliError only where the API server does not answer at all."""
        version_of_it = self._api.get("/version")
        self._json("versions.json", {"tidegate": _version(), "kubernetes": version_of_it})
        self._try("doctor.txt", self._doctor)
        self._try("troubles.txt", self._troubles)
        for resource in WHOLE_CLUSTER:
            self._objects(resource, "")
        for namespace in sorted(self._namespaces()):
            for resource in OF_OURS:
                self._objects(resource, namespace)
        self._try("objects/events.json", self._events)
        self._try("logs", self._logs)
        self._try("nodes", self._nodes)
        if self.errors:
            self._add("errors.txt", "".join(f"{text}\n" for text in self.errors).encode())

    def _try(self, what: str, part: Callable[[], None]) -> None:
        """One thing that cannot be had does not cost the others."""
        try:
            part()
        except CliError as error:
            self.errors.append(f"{what}: {error}")

    # ---- parts -----------------------------------------------------------------------

    def _doctor(self) -> None:
        lines = doctor.examine(self._place, None)
        self._add("doctor.txt", "".join(f"{line}\n" for line in lines).encode())

    def _troubles(self) -> None:
        texts = progress.troubles(self._api)
        self._add("troubles.txt", "".join(f"{text}\n" for text in texts).encode())

    def _namespaces(self) -> set[str]:
        found = {pod.namespace for pod in self._place.loaders.values()}
        for item in self._api.items(DEPLOYMENTS, labelSelector=OPERATOR_SELECTOR):
            found.add(item["metadata"]["namespace"])
        return found

    def _objects(self, resource: Resource, namespace: str) -> None:
        name = f"objects/{resource.plural}{f'.{namespace}' if namespace else ''}.json"

        def part() -> None:
            try:
                ours = [self._ours(item) for item in self._api.items(resource, namespace)]
            except ApiError as error:
                if error.code == NOT_FOUND and resource in OPTIONAL:
                    return
                raise
            self._json(name, [item for item in ours if item is not None])

        self._try(name, part)

    def _events(self) -> None:
        """What the operator said of objects wherever they are; of nodes, in `default`."""
        found = self._api.items(resources.EVENTS)
        said = [item for item in found if item.get("reportingController") == CONTROLLER]
        self._json("objects/events.json", [redact(item) for item in said])

    @staticmethod
    def _ours(item: Any) -> Any:
        labels = item["metadata"].get("labels") or {}
        return redact(item, ours=labels.get("app.kubernetes.io/part-of") == "tidegate")

    def _logs(self) -> None:
        for selector in (OPERATOR_SELECTOR, LOADER_SELECTOR):
            for pod in self._api.items(resources.PODS, labelSelector=selector):
                for container in _containers(pod):
                    for previous in (False, True):
                        self._log(pod, container, previous)

    def _log(self, pod: Any, status: Any, previous: bool) -> None:
        meta, container = pod["metadata"], status["name"]
        if previous and not status.get("lastState"):
            return
        query = {"container": container, "tailLines": str(LOG_LINES), "timestamps": "true"}
        if previous:
            query["previous"] = "true"
        name = f"logs/{meta['name']}.{container}{'.previous' if previous else ''}.log"
        path = resources.PODS.path(meta["namespace"], meta["name"], "log")
        self._try(name, lambda: self._add(name, self._api.text(path, **query)))

    def _nodes(self) -> None:
        nodes = self._place.nodes()
        for words in NODE_COMMANDS:
            asked = self._place.ask(nodes, lambda _node, words=words: words)  # type: ignore[misc]
            for node, answer in asked.answers.items():
                self._json(f"nodes/{node}/{'-'.join(w.strip('-') for w in words)}.json", answer)
            self.errors += [f"{' '.join(words)}: {text}" for text in asked.failed.values()]
        for node in nodes:
            name = f"nodes/{node}/realised.json"
            self._try(name, lambda node=node, name=name: self._file(node, name))  # type: ignore[misc]

    def _file(self, node: str, name: str) -> None:
        pod = self._place.loaders.get(node)
        if pod is None or not pod.running:
            return  # told above
        command = ["cat", f"/var/lib/tidegate/nodes/{node}/realised.json"]
        ran = self._api.execute(pod.namespace, pod.name, LOADER_CONTAINER, command)
        if ran.code:
            raise CliError(ran.err.strip() or f"exit code {ran.code}")
        self._add(name, ran.out.encode())

    # ---- the archive ---------------------------------------------------------------------

    def _json(self, name: str, value: Any) -> None:
        self._add(name, json.dumps(value, indent=1).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(f"{self._root}/{name}")
        info.size, info.mtime = len(data), int(time.time())
        self._archive.addfile(info, io.BytesIO(data))
        self.files += 1


def _containers(pod: Any) -> Iterator[Any]:
    status = pod.get("status", {})
    for group in ("initContainerStatuses", "containerStatuses"):
        yield from status.get(group) or ()


def _version() -> str:
    try:
        return version("tidegate")
    except PackageNotFoundError:
        return "(from a source tree)"
