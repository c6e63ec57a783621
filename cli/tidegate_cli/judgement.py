"""From the terms of a rule set that match a flow to the verdict: tier after tier.

Written from the prose of `RuleSetSpec` alone. May not live here: what a term matches (`model`),
the kernel and its maps, printing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tidegate_api.state import (
    ADMIN_PRECEDENCE,
    DEVELOPER_PRECEDENCE,
    PolicyRef,
    RuleSetSpec,
    Term,
)

Tier = Literal["Admin", "developer", "Baseline"]
TIERS: tuple[Tier, ...] = ("Admin", "developer", "Baseline")
"""In the order in which they are asked."""


@dataclass(frozen=True)
class RuleRef:
    """`spec.ingress[index]` or `spec.egress[index]` of one policy object."""

    policy: PolicyRef
    direction: str
    index: int

    def __str__(self) -> str:
        return f"{policy_text(self.policy)} spec.{self.direction.lower()}[{self.index}]"


def policy_text(policy: PolicyRef) -> str:
    name = f"{policy.namespace}/{policy.name}" if policy.namespace else policy.name
    return f"{policy.kind} {name}"


def policies_of(spec: RuleSetSpec) -> list[PolicyRef]:
    """What `Rule.policy` is an index into."""
    return [*spec.policies, *spec.others]


def rule_ref(spec: RuleSetSpec, number: int) -> RuleRef:
    rule = spec.rules[number]
    return RuleRef(policies_of(spec)[rule.policy], spec.direction, rule.index)


def audited_of(spec: RuleSetSpec) -> tuple[PolicyRef, ...]:
    """Policies in audit mode that would isolate the subject."""
    return tuple(spec.others[i] for i in spec.audited)


@dataclass(frozen=True)
class Candidate:
    """One rule that matches. `number`: its index in the RuleSet's spec.rules."""

    tier: Tier
    action: Literal["Allow", "Deny", "Pass"]
    rule: RuleRef
    number: int
    precedence: int
    audit: bool
    log: bool


@dataclass(frozen=True)
class Decision:
    """`by` None: the default, a denial where policies isolate the subject."""

    allowed: bool
    by: Candidate | None


def tier_of(precedence: int) -> Tier:
    if precedence >= ADMIN_PRECEDENCE:
        return "Admin"
    return "developer" if precedence >= DEVELOPER_PRECEDENCE else "Baseline"


def candidates(spec: RuleSetSpec, matching: Iterable[Term]) -> tuple[Candidate, ...]:
    """What matches, the first to be heard first; each rule once an action."""
    found = {
        (term.precedence, term.rule, term.action, term.audit): Candidate(
            tier=tier_of(term.precedence),
            action=term.action,
            rule=rule_ref(spec, term.rule),
            number=term.rule,
            precedence=term.precedence,
            audit=term.audit,
            log=spec.rules[term.rule].log,
        )
        for term in matching
    }
    return tuple(found[key] for key in sorted(found, key=lambda k: (-k[0], k[1])))


@dataclass(frozen=True)
class Step:
    """One rule on the walk through the tiers. `fate`: it "decides", "passes on" to the next
    tier, is "not heard" because another was, or speaks only "in audit"."""

    candidate: Candidate
    fate: Literal["decides", "passes on", "not heard", "in audit"]


def walk(found: Sequence[Candidate]) -> list[Step]:
    """What became of every rule that matches, tier after tier."""
    steps: list[Step] = []
    settled = False
    for group in (TIERS[:1], TIERS[1:]):
        heard = False
        for candidate in (c for c in found if c.tier in group):
            if candidate.audit:
                steps.append(Step(candidate, "in audit"))
            elif settled or heard:
                steps.append(Step(candidate, "not heard"))
            elif candidate.action == "Pass":
                heard = True
                steps.append(Step(candidate, "passes on"))
            else:
                settled = True
                steps.append(Step(candidate, "decides"))
    return steps


def enforced(spec: RuleSetSpec, found: Sequence[Candidate]) -> Decision:
    """The verdict that packets meet."""
    return _decide([c for c in found if not c.audit], bool(spec.policies))


def second(spec: RuleSetSpec, found: Sequence[Candidate]) -> Decision:
    """The verdict if policies in audit mode counted too."""
    heard = [c for c in found if not (spec.audited and c.tier == "Baseline")]
    return _decide(heard, bool(spec.policies or spec.audited))


def _decide(heard: Sequence[Candidate], isolated: bool) -> Decision:
    admin = [c for c in heard if c.tier == "Admin"]
    others = [c for c in heard if c.tier != "Admin"]
    for group in (admin, others):
        if group and group[0].action != "Pass":
            return Decision(group[0].action == "Allow", group[0])
    return Decision(not isolated, None)
