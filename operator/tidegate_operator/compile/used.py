"""What is in use: counted, so that a change costs the subjects that it touches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate_api.state import RuleSet

from tidegate_operator.compile.rules import Compiled
from tidegate_operator.objects import IdentityKey, Policy, PolicyName


@dataclass(frozen=True, slots=True)
class Subject:
    """What an identity is subject to: `candidates` are the policies that look at its namespace,
    `selecting` those of them that select it."""

    candidates: tuple[Policy, ...]
    selecting: tuple[Policy, ...]
    ingress: Compiled | None
    egress: Compiled | None
    parts: tuple[Compiled, ...]
    """Those of the two that there are."""


class Used:
    """What the subjects that have pods come to, counted: rule sets, the peer sets that they name,
    and the policies that select them."""

    def __init__(self) -> None:
        self.policies: dict[PolicyName, int] = {}
        self.said = 0
        """Changes with which policies select somebody, and with which rule sets are refused."""
        self.subjects: dict[IdentityKey, Subject] = {}
        self._parts: dict[str, tuple[Compiled, int]] = {}
        self._in_force: tuple[dict[str, RuleSet], tuple[str, ...]] | None = None

    def follow(
        self,
        touched: Iterable[IdentityKey],
        now: Mapping[IdentityKey, object],
        subjects: Mapping[IdentityKey, Subject],
    ) -> None:
        """`touched`: those that may differ; `now`: the keys of those that have pods."""
        held = self.subjects
        lost = [key for key in touched if key in held and key not in now]
        new = [key for key in touched if key in now and held.get(key) is not subjects[key]]
        for key in new:
            self._more(subjects[key])
        for key in (*lost, *new):
            if key in held:
                self._less(held.pop(key))
        for key in new:
            held[key] = subjects[key]

    def refused(self) -> dict[PolicyName, int]:
        """Policies of rule sets that are too large, and how large the largest would be."""
        found: dict[PolicyName, int] = {}
        for part, _ in self._parts.values():
            for policy in part.policies if part.refused else ():
                found[policy.name] = max(part.refused, found.get(policy.name, 0))
        return found

    def _more(self, subject: Subject) -> None:
        for part in subject.parts:
            known, count = self._parts.get(part.name, (part, 0))
            if not count:
                self._in_force = None
                self.said += bool(part.refused)
            self._parts[part.name] = (known, count + 1)
        for policy in subject.selecting:
            count = self.policies.get(policy.name, 0)
            self.said += not count
            self.policies[policy.name] = count + 1

    def _less(self, subject: Subject) -> None:
        for part in subject.parts:
            known, count = self._parts.pop(part.name)
            if count > 1:
                self._parts[part.name] = (known, count - 1)
            else:
                self._in_force = None
                self.said += bool(known.refused)
        for policy in subject.selecting:
            count = self.policies.pop(policy.name) - 1
            if count:
                self.policies[policy.name] = count
            else:
                self.said += 1

    def in_force(self) -> tuple[dict[str, RuleSet], tuple[str, ...]]:
        """Rule sets, and the names of peer sets, that pods use; sorted."""
        if self._in_force is None:
            parts = [part for part, _ in self._parts.values()]
            names = {name for part in parts for name in part.peers}
            rule_sets = {part.name: part.rule_set for part in parts}
            self._in_force = dict(sorted(rule_sets.items())), tuple(sorted(names))
        return self._in_force
