"""A node's objects in an API server, written as publish writes them, and who may read them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml
from support import loader_world as world
from support.apiserver import ApiServer, create
from tidegate_api import state as api
from tidegate_kube import AlreadyExists, Client, Conflict, KubeError, NotFound, Resource, resources
from tidegate_loader.mirror import KINDS

_RBAC = "rbac.authorization.k8s.io"
ROLES = Resource(_RBAC, "v1", "clusterroles", "ClusterRole", False)
BINDINGS = Resource(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", False)
PLURALS = {r.plural: r for r in KINDS.values()}


def install(server: ApiServer) -> None:
    """The CRDs, served, and the loader's role."""
    client = server.client()
    for path in sorted((world.ROOT / "crds").glob("tidegate.dev_*.yaml")):
        create(client, resources.CRDS, yaml.safe_load(path.read_text()))
    role = {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": "loader"}}
    create(client, ROLES, role | {"rules": rules()})
    binding = {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "loader"},
        "roleRef": {"apiGroup": _RBAC, "kind": "ClusterRole", "name": "loader"},
        "subjects": [{"kind": "ServiceAccount", "name": "loader", "namespace": "default"}],
    }
    create(client, BINDINGS, binding)
    for resource in KINDS.values():
        served(client, resource)
    client.close()


def served(client: Client, resource: Resource, seconds: float = 30.0) -> None:
    """Waits until the kind is served."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            list(client.pages(resource))
        except KubeError:
            assert time.monotonic() < deadline, f"{resource.plural} is never served"
            time.sleep(0.05)
        else:
            return


OBSERVERS = ("pods", "identities")
"""What is granted to the account of the loader's pod for the observer in it."""


def rules() -> list[dict[str, Any]]:
    """All that a loader may do in a cluster: what the manifests grant it, a rule for each kind."""
    manifest = (world.ROOT / "manifests" / "base" / "tidegate.yaml").read_text()
    role = next(
        item
        for item in yaml.safe_load_all(manifest)
        if (item["kind"], item["metadata"]["name"]) == ("ClusterRole", "tidegate-loader")
    )
    granted = [(rule, kind) for rule in role["rules"] for kind in rule["resources"]]
    return [{**rule, "resources": [kind]} for rule, kind in granted if kind not in OBSERVERS]


def account(server: ApiServer, directory: Path) -> Path:
    """A service account's directory as the kubelet mounts it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "token").write_text(server.token("loader"))
    (directory / "ca.crt").write_bytes(server.ca.read_bytes())
    return directory


def clear(client: Client) -> None:
    """Remove every object of ours."""
    for resource in KINDS.values():
        for page in client.pages(resource):
            for raw in page.items:
                name = msgspec.json.decode(raw)["metadata"]["name"]
                client.delete(resource, name)


def publish(client: Client, wanted: world.World, node: str = world.NODE) -> None:
    """In order; immutable objects that are there are left alone."""
    state = wanted.state()
    peers = world.slices("peers", wanted.peers, wanted.shards, wanted.revision)
    _put(client, resources.RULE_SETS, wanted.rule_sets)
    _put(client, resources.STATE_SLICES, peers)
    _put(client, resources.NODE_STATES, [state.node])
    _put(client, resources.STATE_SLICES, (*state.ipcache, *state.services))


def _put(client: Client, resource: Resource, items: Iterable[Any]) -> None:
    for item in items:
        try:
            client.create(resource, api.encode(item))
        except AlreadyExists:
            if resource is not resources.RULE_SETS:
                edit(client, resource, item.metadata.name, spec=msgspec.to_builtins(item.spec))


def edit(client: Client, resource: Resource, name: str, **parts: Any) -> None:
    """Replace whole parts of an object, as an update does; again, when somebody was quicker."""
    while True:
        held = msgspec.json.decode(client.get(resource, name))
        with contextlib.suppress(Conflict):
            client.update(resource, name, msgspec.json.encode(held | parts))
            return


def read(client: Client, resource: Resource, name: str) -> dict[str, Any]:
    return dict(msgspec.json.decode(client.get(resource, name)))


def status(client: Client, node: str = world.NODE) -> dict[str, Any]:
    """Of the NodeState; empty while it has none."""
    try:
        return dict(read(client, resources.NODE_STATES, node).get("status") or {})
    except NotFound:
        return {}


def condition(client: Client, kind: str) -> dict[str, Any]:
    """Empty: it is not there."""
    found = status(client).get("conditions") or []
    return next((dict(c) for c in found if c["type"] == kind), {})
