"""What of an object goes into a sysdump: fields on a list, and no others.

A list of what is allowed cannot forget a field that somebody adds later. Secrets, environments,
commands, annotations of others and data of other people's ConfigMaps are on no list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Tree = Mapping[str, Any]
"""Field → True (all of it) or the tree of what is kept of it; lists are passed through."""

META: Tree = dict.fromkeys(
    (
        "name",
        "namespace",
        "uid",
        "generation",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "labels",
        "ownerReferences",
        "finalizers",
    ),
    True,
)
STATES: Tree = {"state": True, "lastState": True}
CONTAINER_STATUS: Tree = {
    **dict.fromkeys(("name", "ready", "started", "restartCount", "image", "imageID"), True),
    **STATES,
}
CONTAINER: Tree = dict.fromkeys(
    ("name", "image", "imagePullPolicy", "ports", "resources", "securityContext", "volumeMounts"),
    True,
)
POD: Tree = {
    "spec": {
        **dict.fromkeys(
            ("nodeName", "hostNetwork", "hostPID", "serviceAccountName", "tolerations", "priority"),
            True,
        ),
        "containers": CONTAINER,
        "initContainers": CONTAINER,
    },
    "status": {
        **dict.fromkeys(("phase", "reason", "message", "conditions", "startTime"), True),
        **dict.fromkeys(("hostIP", "hostIPs", "podIP", "podIPs", "qosClass"), True),
        "containerStatuses": CONTAINER_STATUS,
        "initContainerStatuses": CONTAINER_STATUS,
    },
}
OUR_CONTAINER: Tree = {**CONTAINER, "command": True, "args": True}
"""Of our own manifests, which have no secret in them; still no environment."""
OUR_POD: Tree = {
    **POD,
    "spec": {
        **POD["spec"],
        "containers": OUR_CONTAINER,
        "initContainers": OUR_CONTAINER,
        "volumes": {"name": True, "hostPath": True},
    },
}
WORKLOAD: Tree = {
    "spec": {
        **dict.fromkeys(("replicas", "selector", "strategy", "updateStrategy"), True),
        "template": {"spec": OUR_POD["spec"]},
    },
    "status": True,
}
WHOLE: Tree = {"spec": True, "status": True}

ALLOWED: dict[str, Tree] = {
    "Identity": WHOLE,
    "NodeState": WHOLE,
    "RuleSet": WHOLE,
    "StateSlice": WHOLE,
    "PolicyStatus": {"policy": True, "status": True},
    "ClusterPolicyStatus": {"policy": True, "status": True},
    "TrafficPolicy": WHOLE,
    "NetworkPolicy": {"spec": True},
    "ClusterNetworkPolicy": WHOLE,
    "Namespace": {"status": True},
    "Node": {
        "spec": {"podCIDR": True, "podCIDRs": True, "taints": True, "unschedulable": True},
        "status": {
            **dict.fromkeys(("addresses", "conditions", "nodeInfo", "capacity"), True),
        },
    },
    "Pod": POD,
    "Service": WHOLE,
    "EndpointSlice": {"addressType": True, "endpoints": True, "ports": True},
    "Deployment": WORKLOAD,
    "DaemonSet": WORKLOAD,
    "Lease": {"spec": True},
    "ConfigMap": {"data": {"apiServer": True}},
    "Event": dict.fromkeys(
        (
            *("type", "reason", "message", "note", "count", "firstTimestamp", "lastTimestamp"),
            *("eventTime", "involvedObject", "regarding", "series", "source", "reportingComponent"),
            *("reportingController", "reportingInstance", "action"),
        ),
        True,
    ),
    "CustomResourceDefinition": {
        "spec": {"group": True, "names": True, "scope": True, "versions": {"name": True}},
        "status": True,
    },
}
"""Kind → what is kept besides apiVersion, kind and META. One that is not here is left out."""
OUR_ANNOTATIONS = "tidegate.dev/"


def redact(item: Mapping[str, Any], *, ours: bool = False) -> dict[str, Any] | None:
    """The object with what is on its list; None: its kind is on none. `ours`: a pod of Tidegate
    itself, whose arguments may be seen."""
    kind = str(item.get("kind", ""))
    tree = OUR_POD if ours and kind == "Pod" else ALLOWED.get(kind)
    if tree is None:
        return None
    meta = keep(item.get("metadata") or {}, META)
    annotations = (item.get("metadata") or {}).get("annotations") or {}
    own = {k: v for k, v in annotations.items() if k.startswith(OUR_ANNOTATIONS)}
    if own:
        meta["annotations"] = own
    head = {"apiVersion": item.get("apiVersion", ""), "kind": kind, "metadata": meta}
    found: dict[str, Any] = head | keep(item, tree)
    return found


def keep(value: Any, tree: Tree) -> Any:
    """`value` without what `tree` does not name. Of lists each element; anything that is no
    object where one is expected is dropped."""
    if isinstance(value, list):
        return [keep(element, tree) for element in value]
    if not isinstance(value, Mapping):
        return None
    found = {}
    for name, inner in tree.items():
        if name in value:
            found[name] = value[name] if inner is True else keep(value[name], inner)
    return found
