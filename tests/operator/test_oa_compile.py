"""`tidegate compile` of a cluster written out says what the operator publishes in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from support.operator_town import Town, policy, populate
from support.town_api import apply, objects, pod, traffic_policy
from tidegate_api.state import Identity, NodeState, RuleSet, StateSlice
from tidegate_kube import Client, Resource, resources
from tidegate_operator.publish import render
from tidegate_operator.standalone import compile_folder

pytestmark = pytest.mark.apiserver

WRITTEN_OUT = (
    resources.NODES, resources.NAMESPACES, resources.PODS, resources.SERVICES,
    resources.ENDPOINT_SLICES, resources.NETWORK_POLICIES, resources.TRAFFIC_POLICIES,
)  # fmt: skip


def write_out(client: Client, folder: Path) -> None:
    """As `kubectl get <kind> -A -o yaml` does, one file a kind."""
    for resource in WRITTEN_OUT:
        items = [dict(item, **_kind(resource)) for item in _items(client, resource)]
        tree = {"apiVersion": "v1", "kind": "List", "items": items}
        (folder / f"{resource.plural}.yaml").write_text(yaml.safe_dump(tree))


def _items(client: Client, resource: Resource) -> list[dict[str, Any]]:
    return [json.loads(bytes(raw)) for page in client.pages(resource) for raw in page.items]


def _kind(resource: Resource) -> dict[str, str]:
    return {"apiVersion": resource.api_version, "kind": resource.kind}


def _spec(item: Any) -> Any:
    """Without what counts writes: revisions, and the leader's term."""
    tree = msgspec.to_builtins(item.spec)
    tree.pop("revision", None)
    tree.pop("term", None)
    for ref in tree.get("tables", {}).values():
        ref.pop("minRevision")
    return tree


def test_same_objects(town: Town, tmp_path: Path) -> None:
    populate(town)
    apply(town.client, pod("done", "n1", "10.244.0.9", app="a") | {
        "status": {"phase": "Succeeded", "podIP": "10.244.0.9", "podIPs": [{"ip": "10.244.0.9"}]}
    })  # fmt: skip
    apply(town.client, pod("waits", "n2", app="c"))
    apply(town.client, policy("all", {"podSelector": {}, "policyTypes": ["Egress"]}))
    rule = {"action": "Deny", "peers": [{"entities": ["world"]}], "ports": [{"any": True}]}
    subject = {"podSelector": {"any": True}}
    spec = {"subject": subject, "isolates": [], "mode": "Enforce", "egress": [rule]}
    apply(town.client, traffic_policy("no-world", spec))
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
               "spec": {"ports": [{"port": 80}]}}  # fmt: skip
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "", "port": 8080}], "endpoints": [{"addresses": ["10.244.0.5"]}],
    }  # fmt: skip
    apply(town.client, service)
    apply(town.client, endpoints)
    town.settled()
    write_out(town.client, tmp_path)
    desired, ledger, problems, sizes, _ = compile_folder(tmp_path)
    assert desired is not None
    assert [item for item in problems if item.severity == "error"] == []
    want = {(item.kind, item.metadata.name): _spec(item) for item in render(desired, ledger, sizes)}
    got = {
        (item.kind, name): _spec(item)
        for kind in (Identity, RuleSet, StateSlice, NodeState)
        for name, item in objects(town.client, kind).items()
    }
    # One of a moment between two policies stays for its grace.
    used = {name for item in town.nodes().values() for name in item.spec.rule_sets}
    got = {key: spec for key, spec in got.items() if key[0] != "RuleSet" or key[1] in used}
    assert {key: got[key] for key in got if key[0] != "Identity"} == {
        key: want[key] for key in want if key[0] != "Identity"
    }
    # Numbers that rest are known only where they were used.
    assert want.items() >= {k: v for k, v in got.items() if k in want}.items()
    assert len([key for key in want if key[0] == "Identity"]) == 2
