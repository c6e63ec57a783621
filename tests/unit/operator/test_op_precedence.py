"""The order of judgement: which rule's precedence is above which."""

from __future__ import annotations

from tidegate_api.state import ADMIN_PRECEDENCE, DEVELOPER_PRECEDENCE
from tidegate_operator.compile.precedence import in_force, precedences
from tidegate_operator.objects import (
    Action,
    Direction,
    PodPeer,
    Policy,
    PolicyName,
    PolicyRule,
    Selector,
    Tier,
)

EVERYBODY = PodPeer(None, Selector(), Selector())


def _policy(
    name: str,
    *actions: Action,
    tier: Tier = "Developer",
    priority: int = 0,
    isolates: tuple[Direction, ...] = (),
    audit: bool = False,
) -> Policy:
    return Policy(
        name=PolicyName("Kind", "", name),
        subject=EVERYBODY,
        isolates=frozenset(isolates),
        ingress=tuple(PolicyRule(None, None, action) for action in actions),
        egress=(),
        origin=None,
        tier=tier,
        priority=priority,
        audit=audit,
    )


def _order(*policies: Policy) -> list[list[str]]:
    """Rules from the highest down; those of equal precedence together."""
    found: dict[int, list[str]] = {}
    for (name, index), number in precedences(policies, "Ingress").items():
        found.setdefault(number, []).append(f"{name.name}[{index}]")
    return [sorted(found[number]) for number in sorted(found, reverse=True)]


def test_the_whole_order() -> None:
    assert _order(
        _policy("base", "Deny", "Allow", tier="Baseline"),
        _policy("allow", "Allow", "Deny", "Allow"),
        _policy("late", "Deny", tier="Admin", priority=1000),
        _policy("b", "Pass", "Deny", tier="Admin", priority=7),
        _policy("a", "Allow", tier="Admin", priority=7),
        _policy("low", "Deny", tier="Baseline", priority=1),
    ) == [
        ["a[0]"],
        ["b[0]"],
        ["b[1]"],
        ["late[0]"],
        ["allow[1]"],
        ["allow[0]", "allow[2]"],
        ["base[0]"],
        ["base[1]"],
        ["low[0]"],
    ]


def test_the_tier_is_readable_from_the_number() -> None:
    found = precedences(
        [_policy(tier, "Deny", tier=tier) for tier in ("Admin", "Developer", "Baseline")],
        "Ingress",
    )
    admin, baseline, developer = (found[name] for name in sorted(found))
    assert baseline < DEVELOPER_PRECEDENCE <= developer < ADMIN_PRECEDENCE <= admin < 1 << 32


def test_baseline_is_silent_where_a_developer_isolates() -> None:
    base = _policy("base", "Deny", tier="Baseline")
    admin = _policy("admin", "Deny", tier="Admin")
    isolating = _policy("isolating", isolates=("Ingress",))
    assert in_force([isolating, base, admin], "Ingress") == [admin, isolating]
    for other in (
        _policy("other way", isolates=("Egress",)),
        _policy("audit", isolates=("Ingress",), audit=True),
        _policy("allows only", "Allow"),
    ):
        assert base in in_force([other, base, admin], "Ingress"), other


def test_a_policy_without_a_say_is_left_out() -> None:
    assert in_force([_policy("egress only", isolates=("Egress",))], "Ingress") == []
