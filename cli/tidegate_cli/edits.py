"""The least that has to be written for the other verdict, of one end's policy.

Every edit is tried on the rules that match before it is told. May not live here: what a rule
matches (`model`), and how the verdict comes about (`judgement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tidegate_api.state import PolicyRef, RuleSetSpec

from tidegate_cli import judgement
from tidegate_cli.judgement import Candidate, RuleRef, policy_text

WITH_ACTIONS = "ClusterNetworkPolicy"
"""The kind whose rules have an action that can be changed in place."""
Missing = Literal["ports", "peers"]


@dataclass(frozen=True)
class Near:
    """A rule that would allow the flow if it had one more port, or one more peer."""

    rule: RuleRef
    missing: Missing


@dataclass(frozen=True)
class Flow:
    """The end and the flow in words: `subject` and `peer` are pods or addresses, `ports` "80/TCP",
    "ICMP type 8"; `direction` "Ingress" or "Egress"."""

    subject: str
    peer: str
    ports: str
    direction: str


def smallest(
    spec: RuleSetSpec | None, found: Sequence[Candidate], near: Sequence[Near], flow: Flow
) -> list[str]:
    """What to write, one object's field a line; all of it is needed. `spec` None: no policy has a
    say. `near`: of a default denial."""
    if spec is None:
        return [_isolate(flow)]
    if judgement.enforced(spec, found).allowed:
        return _to_deny(spec, found, flow)
    return _to_allow(spec, found, near, flow)


def _to_allow(
    spec: RuleSetSpec, found: Sequence[Candidate], near: Sequence[Near], flow: Flow
) -> list[str]:
    edits: list[str] = []
    now = list(found)
    while not (decision := judgement.enforced(spec, now)).allowed:
        if decision.by is None:
            return [*edits, _widen(spec.policies, near, flow)]
        text, now = _turned(decision.by, now, "Allow")
        edits.append(text)
    return edits


def _to_deny(spec: RuleSetSpec, found: Sequence[Candidate], flow: Flow) -> list[str]:
    decision = judgement.enforced(spec, found)
    if decision.by is None:
        return [_isolate(flow)]
    edits: list[str] = []
    now = list(found)
    while (decision := judgement.enforced(spec, now)).allowed and decision.by is not None:
        text, now = _turned(decision.by, now, "Deny")
        edits.append(text)
    if not decision.allowed and len(edits) == 1:
        return edits
    # Several rules allow it, or nothing isolates: one rule that denies outranks them all.
    first = judgement.enforced(spec, found).by
    if first is not None and first.tier == "Admin":
        return edits if not decision.allowed else [*edits, _isolate(flow)]
    namespace = flow.subject.partition("/")[0]
    where = f"TrafficPolicy in namespace {namespace} that selects {flow.subject}"
    return [f"add a {where}: deny {_words(flow)}"]


def _turned(
    by: Candidate, found: list[Candidate], wanted: Literal["Allow", "Deny"]
) -> tuple[str, list[Candidate]]:
    """The edit of the rule that decides now, and what matches after it."""
    if by.rule.policy.kind == WITH_ACTIONS:
        word = {"Allow": "Accept", "Deny": "Deny"}
        text = f"change the action of {by.rule} from {word[by.action]} to {word[wanted]}"
        return text, [replace(c, action=wanted) if c.number == by.number else c for c in found]
    return f"remove {by.rule}", [c for c in found if c.number != by.number]


def _widen(isolating: Sequence[PolicyRef], near: Sequence[Near], flow: Flow) -> str:
    for missing, what in (("ports", flow.ports), ("peers", flow.peer)):
        hit = next((n for n in near if n.missing == missing), None)
        if hit is not None:
            return f"add {what} to the {missing} of {hit.rule}"
    field = f"spec.{flow.direction.lower()}"
    return f"add a rule to {policy_text(isolating[0])} {field}: allow {_words(flow)}"


def _isolate(flow: Flow) -> str:
    namespace = flow.subject.partition("/")[0]
    return (
        f"add a NetworkPolicy in namespace {namespace} that selects {flow.subject}, with "
        f"policyTypes: [{flow.direction}] and without a rule for {_words(flow)}"
    )


def _words(flow: Flow) -> str:
    side = "from" if flow.direction == "Ingress" else "to"
    return f"{side} {flow.peer}, {flow.ports}"
