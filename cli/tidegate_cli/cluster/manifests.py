"""Manifests: where they are, what is in them, and putting them into a cluster. No waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from tidegate_kube.resources import Resource

from tidegate_cli.cluster.api import Api, ApiError
from tidegate_cli.errors import CliError

MANAGER = "kubectl"
"""As `kubectl apply --server-side`, so that either may follow the other."""
FIRST = ("Namespace", "CustomResourceDefinition")
LAST = ("Deployment", "DaemonSet")
"""What starts something comes after all that it needs."""

Object = dict[str, Any]
Outcome = Literal["created", "configured", "unchanged"]


def read(files: Sequence[str] | None, kustomization: str | None) -> list[Object]:
    """The objects, in the order to apply them in. CliError: they cannot be read."""
    if kustomization is not None:
        texts = [(kustomization, _kustomize(kustomization))]
    else:
        texts = [(str(path), text) for path, text in _files(files or _own())]
    found = [item for where, text in texts for item in _documents(where, text)]
    if not found:
        raise CliError("there is no object in the manifests")
    return sorted(found, key=_rank)


def _rank(item: Object) -> int:
    kind = item["kind"]
    return FIRST.index(kind) if kind in FIRST else 3 if kind in LAST else 2


def _own() -> list[str]:
    """Those that came with this command: in the source tree, else with the installation's data."""
    tree = Path(__file__).parents[3]
    if (tree / "manifests/base/tidegate.yaml").is_file():
        return [str(tree / "manifests/base"), str(tree / "crds")]
    for prefix in (sys.prefix, sysconfig.get_path("data")):
        place = Path(prefix, "lib/tidegate/manifests")
        if place.is_dir():
            return [str(place)]
    raise CliError("no manifests came with this command", "give --filename or --kustomize")


def _files(names: Iterable[str]) -> Iterator[tuple[Path, str]]:
    for name in names:
        if name == "-":
            yield Path("standard input"), sys.stdin.read()
            continue
        path = Path(name)
        paths = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        for each in paths:
            if each.name == "kustomization.yaml":
                continue
            try:
                yield each, each.read_text()
            except OSError as error:
                raise CliError(f"{each}: {error.strerror}") from error


def _kustomize(directory: str) -> str:
    if shutil.which("kubectl") is None:
        raise CliError("--kustomize needs kubectl, which is not here", "give --filename")
    command = ["kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CliError(f"kubectl kustomize {directory}: {done.stderr.strip()}")
    return done.stdout


def _documents(where: str, text: str) -> Iterator[Object]:
    try:
        for document in yaml.safe_load_all(text):
            if document is None:
                continue
            if not (
                isinstance(document, dict) and document.get("kind") and document.get("metadata")
            ):
                raise CliError(f"{where}: a document is no Kubernetes object")
            yield document
    except yaml.YAMLError as error:
        raise CliError(f"{where}: {error}") from error


def adapt(items: Sequence[Object], image: str | None, server: str | None) -> None:
    """Put another image into every workload of ours, and the API server's address into its
    ConfigMap. CliError: there is none to put it into."""
    if image is not None:
        containers = [c for item in items if item["kind"] in LAST for c in _containers(item)]
        if not containers:
            raise CliError("--image: the manifests run no container")
        for container in containers:
            container["image"] = image
    if server is not None:
        maps = [i for i in items if i["kind"] == "ConfigMap" and "apiServer" in i.get("data", {})]
        if not maps:
            raise CliError("--api-server: no ConfigMap of the manifests has the key apiServer")
        for item in maps:
            item["data"]["apiServer"] = server


def _containers(item: Object) -> list[Object]:
    spec = item["spec"]["template"]["spec"]
    return [*(spec.get("initContainers") or ()), *spec["containers"]]


class Kinds:
    """Where kinds are served, as the API says."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, dict[str, Resource]] = {}

    def resource(self, item: Object) -> Resource:
        """CliError: this cluster does not know the kind."""
        version, kind = str(item["apiVersion"]), str(item["kind"])
        if kind not in self._known.get(version, {}):
            self._known[version] = self._read(version)
        found = self._known[version].get(kind)
        if found is None:
            raise CliError(f"{self._api.name} does not know {kind} of {version}", "is it too old?")
        return found

    def path(self, item: Object) -> str:
        """Of the object itself."""
        resource = self.resource(item)
        namespace = item["metadata"].get("namespace", "") if resource.namespaced else ""
        return resource.path(namespace, item["metadata"]["name"])

    def _read(self, version: str) -> dict[str, Resource]:
        answer = self._api.find(f"/apis/{version}" if "/" in version else f"/api/{version}")
        group, _, short = version.rpartition("/")
        return {
            entry["kind"]: Resource(group, short, entry["name"], entry["kind"], entry["namespaced"])
            for entry in (answer or {}).get("resources", ())
            if "/" not in entry["name"]
        }


def apply(api: Api, kinds: Kinds, item: Object, force: bool) -> Outcome:
    """Server-side apply. CliError: refused; says what to do about a conflict."""
    path = kinds.path(item)
    before = api.find(path)
    try:
        after = api.apply(path, item, MANAGER, force)
    except ApiError as error:
        what = f"{name_of(item)}: {error}"
        remedy = "give --force-conflicts to take it over" if error.code == 409 else ""
        raise CliError(what, remedy) from error
    if before is None:
        return "created"
    same = before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]
    return "unchanged" if same else "configured"


def name_of(item: Object) -> str:
    namespace = item["metadata"].get("namespace")
    name = item["metadata"]["name"]
    return f"{item['kind']} {namespace}/{name}" if namespace else f"{item['kind']} {name}"
