"""Which of several rules decides. docs/policy.md has the same as a table.

Per subject and direction: the Admin tier by priority, name and the rule's place; then the
developer tier, where a deny outranks every allow and isolation decides what is left; then the
Baseline tier, ordered like Admin, for subjects that no developer policy isolates. Pass leaves
its tier. What is left after all of them is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable

from tidegate_api.state import ADMIN_PRECEDENCE, DEVELOPER_PRECEDENCE

from tidegate_operator.objects import Action, Direction, Policy, PolicyName

HIGHEST = (1 << 32) - 1

Place = tuple[PolicyName, int]
"""A rule: its policy, and its index there in the direction that is looked at."""


def in_force(policies: Iterable[Policy], direction: Direction) -> list[Policy]:
    """Those of a subject's policies that have a say in the direction, in order of their names.
    The Baseline tier has none where a developer's policy isolates."""
    found = [policy for policy in policies if policy.counts(direction)]
    if any(isolating(policy, direction) for policy in found):
        found = [policy for policy in found if policy.tier != "Baseline"]
    return sorted(found, key=lambda policy: policy.name)


def isolating(policy: Policy, direction: Direction) -> bool:
    """Whether it makes what nothing allows denied."""
    return direction in policy.isolates and not policy.audit


def precedences(policies: Iterable[Policy], direction: Direction) -> dict[Place, int]:
    """Rule -> its precedence: of two that match, the higher one decides. In the ordered tiers
    no two rules have the same."""
    found: dict[Place, int] = {}
    below = {"Admin": HIGHEST, "Baseline": DEVELOPER_PRECEDENCE - 1}
    for policy in sorted(policies, key=lambda policy: (policy.priority, policy.name)):
        for index, rule in enumerate(policy.rules(direction)):
            if policy.tier == "Developer":
                found[policy.name, index] = _developer(rule.action)
            else:
                found[policy.name, index] = below[policy.tier]
                below[policy.tier] -= 1
    if below["Admin"] < ADMIN_PRECEDENCE - 1 or below["Baseline"] < -1:
        raise OverflowError("more rules than a tier has precedences")
    return found


def _developer(action: Action) -> int:
    return DEVELOPER_PRECEDENCE + (action == "Deny")
