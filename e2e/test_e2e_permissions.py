"""In a real cluster operator and loaders are refused nothing, and use what they are granted.

The operator's whole life with the API, with what people do to its objects, is judged on an API
server alone (tests/manifests/test_mf_run.py); here are its start and its daily work."""

from __future__ import annotations

import json

import pytest
import yaml
from support.permissions import Comparison, compare

from kind import cluster
from rig import audit, install, pods

pytestmark = pytest.mark.kind

SPACE = "permissions"


@pytest.fixture(scope="module")
def log(tidegate: None) -> list[str]:
    """Of a start of all of Tidegate, pods and a policy that come and go."""
    start = audit.size()
    install.restart()
    _work()
    install.wait_realised()
    # Statuses come some seconds after what they tell of.
    pods.eventually(
        lambda: not _compared("tidegate-loader", audit.lines(start)).unused,
        "loaders use what they may",
    )
    return audit.lines(start)


def _work() -> None:
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": SPACE},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]},
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}}
    try:
        pods.apply(namespace, policy)
        pods.apply(pods.manifest("web", SPACE, {"app": "web"}))
        pods.wait_ready(SPACE)
        cluster.kubectl(
            *("wait", "-n", SPACE, "policystatus/networkpolicy.web"),
            *("--for=condition=Ready", "--timeout=60s"),
        )
    finally:
        pods.remove_namespaces(SPACE, wait=False)


def _granted() -> list[dict[str, object]]:
    """What the cluster holds, which is not asked of the files."""
    kinds = "clusterroles,clusterrolebindings,roles,rolebindings"
    selector = "-l=app.kubernetes.io/part-of=tidegate"
    found = cluster.kubectl("get", kinds, "-A", selector, "-o", "json")
    items: list[dict[str, object]] = json.loads(found)["items"]
    return items


def _compared(account: str, lines: list[str]) -> Comparison:
    return compare(_granted(), lines, account)


def test_loaders_use_all_they_may_and_are_refused_nothing(log: list[str]) -> None:
    found = _compared("tidegate-loader", log)
    assert "\n".join(map(str, found.refused)) == ""
    assert "\n".join(map(str, found.unused)) == ""


def test_the_operator_is_refused_nothing(log: list[str]) -> None:
    found = _compared("tidegate-operator", log)
    assert "\n".join(map(str, found.refused)) == ""
    written = {(each.resource, each.verb) for each in found.asked}
    assert {("nodestates", "update"), ("policystatuses/status", "update")} <= written


def test_nobody_else_of_ours_asks(log: list[str]) -> None:
    users = {json.loads(line)["user"].get("username", "") for line in log}
    ours = {user for user in users if user.startswith("system:serviceaccount:tidegate-system:")}
    assert ours == {
        "system:serviceaccount:tidegate-system:tidegate-operator",
        "system:serviceaccount:tidegate-system:tidegate-loader",
    }


def test_what_is_granted_is_what_the_manifests_say(tidegate: None) -> None:
    text = (install.ROOT / "manifests/base/tidegate.yaml").read_text()
    roles = [item for item in yaml.safe_load_all(text) if item["kind"].endswith("Role")]
    held = {
        (item["kind"], item["metadata"]["name"]): item["rules"]
        for item in _granted()
        if "rules" in item
    }  # type: ignore[index]
    assert {(i["kind"], i["metadata"]["name"]): i["rules"] for i in roles} == held
