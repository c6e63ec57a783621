"""Policies with something in them that is not understood: a field that only a newer version knows,
a value that makes no sense.

Such a policy fails closed, in a cluster as in a folder: it isolates whom it selects, a rule that
is not understood and allows allows nothing, and any other denies everything. Pure.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from tidegate_api import trafficpolicy, users

from tidegate_operator.meanings import WrittenPolicy
from tidegate_operator.policies import RulePlace


class Unreadable(Exception):
    """Not even whom the policy selects can be told."""


def leave(
    tree: dict[str, Any], error: ValidationError, model: type[WrittenPolicy]
) -> tuple[RulePlace, ...]:
    """Takes what `error` is about out of `tree`; the rules that are thereby unread. A field of
    the spec itself may change what every rule means. Raises Unreadable."""
    found: set[RulePlace] = set()
    spec = tree.get("spec")
    named = model is not users.NetworkPolicy or (isinstance(spec, dict) and "podSelector" in spec)
    for item in error.errors(include_url=False):
        path = item["loc"]
        match path:
            case ("spec", "ingress" | "egress" as direction, int() as index, *_):
                found.add((str(direction), index))
            # Without a selector it may be the unknown field that was to be one.
            case ("spec", str()) if item["type"] == "extra_forbidden" and named:
                remove(tree, path)
                found |= {
                    (rules, index)
                    for rules in ("ingress", "egress")
                    for index in range(len(tree["spec"].get(rules) or ()))
                }
            case _:
                raise Unreadable
    for rules, index in found:
        tree["spec"][rules][index] = _stand_in(model, rules, tree["spec"][rules][index])
    return tuple(sorted(found))


def _stand_in(model: type[WrittenPolicy], direction: str, rule: Any) -> dict[str, Any]:
    """Stands where an unread rule was, so that the others keep their places. Of what it says
    only the action counts."""
    if model is users.NetworkPolicy:
        return {"ports": [{"port": "unread"}]}
    action = rule.get("action") if isinstance(rule, dict) else None
    if model is trafficpolicy.TrafficPolicy:
        action = "Allow" if action == "Allow" else "Deny"
        return {"action": action, "peers": [{"any": True}], "ports": [{"any": True}]}
    side = "from" if direction == "ingress" else "to"
    return {"action": "Accept" if action == "Accept" else "Deny", side: [{"namespaces": {}}]}


def remove(tree: Any, path: tuple[int | str, ...]) -> None:
    for step in path[:-1]:
        tree = tree[step]
    del tree[path[-1]]
