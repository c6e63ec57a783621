"""Documents that a cluster was written out to (`kubectl get ... -o yaml`) -> Snapshot.

What the operator would make of that cluster is then known without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from tidegate_api import users

from tidegate_operator.cluster import kinds
from tidegate_operator.cluster.world import Key, Snapshot
from tidegate_operator.manifests import Document
from tidegate_operator.problems import Problem, at

FIELDS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "Node": ("nodes", kinds.node),
    "Namespace": ("namespaces", kinds.namespace),
    "Pod": ("pods", kinds.pod),
    "Service": ("services", kinds.service),
    "EndpointSlice": ("slices", kinds.endpoint_slice),
    "NetworkPolicy": ("policies", kinds.network_policy),
    "ClusterNetworkPolicy": ("cluster_policies", kinds.cluster_policy),
    "TrafficPolicy": ("traffic_policies", kinds.traffic_policy),
    "Identity": ("identities", kinds.identity),
}
"""Kind -> field of a Snapshot, and what reads the kind."""
_WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job")


def is_cluster(documents: Sequence[Document]) -> bool:
    """Nodes that say their addresses are real ones, and so the pods are those that are there."""
    return any(
        isinstance(document.object, users.Node)
        and isinstance(document.object.status, dict)
        and document.object.status.get("addresses")
        for document in documents
    )


def snapshot_of(documents: Sequence[Document]) -> tuple[Snapshot, tuple[Problem, ...]]:
    """Workloads make no pods here: their pods are among the documents, or are not there."""
    found: dict[str, dict[Key, Any]] = {}
    problems = []
    for document in documents:
        key = document.key
        if key.kind in _WORKLOADS:
            text = "makes no pods: the folder holds a cluster, with the pods that it has"
            problems.append(at(document.source, "info", text, object=str(key)))
            continue
        field, decode = FIELDS[key.kind]
        tree = document.object.model_dump(by_alias=True, exclude_unset=True, mode="json")
        tree["metadata"].setdefault("namespace", key.namespace)
        try:
            item = decode(msgspec.json.encode(tree))
        except kinds.DecodeError as error:
            problems.append(at(document.source, "error", str(error), object=str(key)))
            continue
        if document.closed is not None:
            item = msgspec.structs.replace(item, unread=document.closed.rules)
        found.setdefault(field, {})[key.namespace, key.name] = item
    return Snapshot(**found), tuple(problems)  # type: ignore[arg-type]
