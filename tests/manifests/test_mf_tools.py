"""What people's tools make of it: kubectl's columns and waiting, Helm's install and removal."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from manifests.installed import BY_KIND, Installed, identity, kubectl, node_state
from manifests.rendered import CHART, NAMESPACE
from support.apiserver import binary, running
from tidegate_api.schema import KINDS
from tidegate_api.state import DIGEST_ANNOTATION
from tidegate_kube import Client

pytestmark = [pytest.mark.apiserver, pytest.mark.slow]

Json = dict[str, Any]
DIGEST = "5110002f45182c2797dea189ddef90b8e4cb98d4"


def _ready(generation: int) -> Json:
    return {
        "type": "Ready",
        "status": "True",
        "reason": "Realised",
        "message": "in force",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": generation,
    }


def _put(client: Client, item: Json, status: Json) -> Json:
    """Create, or write the spec of what is there; then the status."""
    resource, namespace = BY_KIND[item["kind"]], item["metadata"].get("namespace", "")
    made = msgspec.json.decode(client.create(resource, msgspec.json.encode(item), namespace))
    return _status(client, made, status)


def _status(client: Client, held: Json, status: Json) -> Json:
    resource, meta = BY_KIND[held["kind"]], held["metadata"]
    body = msgspec.json.encode({**held, "status": status})
    answer = client.update(resource, meta["name"], body, meta.get("namespace", ""), "status")
    done: Json = msgspec.json.decode(answer)
    return done


@pytest.fixture(scope="module")
def filled(installed: Installed) -> Installed:
    """One Identity, one NodeState and one PolicyStatus, as the operator and a loader leave them."""
    operator, admin = installed.account("tidegate-operator"), installed.client()
    conditions = [_ready(1)]
    status: Json = {"id": 70123, "summary": "app=web,tier=front", "endpoints": 3}
    seen = {"observedGeneration": 1, "conditions": conditions}
    _put(operator, identity("70123", namespace="shop", labels={"app": "web"}), {**status, **seen})
    _put(operator, identity("soon", namespace="shop", labels={"app": "soon"}), {})
    state = node_state("columns")
    state["metadata"]["annotations"] = {DIGEST_ANNOTATION: DIGEST}
    _put(admin, state, {"realised": DIGEST, "endpoints": 4, "drift": 1, "formats": [1], **seen})
    policy = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "PolicyStatus",
        "metadata": {"name": "networkpolicy.web", "namespace": "default"},
        "policy": {"kind": "NetworkPolicy", "name": "web", "uid": "u", "generation": 7},
    }
    _put(operator, policy, {"nodes": {"realised": 2, "total": 2}, **seen})
    return installed


def _table(installed: Installed, *what: str) -> list[list[str]]:
    lines = installed.kubectl("get", *what).stdout.splitlines()
    return [line.split() for line in lines]


def test_columns_of_identities(filled: Installed) -> None:
    head, *rows = _table(filled, "identities", "70123", "soon")
    assert head == ["NAME", "ID", "NAMESPACE", "LABELS", "ENDPOINTS", "READY", "AGE"]
    assert rows[0][:-1] == ["70123", "70123", "shop", "app=web,tier=front", "3", "True"]
    assert rows[1][:-1] == ["soon", "shop"]


def test_columns_of_node_states(filled: Installed) -> None:
    head, row = _table(filled, "nodestates", "columns")
    assert head == ["NAME", "DESIRED", "REALISED", "ENDPOINTS", "DRIFT", "READY", "AGE"]
    assert row[:-1] == ["columns", DIGEST, DIGEST, "4", "1", "True"]


def test_columns_of_policy_statuses(filled: Installed) -> None:
    head, row = _table(filled, "policystatuses", "networkpolicy.web")
    assert head == ["NAME", "KIND", "POLICY", "REALISED", "NODES", "READY", "AGE"]
    assert row[:-1] == ["networkpolicy.web", "NetworkPolicy", "web", "2", "2", "True"]


def test_wide_columns_of_rule_sets(installed: Installed) -> None:
    operator = installed.account("tidegate-operator")
    policy = {"kind": "NetworkPolicy", "namespace": "shop", "name": "web"}
    spec = {"format": 1, "direction": "Ingress", "policies": [policy], "rules": [], "terms": []}
    item = {"apiVersion": "tidegate.dev/v1alpha1", "kind": "RuleSet", "spec": spec}
    item["metadata"] = {"name": "shown"}
    operator.create(BY_KIND["RuleSet"], msgspec.json.encode(item))
    assert _table(installed, "rulesets", "shown")[0] == ["NAME", "DIRECTION", "AGE"]
    head, row = _table(installed, "rulesets", "shown", "-o", "wide")
    assert head == ["NAME", "DIRECTION", "AGE", "POLICIES"]
    assert msgspec.json.decode(row[3]) == [policy]


def test_short_names_and_category(filled: Installed) -> None:
    known = filled.kubectl("api-resources", "--categories=tidegate", "-o", "name").stdout.split()
    assert sorted(known) == sorted(kind.crd for kind in KINDS)
    for kind in KINDS:
        name = filled.kubectl("get", kind.short, "-A", "-o", "name")
        assert "error" not in name.stderr
    everything = filled.kubectl("get", "tidegate", "-A", "-o", "name").stdout
    assert "identity.tidegate.dev/soon" in everything
    assert "policystatus.tidegate.dev/networkpolicy.web" in everything


def test_explain_says_what_a_field_means(filled: Installed) -> None:
    told = filled.kubectl("explain", "identity.spec.cidrs").stdout
    assert "without host bits" in " ".join(told.split())


def _waits(installed: Installed, what: str) -> bool:
    done = installed.kubectl(
        *("wait", what, "-n", "default", "--for=condition=Ready", "--timeout=1s"), check=False
    )
    return done.returncode == 0


def test_waiting_ends_when_this_version_of_the_policy_is_in_force(installed: Installed) -> None:
    operator = installed.account("tidegate-operator")
    policy = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "PolicyStatus",
        "metadata": {"name": "networkpolicy.waited", "namespace": "default"},
        "policy": {"kind": "NetworkPolicy", "name": "waited", "uid": "u", "generation": 1},
    }
    what = "policystatus/networkpolicy.waited"
    held = _put(operator, policy, {"observedGeneration": 1, "conditions": [_ready(1)]})
    assert _waits(installed, what)
    # The policy changed: what was said of the older version is not taken for this one's.
    held["policy"]["generation"] = 2
    body = msgspec.json.encode(held)
    resource = BY_KIND["PolicyStatus"]
    answer = operator.update(resource, "networkpolicy.waited", body, "default")
    held = msgspec.json.decode(answer)
    assert held["metadata"]["generation"] == 2
    assert held["status"]["conditions"][0]["status"] == "True"
    assert not _waits(installed, what)
    _status(operator, held, {"observedGeneration": 2, "conditions": [_ready(2)]})
    assert _waits(installed, what)


# ---- Helm ----------------------------------------------------------------------------


def _helm(config: Path, *arguments: str) -> str:
    home = str(config.parent)
    done = subprocess.run(
        [str(binary("helm")), *arguments, "--namespace", NAMESPACE, "--kubeconfig", str(config)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "HELM_CACHE_HOME": home,
            "HELM_CONFIG_HOME": home,
            "HELM_DATA_HOME": home,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_helm_installs_upgrades_and_removes_all_but_what_is_to_be_kept(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        config = server.kubeconfig(tmp_path / "kubeconfig")
        told = _helm(config, "install", "tidegate", str(CHART), "--create-namespace")
        assert "kubectl wait nodestates --all" in told
        kubectl(config, "wait", "--for=condition=Established", "crd", "--all")
        made = msgspec.json.encode(identity("partner", cidrs=["192.0.2.0/24"])).decode()
        kubectl(config, "create", "-f", "-", stdin=made)
        _helm(config, "upgrade", "tidegate", str(CHART), "--set", "operator.replicas=2")
        assert "poddisruptionbudget" in kubectl(config, "get", "pdb", "-A", "-o", "name").stdout
        _helm(config, "uninstall", "tidegate")
        left = kubectl(config, "get", "identities", "-o", "name").stdout.split()
        assert left == ["identity.tidegate.dev/partner"]
        crds = kubectl(config, "get", "crd", "-o", "name").stdout.split()
        assert len(crds) == len(KINDS)
        # Nothing of the release is in the way of the next one.
        _helm(config, "install", "tidegate", str(CHART))
