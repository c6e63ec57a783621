"""`tidegate uninstall`: nothing of Tidegate stays, on the nodes or in the API.

The order: the operator first, or it would undo the rest; then every node is told to let go and does
so itself; then loaders, node clean-up, permissions, and the kinds last.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import structs
from tidegate_api.state import DIGEST_ANNOTATION, NodeState, digest
from tidegate_kube import resources
from tidegate_kube.resources import Resource

from tidegate_cli.cluster import errand
from tidegate_cli.cluster.api import Api, ApiError, connect
from tidegate_cli.cluster.progress import POLL_SECONDS
from tidegate_cli.cluster.state import (
    DAEMON_SETS,
    DEPLOYMENTS,
    LOADER_SELECTOR,
    OPERATOR_SELECTOR,
    ClusterState,
)
from tidegate_cli.errors import CliError

PART_OF = "app.kubernetes.io/part-of=tidegate"
TAINT = "tidegate.dev/agent-not-ready"
GROUP = "tidegate.dev"
CLEANUP = ("tidegate-node-setup", "cleanup", "--root", errand.HOST)
_RBAC, _ADMISSION = "rbac.authorization.k8s.io", "admissionregistration.k8s.io"
OURS = (
    Resource("apps", "v1", "deployments", "Deployment", True),
    resources.SERVICES,
    Resource("", "v1", "secrets", "Secret", True),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True),
    Resource(
        _ADMISSION,
        "v1",
        "validatingadmissionpolicybindings",
        "ValidatingAdmissionPolicyBinding",
        False,
    ),
    Resource(_ADMISSION, "v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", False),
    Resource(_RBAC, "v1", "rolebindings", "RoleBinding", True),
    Resource(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", False),
    Resource(_RBAC, "v1", "roles", "Role", True),
    Resource(_RBAC, "v1", "clusterroles", "ClusterRole", False),
    resources.SERVICE_ACCOUNTS,
    resources.CONFIG_MAPS,
    resources.NAMESPACES,
)
"""Deleted where they carry the label PART_OF, in this order."""
REMINDER = "tidegate.dev/uninstalled-at"
REMIND_SECONDS = 5.0
KINDS_SECONDS = 120.0
"""At least: the API server empties a kind by itself, in its own time; no node has a part in it."""


def uninstall(args: argparse.Namespace) -> int:
    """0: nothing is left. 1: something is, which is named."""
    api = connect(args.kubeconfig, args.context)
    if not args.yes and not _agreed(api):
        return 2
    place, left = ClusterState(api), list[str]()
    loaders = list(api.items(DAEMON_SETS, labelSelector=LOADER_SELECTOR))
    namespaces = {item["metadata"]["namespace"] for item in loaders}
    installed = api.find("/apis/tidegate.dev/v1alpha1") is not None
    _end(api, "operator", DEPLOYMENTS, OPERATOR_SELECTOR, args.wait)
    if installed:
        left += _detach(place, args.wait, args.force)
    _end(api, "loaders", DAEMON_SETS, LOADER_SELECTOR, args.wait)
    for item in loaders:
        left += _clean(api, item, args.wait, args.force)
    _forget_taints(api)
    left += _delete(api, namespaces, args.wait)
    for text in left:
        print(f"tidegate: {text}", file=sys.stderr)
    print("Tidegate is gone" if not left else "Tidegate is gone but for what is named above")
    return 1 if left else 0


def _agreed(api: Api) -> bool:
    question = f"Take Tidegate out of {api.name} ({api.server})? No policy will be enforced. [y/N] "
    if not sys.stdin.isatty():
        raise CliError(f"uninstall asks before it acts on {api.name}", "give --yes")
    return input(question).strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(text, flush=True)


def _until(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _end(api: Api, what: str, resource: Resource, selector: str, seconds: float) -> None:
    """Delete workloads and wait for their pods to be gone. CliError: they are not."""
    found = list(api.items(resource, labelSelector=selector))
    for item in found:
        meta = item["metadata"]
        api.delete(resource.path(meta["namespace"], meta["name"]))
        _say(f"deleted {resource.kind} {meta['namespace']}/{meta['name']}")

    def pods() -> list[str]:
        running = api.items(resources.PODS, labelSelector=selector)
        return [pod["metadata"]["name"] for pod in running if _runs(api, pod)]

    if not _until(seconds, lambda: not pods()):
        what = f"pods of the {what} do not end: {', '.join(pods())}"
        raise CliError(what, "delete them, and try again")


def _runs(api: Api, pod: Any) -> bool:
    """False also for one whose node is gone: its pod stays in the API until somebody forces it."""
    node = pod["spec"].get("nodeName")
    return bool(node) and _ready_node(api.find(resources.NODES.path("", node)))


def _ready_node(node: Any) -> bool:
    conditions = ((node or {}).get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


# ---- the nodes ------------------------------------------------------------------------


def detached(state: NodeState) -> bool:
    """Its loader has taken everything out of the kernel, and says so of this very spec."""
    status = state.status
    if state.spec.mode != "Detached" or not status:
        return False
    if status.realised == digest(state.spec):
        return True
    generation = state.metadata.generation
    seen = status.observed_generation and generation and status.observed_generation >= generation
    ready = any(c.type == "Ready" and c.status == "True" for c in status.conditions)
    return bool(seen and ready and not status.endpoints)


def _detach(place: ClusterState, seconds: float, force: bool) -> list[str]:
    """Tell every node to let go, and wait. CliError: one does not, without --force."""
    api, names = place.api, place.nodes()
    running = {node for node, pod in place.loaders.items() if pod.running}
    for name in names:
        spec = structs.replace(place.states[name].spec, mode="Detached")
        meta = {"annotations": {DIGEST_ANNOTATION: digest(spec)}}
        body = {"metadata": meta, "spec": {"mode": "Detached"}}
        api.merge(resources.NODE_STATES.path("", name), body)
    waiting = {name for name in names if name in running}
    left = sorted(set(names) - waiting)

    def done() -> bool:
        states = ClusterState(api).states
        for name in sorted(waiting):
            if name not in states or detached(states[name]):
                waiting.discard(name)
                _say(f"{name} enforces nothing any more")
        return not waiting

    _until(seconds, done)
    left += sorted(waiting)
    if left and not force:
        what = f"not detached after {seconds:g} seconds: {', '.join(left)}"
        raise CliError(what, "see `kubectl get nodestates`; --force goes on without them")
    return [f"{name} was not detached by its loader" for name in left]


def _clean(api: Api, daemon_set: Any, seconds: float, force: bool) -> list[str]:
    """Have every node that answers remove files, pins and the CNI step."""
    nodes = [item["metadata"]["name"] for item in api.items(resources.NODES) if _ready_node(item)]
    dead = [
        item["metadata"]["name"] for item in api.items(resources.NODES) if not _ready_node(item)
    ]
    outcomes = errand.run(api, daemon_set, dict.fromkeys(nodes, CLEANUP), seconds)
    bad = [f"{o.node}: {o.said}" for o in outcomes if not o.done]
    bad += [f"{node}: the node is not ready" for node in dead]
    for outcome in outcomes:
        if outcome.done:
            _say(f"{outcome.node} is clean")
    if bad and not force:
        remedy = f"run `{' '.join(CLEANUP[:2])}` of the image there; --force goes on without"
        raise CliError(f"nodes that are not cleaned: {'; '.join(bad)}", remedy)
    return [f"not cleaned: {text}" for text in bad]


def _forget_taints(api: Api) -> None:
    for item in list(api.items(resources.NODES)):
        taints = item["spec"].get("taints") or []
        kept = [taint for taint in taints if taint["key"] != TAINT]
        if kept != taints:
            api.merge(
                resources.NODES.path("", item["metadata"]["name"]),
                {
                    "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]},
                    "spec": {"taints": kept},
                },
            )


# ---- the API -------------------------------------------------------------------------------


def _delete(api: Api, namespaces: Iterable[str], seconds: float) -> list[str]:
    """Everything that carries our label, then the kinds; returns what still goes. CliError: a
    kind does not go."""
    for namespace in namespaces:
        api.delete(resources.LEASES.path(namespace, "tidegate-operator"))
    held = []
    for resource in OURS:
        for item in list(api.items(resource, labelSelector=PART_OF)):
            _remove(api, resource, item)
            if resource is resources.NAMESPACES:
                held.append(resource.path("", item["metadata"]["name"]))
    crds = [item for item in api.items(resources.CRDS) if item["spec"]["group"] == GROUP]
    for item in crds:
        _remove(api, resources.CRDS, item)
    paths = [resources.CRDS.path("", item["metadata"]["name"]) for item in crds]
    if not _kinds_go(api, paths, max(seconds, KINDS_SECONDS)):
        raise CliError("kinds of tidegate.dev do not go", "look for finalizers on their objects")
    if _until(seconds, lambda: not any(api.find(path) for path in held)):
        return []
    return ["its namespace is still being deleted"]


def _kinds_go(api: Api, paths: list[str], seconds: float) -> bool:
    """Waits for it. An API server that fails to empty a kind at first, as the kind's storage is
    just then made anew, may look at it again only at its next resync, minutes later (1.36): a
    change of the kind reminds it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _until(REMIND_SECONDS, lambda: not any(map(api.find, paths))):
            return True
        for path in paths:
            # Gone, or changed by the server in this very moment: there is nothing to remind of.
            with contextlib.suppress(ApiError):
                api.merge(path, {"metadata": {"annotations": {REMINDER: f"{time.time():.0f}"}}})
    return False


def _remove(api: Api, resource: Resource, item: Any) -> None:
    meta = item["metadata"]
    namespace = meta.get("namespace", "")
    if api.delete(resource.path(namespace, meta["name"])):
        name = f"{namespace}/{meta['name']}" if namespace else meta["name"]
        _say(f"deleted {resource.kind} {name}")
