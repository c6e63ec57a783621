"""A cluster made of objects only: CRDs, nodes, pods and what else an API server takes, and
an operator that follows it. Nothing runs; pods are bound and given addresses by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from support.waiting import until
from tidegate_api.state import Identity, NodeState, RuleSet, StateSlice
from tidegate_kube import Client, KubeError, NotFound, Resource, resources

CRDS = Path(__file__).parents[2] / "crds"
KINDS = {item.kind: item for item in vars(resources).values() if isinstance(item, Resource)}
OURS: dict[type, Resource] = {
    Identity: resources.IDENTITIES,
    RuleSet: resources.RULE_SETS,
    StateSlice: resources.STATE_SLICES,
    NodeState: resources.NODE_STATES,
}


def install(client: Client) -> None:
    """The CRDs, and wait until they are served."""
    for path in sorted(CRDS.glob("tidegate.dev_*.yaml")):
        apply(client, yaml.safe_load(path.read_text()))
    others = (
        resources.TRAFFIC_POLICIES,
        resources.POLICY_STATUSES,
        resources.CLUSTER_POLICY_STATUSES,
    )
    for resource in (*OURS.values(), *others):
        until(lambda at=resource: _served(client, at), f"{resource.plural} served", 30)


def install_cluster_policies(client: Client) -> None:
    """A CRD for ClusterNetworkPolicy, as users install one; this one checks nothing."""
    of = resources.CLUSTER_NETWORK_POLICIES
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": of.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    names = {"kind": of.kind, "plural": of.plural, "listKind": f"{of.kind}List"}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{of.plural}.{of.group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": of.group,
            "names": {**names, "singular": of.kind.lower()},
            "scope": "Cluster",
            "versions": [version],
        },
    }
    apply(client, crd)
    until(lambda: _served(client, of), f"{of.plural} served", 30)


def cluster_policy(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    of = resources.CLUSTER_NETWORK_POLICIES
    meta = {"name": name}
    return {"apiVersion": of.api_version, "kind": of.kind, "metadata": meta, "spec": spec}


def traffic_policy(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    of = resources.TRAFFIC_POLICIES
    meta = {"name": name, "namespace": "default"}
    return {"apiVersion": of.api_version, "kind": of.kind, "metadata": meta, "spec": spec}


def _served(client: Client, resource: Resource) -> bool:
    try:
        list(client.pages(resource))
    except NotFound:
        return False
    return True


def apply(client: Client, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Create or replace, then the status if there is one; what the server holds after it."""
    resource = KINDS[tree["kind"]]
    meta = tree["metadata"]
    name = meta["name"]
    namespace = meta.get("namespace", "default") if resource.namespaced else ""
    body = {key: value for key, value in tree.items() if key != "status"}
    try:
        held = json.loads(client.create(resource, msgspec.json.encode(body), namespace))
    except KubeError as error:
        if error.reason != "AlreadyExists":
            raise
        old = json.loads(client.get(resource, name, namespace))
        body["metadata"] = {**meta, "resourceVersion": old["metadata"]["resourceVersion"]}
        held = json.loads(client.update(resource, name, msgspec.json.encode(body), namespace))
    if "status" in tree:
        held["status"] = tree["status"]
        data = msgspec.json.encode(held)
        held = json.loads(client.update(resource, name, data, namespace, "status"))
    return held


def objects(client: Client, kind: type) -> dict[str, Any]:
    """name -> decoded object of one of our kinds."""
    decoder = msgspec.json.Decoder(kind)
    found = [decoder.decode(raw) for page in client.pages(OURS[kind]) for raw in page.items]
    return {item.metadata.name: item for item in found}


def node(name: str, number: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": f"10.244.{number}.0/24", "podCIDRs": [f"10.244.{number}.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": f"172.18.0.{number + 2}"}]},
    }


def pod(name: str, node: str, ip: str = "", namespace: str = "default", **labels: str) -> Any:
    made: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "nodeName": node,
            "containers": [{"name": "main", "image": "app"}],
            "automountServiceAccountToken": False,
        },
        "status": {"phase": "Pending"},
    }
    if ip:
        made["status"] = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}
    return made


def remove(client: Client, resource: Resource, name: str, namespace: str = "") -> None:
    """At once: there is no kubelet that would end a pod."""
    client.delete(resource, name, namespace, grace=0)
