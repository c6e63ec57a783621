"""Every kind that Tidegate reads from people."""

from __future__ import annotations

from tidegate_api import API_VERSION, clusterpolicy
from tidegate_api.clusterpolicy import ClusterNetworkPolicy
from tidegate_api.trafficpolicy import TrafficPolicy
from tidegate_api.users import (
    DaemonSet,
    Deployment,
    EndpointSlice,
    Identity,
    Job,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    ReplicaSet,
    Service,
    StatefulSet,
)

AnyObject = (
    Namespace
    | Node
    | Pod
    | Deployment
    | ReplicaSet
    | StatefulSet
    | DaemonSet
    | Job
    | Service
    | EndpointSlice
    | NetworkPolicy
    | ClusterNetworkPolicy
    | TrafficPolicy
    | Identity
)

KINDS: dict[tuple[str, str], type[AnyObject]] = {
    ("v1", "Namespace"): Namespace,
    ("v1", "Node"): Node,
    ("v1", "Pod"): Pod,
    ("v1", "Service"): Service,
    ("apps/v1", "Deployment"): Deployment,
    ("apps/v1", "ReplicaSet"): ReplicaSet,
    ("apps/v1", "StatefulSet"): StatefulSet,
    ("apps/v1", "DaemonSet"): DaemonSet,
    ("batch/v1", "Job"): Job,
    ("discovery.k8s.io/v1", "EndpointSlice"): EndpointSlice,
    ("networking.k8s.io/v1", "NetworkPolicy"): NetworkPolicy,
    (clusterpolicy.API_VERSION, "ClusterNetworkPolicy"): ClusterNetworkPolicy,
    (API_VERSION, "TrafficPolicy"): TrafficPolicy,
    (API_VERSION, "Identity"): Identity,
}
"""(apiVersion, kind) -> model: every kind that Tidegate reads from people."""
