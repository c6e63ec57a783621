"""The judge of permissions can find both: a verb nobody uses, and one that is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.permissions import ACCOUNTS, Permission, compare, granted

BASE = Path(__file__).parents[3] / "manifests" / "base" / "tidegate.yaml"
OBJECTS = list(yaml.safe_load_all(BASE.read_text()))


def _line(
    verb: str, resource: str, *, account: str = "tidegate-loader", allow: bool = True, **ref: str
) -> str:
    event: dict[str, Any] = {
        "verb": verb,
        "user": {"username": f"system:serviceaccount:tidegate-system:{account}"},
        "objectRef": {"resource": resource, "apiGroup": "tidegate.dev", **ref},
        "annotations": {"authorization.k8s.io/decision": "allow" if allow else "forbid"},
    }
    return json.dumps(event)


KINDS = ("identities", "nodestates", "stateslices")
ALL = [
    *(_line(verb, r) for r in KINDS for verb in ("list", "watch")),
    *(_line(verb, "pods", apiGroup="") for verb in ("list", "watch")),
    _line("get", "rulesets", name="r1"),
]
STATUS = _line("patch", "nodestates", subresource="status", name="n1")


def test_everything_granted_is_used() -> None:
    found = compare(OBJECTS, [*ALL, STATUS], "tidegate-loader")
    assert (found.unused, found.refused) == ([], [])
    assert len(found.asked) == len(ALL) + 1


def test_what_nobody_asks_for_is_unused() -> None:
    found = compare(OBJECTS, ALL, "tidegate-loader")
    assert found.unused == [Permission("tidegate.dev", "nodestates/status", "patch")]


def test_what_is_refused_is_missing() -> None:
    denied = _line("get", "nodestates", allow=False, name="n1")
    found = compare(OBJECTS, [*ALL, STATUS, denied], "tidegate-loader")
    assert found.refused == [Permission("tidegate.dev", "nodestates", "get", "", "n1")]


def test_others_and_requests_without_a_resource_do_not_count() -> None:
    other = _line("update", "nodestates", account="tidegate-operator", subresource="status")
    discovery = json.loads(other)
    discovery["user"]["username"] = "system:serviceaccount:tidegate-system:tidegate-loader"
    del discovery["objectRef"]
    found = compare(OBJECTS, [*ALL, other, json.dumps(discovery)], "tidegate-loader")
    assert len(found.unused) == 1


@pytest.mark.parametrize(("name", "used"), [("tidegate-operator", True), ("other", False)])
def test_a_grant_for_one_name_is_used_by_that_name(name: str, used: bool) -> None:
    line = _line(
        "get",
        "leases",
        account="tidegate-operator",
        apiGroup="coordination.k8s.io",
        namespace="tidegate-system",
        name=name,
    )
    found = compare(OBJECTS, [line], "tidegate-operator")
    lease = Permission(
        "coordination.k8s.io", "leases", "get", "tidegate-system", "tidegate-operator"
    )
    assert (lease not in found.unused) == used


def test_no_account_has_a_wildcard_and_each_has_something() -> None:
    for account in ACCOUNTS:
        assert granted(OBJECTS, account)
