"""What is asked of the API server again and again: by this process, with the project's client.

A kubectl costs a third of a second of CPU each time, which is most of what a small machine has
while a condition is waited for. What users type is left to kubectl (`kind.cluster`); both raise
Failed."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from support.waiting import until
from tidegate_kube import Client, KubeError, NotFound, Resource, Unreachable, resources
from tidegate_kube.kubeconfig import from_kubeconfig

from kind import cluster
from kind.run import Failed

T = TypeVar("T")
Object = dict[str, Any]
Where = tuple[Resource, str, str]
"""Its kind, name and namespace."""

KINDS = {one.plural: one for one in vars(resources).values() if isinstance(one, Resource)} | {
    "deployments": Resource("apps", "v1", "deployments", "Deployment", True),
    "daemonsets": Resource("apps", "v1", "daemonsets", "DaemonSet", True),
    # Of the core group, where the kubelet writes them.
    "events": Resource("", "v1", "events", "Event", True),
}
POLL_SECONDS = 0.1
ANSWER_SECONDS = 30.0
MANAGER = "kubectl"
"""As if kubectl had applied it, so that either's fields are the other's."""


@functools.cache
def _client(kubeconfig: bytes) -> Client:
    """One for each cluster: what is written there says which."""
    return Client(from_kubeconfig(cluster.kubeconfig()), "tidegate-e2e")


def _asked(call: Callable[[Client], T]) -> T:
    """What `call` makes of the server's answer. Where none comes it is called again for a while: a
    busy machine is late, and nothing that is asked here does harm twice."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return call(_client(cluster.kubeconfig().read_bytes()))
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise Failed(str(error)) from error
            time.sleep(POLL_SECONDS)
        except (KubeError, OSError) as error:
            raise Failed(str(error)) from error


def items(plural: str, namespace: str = "", *, labels: str = "", fields: str = "") -> list[Object]:
    """Every object of a kind, as the API server has them; of one namespace, or of all."""
    resource = KINDS[plural]

    def listed(client: Client) -> list[Object]:
        pages = client.pages(resource, namespace, label_selector=labels, field_selector=fields)
        return [msgspec.json.decode(item) for page in pages for item in page.items]

    # Those of a list do not say what they are.
    what = {"apiVersion": resource.api_version, "kind": resource.kind}
    return [{**what, **item} for item in _asked(listed)]


def find(plural: str, name: str, namespace: str = "") -> Object | None:
    """None: there is none."""
    return _find(KINDS[plural], name, namespace)


def _find(resource: Resource, name: str, namespace: str) -> Object | None:
    def found(client: Client) -> Object | None:
        try:
            item: Object = msgspec.json.decode(client.get(resource, name, namespace))
        except NotFound:
            return None
        return item

    return _asked(found)


def apply(*objects: Object) -> None:
    """One after the other, as `kubectl apply --server-side --force-conflicts`."""
    for item in objects:
        where, body = _where(item), msgspec.json.encode(item)

        def applied(client: Client, where: Where = where, body: bytes = body) -> None:
            resource, name, namespace = where
            how: dict[str, Any] = {"kind": "apply", "field_manager": MANAGER, "force": True}
            client.patch(resource, name, body, namespace, **how)

        _asked(applied)


def patch(plural: str, name: str, namespace: str, change: Object) -> None:
    """As `kubectl patch --type=merge`."""
    body = msgspec.json.encode(change)
    _asked(lambda client: client.patch(KINDS[plural], name, body, namespace))


def delete(*objects: Object, seconds: float = 0.0, grace: int | None = None) -> None:
    """Those of them that there are. With `seconds` it waits for so long at most for their end.
    `grace`: seconds, where not the object's own; a pod is gone at once with 0.

    AssertionError: one is not gone."""
    places = [_where(item) for item in objects]
    for where in places:

        def deleted(client: Client, where: Where = where) -> None:
            with contextlib.suppress(NotFound):
                client.delete(*where, grace=grace)

        _asked(deleted)
    for where in places if seconds else ():
        wait(lambda where=where: _find(*where) is None, f"{'/'.join(where[1:])} is gone", seconds)


def wait(condition: Any, what: str, seconds: float) -> None:
    """Waits until `condition()` holds, which is asked so often that the server does not mind."""
    until(condition, what, seconds, POLL_SECONDS)


def is_rolled_out(item: Object) -> bool:
    """What `kubectl rollout status` waits for, of a Deployment or a DaemonSet: its controller has
    seen it as it is, all is of the newest template and available, and no other is left."""
    status = item.get("status", {})
    if status.get("observedGeneration", 0) < item["metadata"]["generation"]:
        return False
    if item["kind"] == "DaemonSet":
        wanted = status["desiredNumberScheduled"]
        names = ["updatedNumberScheduled", "numberAvailable"]
    else:
        wanted = item["spec"]["replicas"]
        names = ["updatedReplicas", "availableReplicas", "replicas"]
    return all(status.get(name, 0) == wanted for name in names)


def is_true(item: Object, condition: str) -> bool:
    """Whether this condition of its status is True."""
    found = item.get("status", {}).get("conditions") or ()
    return any(c["type"] == condition and c["status"] == "True" for c in found)


def _where(item: Object) -> Where:
    resource = _asked(lambda client: _kinds(client, item["apiVersion"]))[item["kind"]]
    metadata = item["metadata"]
    namespace = metadata.get("namespace", "default") if resource.namespaced else ""
    return resource, metadata["name"], namespace


@functools.cache
def _kinds(client: Client, version: str) -> dict[str, Resource]:
    """By kind, as the server tells of them."""
    root = "/apis/" if "/" in version else "/api/"
    found = msgspec.json.decode(client.raw("GET", root + version))["resources"]
    group, _, name = version.rpartition("/")
    return {
        one["kind"]: Resource(group, name, one["name"], one["kind"], one["namespaced"])
        for one in found
        if "/" not in one["name"]
    }
