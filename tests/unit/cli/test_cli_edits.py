"""The walk through the tiers, and the least to write for the other verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tidegate_api.state import (
    ADMIN_PRECEDENCE,
    DEVELOPER_PRECEDENCE,
    PolicyRef,
    Rule,
    RuleSetSpec,
)
from tidegate_cli import judgement
from tidegate_cli.edits import Flow, Near, smallest
from tidegate_cli.judgement import Candidate, RuleRef

NP = PolicyRef(kind="NetworkPolicy", namespace="n", name="np")
TP = PolicyRef(kind="TrafficPolicy", namespace="n", name="tp")
CNP = PolicyRef(kind="ClusterNetworkPolicy", name="cnp")
FLOW = Flow("n/web", "n/client", "80/TCP", "Ingress")


def spec(*policies: PolicyRef, audited: bool = False) -> RuleSetSpec:
    return RuleSetSpec(
        format=2,
        direction="Ingress",
        policies=list(policies),
        others=[TP, CNP],
        rules=[Rule(policy=0, index=0)],
        terms=[],
        audited=[0] if audited else [],
    )


def hit(policy: PolicyRef, action: str, precedence: int, number: int = 0) -> Candidate:
    return Candidate(
        tier=judgement.tier_of(precedence),
        action=action,  # type: ignore[arg-type]
        rule=RuleRef(policy, "Ingress", number),
        number=number,
        precedence=precedence,
        audit=False,
        log=False,
    )


ALLOW = hit(NP, "Allow", DEVELOPER_PRECEDENCE)
OTHER = hit(NP, "Allow", DEVELOPER_PRECEDENCE, 2)
DENY = hit(TP, "Deny", DEVELOPER_PRECEDENCE + 1, 1)
GATE = hit(CNP, "Deny", ADMIN_PRECEDENCE + 9, 3)
OPEN = hit(CNP, "Allow", ADMIN_PRECEDENCE + 8, 4)
PASSES = hit(CNP, "Pass", ADMIN_PRECEDENCE + 9, 5)
BASE = hit(CNP, "Deny", 7, 6)


ROWS = [
    ("nobody has a say", None, [], [], [
        "add a NetworkPolicy in namespace n that selects n/web, with policyTypes: [Ingress] and "
        "without a rule for from n/client, 80/TCP"]),
    ("one rule allows", spec(NP), [ALLOW], [], ["remove NetworkPolicy n/np spec.ingress[0]"]),
    ("two rules allow", spec(NP), [ALLOW, OTHER], [], [
        "add a TrafficPolicy in namespace n that selects n/web: deny from n/client, 80/TCP"]),
    ("a rule allows, nothing isolates", spec(), [ALLOW], [], [
        "add a TrafficPolicy in namespace n that selects n/web: deny from n/client, 80/TCP"]),
    ("default deny", spec(NP), [], [], [
        "add a rule to NetworkPolicy n/np spec.ingress: allow from n/client, 80/TCP"]),
    ("a port is missing", spec(NP), [], [Near(ALLOW.rule, "ports"), Near(OTHER.rule, "peers")], [
        "add 80/TCP to the ports of NetworkPolicy n/np spec.ingress[0]"]),
    ("a peer is missing", spec(NP), [], [Near(OTHER.rule, "peers")], [
        "add n/client to the peers of NetworkPolicy n/np spec.ingress[2]"]),
    ("a deny over an allow", spec(NP), [DENY, ALLOW], [], [
        "remove TrafficPolicy n/tp spec.ingress[1]"]),
    ("a deny over nothing", spec(NP), [DENY], [], [
        "remove TrafficPolicy n/tp spec.ingress[1]",
        "add a rule to NetworkPolicy n/np spec.ingress: allow from n/client, 80/TCP"]),
    ("an Admin deny over all", spec(NP), [GATE, DENY, ALLOW], [], [
        "change the action of ClusterNetworkPolicy cnp spec.ingress[3] from Deny to Accept"]),
    ("an Admin allow", spec(NP), [OPEN], [], [
        "change the action of ClusterNetworkPolicy cnp spec.ingress[4] from Accept to Deny"]),
    ("passed on to a deny", spec(NP), [PASSES, DENY, ALLOW], [], [
        "remove TrafficPolicy n/tp spec.ingress[1]"]),
    ("the Baseline denies", spec(), [BASE], [], [
        "change the action of ClusterNetworkPolicy cnp spec.ingress[6] from Deny to Accept"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("why", "held", "found", "near", "expected"), ROWS, ids=[r[0] for r in ROWS]
)
def test_the_least_to_write(
    why: str,
    held: RuleSetSpec | None,
    found: list[Candidate],
    near: list[Near],
    expected: list[str],
) -> None:
    assert smallest(held, found, near, FLOW) == expected


POOL = [ALLOW, OTHER, DENY, GATE, OPEN, PASSES, BASE, hit(CNP, "Allow", 6, 7)]


@given(st.lists(st.sampled_from(POOL), unique=True), st.booleans(), st.booleans())
def test_what_is_told_gives_the_other_verdict(
    found: list[Candidate], isolated: bool, audited: bool
) -> None:
    """Removals and changes are made to the rules that match; what is added decides at last."""
    held = spec(NP, audited=audited) if isolated else spec(audited=audited)
    now = sorted(found, key=lambda c: (-c.precedence, c.number))
    before = judgement.enforced(held, now).allowed
    told = smallest(held, now, [], FLOW)
    for text in told:
        if text.startswith("add"):
            assert text is told[-1]
            by = judgement.enforced(held, now).by
            assert by is None or by.tier != "Admin", "an Admin rule outranks what is added"
            return
        hits = [c for c in now if f"{c.rule}" in text.split(" from ")[0]]
        assert hits, text
        wanted = "Allow" if text.endswith("Accept") else "Deny"
        changed = text.startswith("change")
        now = [replace(c, action=wanted) if changed and c in hits else c for c in now]  # type: ignore[arg-type]
        now = now if changed else [c for c in now if c not in hits]
    assert judgement.enforced(held, now).allowed != before


def test_the_walk_says_what_became_of_each() -> None:
    audit = replace(DENY, audit=True)
    steps = judgement.walk([PASSES, OPEN, audit, ALLOW, OTHER, BASE])
    assert [(s.candidate.number, s.fate) for s in steps] == [
        (5, "passes on"),
        (4, "not heard"),
        (1, "in audit"),
        (0, "decides"),
        (2, "not heard"),
        (6, "not heard"),
    ]
    assert [s.fate for s in judgement.walk([GATE, ALLOW])] == ["decides", "not heard"]
