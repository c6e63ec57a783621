"""RBAC as it is granted, against what a real run asked for: nothing unused, nothing refused.

The run's side is an API server's audit log (JSON lines, level Metadata; the policy is
`audit-policy.yaml` beside this). Requests without a resource (discovery, /version) are every
authenticated client's and do not count.

    python tests/support/permissions.py audit.log manifests/base/tidegate.yaml
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

NAMESPACE = "tidegate-system"
ACCOUNTS = ("tidegate-operator", "tidegate-loader")
ALLOWED = "authorization.k8s.io/decision"


class Permission(NamedTuple):
    """`namespace` "" = in the whole cluster. `name` "" = whatever its name."""

    group: str
    resource: str
    """With its subresource: nodestates/status."""
    verb: str
    namespace: str = ""
    name: str = ""

    def covers(self, asked: Permission) -> bool:
        return (
            (self.group, self.resource, self.verb) == (asked.group, asked.resource, asked.verb)
            and self.namespace in ("", asked.namespace)
            and self.name in ("", asked.name)
        )

    def __str__(self) -> str:
        where = f" in {self.namespace}" if self.namespace else ""
        name = f" {self.name}" if self.name else ""
        group = f".{self.group}" if self.group else ""
        return f"{self.verb} {self.resource}{group}{name}{where}"


@dataclass(frozen=True)
class Comparison:
    """Of one account. All three are to be empty, `asked` is not."""

    unused: list[Permission]
    refused: list[Permission]
    asked: list[Permission]


def granted(objects: Iterable[dict[str, Any]], account: str) -> set[Permission]:
    """What the roles among `objects` that are bound to the account allow. No wildcards."""
    objects = [item for item in objects if item]
    roles = {
        (item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]): item
        for item in objects
        if item["kind"] in ("Role", "ClusterRole")
    }
    found: set[Permission] = set()
    for binding in objects:
        if binding["kind"] not in ("RoleBinding", "ClusterRoleBinding"):
            continue
        if account not in [subject["name"] for subject in binding["subjects"]]:
            continue
        namespace = binding["metadata"].get("namespace", "")
        ref = binding["roleRef"]
        place = namespace if ref["kind"] == "Role" else ""
        for rule in roles[ref["kind"], place, ref["name"]]["rules"]:
            found.update(_of_rule(rule, namespace))
    return found


def _of_rule(rule: dict[str, Any], namespace: str) -> Iterator[Permission]:
    for group in rule["apiGroups"]:
        for resource in rule["resources"]:
            for verb in rule["verbs"]:
                assert "*" not in (group, resource, verb), f"a wildcard: {rule}"
                for name in rule.get("resourceNames") or [""]:
                    yield Permission(group, resource, verb, namespace, name)


def requests(lines: Iterable[str], account: str) -> Iterator[tuple[Permission, bool]]:
    """What the account asked for, and whether authorisation said yes."""
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    for line in lines:
        event = json.loads(line)
        ref = event.get("objectRef")
        if event["user"].get("username") != user or not ref:
            continue
        decision = event.get("annotations", {}).get(ALLOWED)
        if decision is None:  # the answer is not there yet
            continue
        sub = f"/{ref['subresource']}" if ref.get("subresource") else ""
        asked = Permission(
            ref.get("apiGroup", ""),
            f"{ref['resource']}{sub}",
            event["verb"],
            ref.get("namespace", ""),
            ref.get("name", ""),
        )
        yield asked, decision == "allow"


def compare(objects: Iterable[dict[str, Any]], lines: Iterable[str], account: str) -> Comparison:
    grants = granted(objects, account)
    asked: set[Permission] = set()
    refused: set[Permission] = set()
    for permission, allowed in requests(lines, account):
        (asked if allowed else refused).add(permission)
    unused = {grant for grant in grants if not any(grant.covers(each) for each in asked)}
    return Comparison(sorted(unused), sorted(refused), sorted(asked))


def main(arguments: list[str]) -> int:
    log, manifest = (Path(argument).read_text() for argument in arguments)
    objects = list(yaml.safe_load_all(manifest))
    bad = False
    for account in ACCOUNTS:
        found = compare(objects, log.splitlines(), account)
        bad |= bool(found.unused or found.refused or not found.asked)
        print(f"{account}: {len(found.asked)} kinds of requests")
        for word, permissions in (("unused", found.unused), ("refused", found.refused)):
            for permission in permissions:
                print(f"  {word}: {permission}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
