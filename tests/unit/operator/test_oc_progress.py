"""How far policies are in force: by digests that nodes report, late, twice or never."""

from __future__ import annotations

import pytest
from tidegate_operator.cluster.progress import KEPT_DIGESTS, Count, PolicyKey, Progress
from tidegate_operator.cluster.statuses import Said, conditions, of_policy
from tidegate_operator.objects import PolicyName
from tidegate_operator.problems import Problem

P1: PolicyKey = (PolicyName("NetworkPolicy", "default", "p"), "uid", 1)
P2: PolicyKey = (PolicyName("NetworkPolicy", "default", "p"), "uid", 2)
BOTH = ["n1", "n2"]


def test_in_force_when_every_node_says_so() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    assert (progress.of(P1), progress.everywhere()) == (Count(0, 2), 0)
    progress.realised({"n1": "a1"})
    assert (progress.of(P1), progress.everywhere()) == (Count(1, 2), 0)
    progress.realised({"n1": "a1", "n2": "b1"})
    assert (progress.of(P1), progress.everywhere()) == (Count(2, 2), 1)


def test_edited_policy_starts_anew_but_for_nodes_that_need_nothing() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    progress.published({"n1": "a2", "n2": "b1"}, {P2: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    assert progress.of(P2) == Count(1, 2)
    assert progress.of(P1) == Count(0, 0)
    progress.realised({"n1": "a2"})
    assert progress.of(P2) == Count(2, 2)


def test_pods_that_come_and_go_do_not_undo_it() -> None:
    """The node is always behind, and the policy was in force all the while."""
    progress = Progress()
    progress.published({"n1": "a1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1"})
    for number in range(2, 9):
        progress.published({"n1": f"a{number}"}, {P1: ["n1"]})
        progress.realised({"n1": f"a{number - 1}"})
        assert progress.of(P1) == Count(1, 1)
        assert progress.everywhere() == number - 1


def test_node_where_it_comes_to_matter_has_to_realise_it() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1", "n2": "b1"})
    progress.published({"n1": "a1", "n2": "b2"}, {P1: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    assert progress.of(P1) == Count(1, 2)
    progress.realised({"n2": "b2"})
    assert progress.of(P1) == Count(2, 2)


def test_state_that_returns_is_the_newest_again() -> None:
    progress = Progress()
    for digest in ("a1", "a2", "a1"):
        progress.published({"n1": digest}, {})
    progress.realised({"n1": "a1"})
    assert progress.everywhere() == 3


def test_unknown_digests_and_gone_nodes() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    progress.realised({"n1": "?", "n3": "a1", "n2": "b1"})
    assert progress.of(P1) == Count(1, 2)
    progress.published({"n2": "b1"}, {P1: ["n2"]})
    progress.realised({"n2": "b1"})
    assert (progress.of(P1), progress.everywhere()) == (Count(1, 1), 2)


def test_what_is_kept_has_a_bound() -> None:
    progress = Progress()
    for number in range(KEPT_DIGESTS + 1):
        progress.published({"n1": f"a{number}"}, {})
    progress.realised({"n1": "a0"})
    assert progress.everywhere() == 0


ERROR = Problem(severity="error", field="spec.ingress[0].ports[0].port", message="is not yet")
WARNING = Problem(severity="warning", field="spec.podSelector", message="selects no pod now")
SAID = [
    ("in force", Count(2, 2), [], {"Ready": True}),
    ("selects nothing", Count(0, 0), [WARNING], {"Ready": True}),
    ("on its way", Count(1, 2), [], {"Ready": False, "Reconciling": True}),
    ("not as written, in force", Count(2, 2), [ERROR], {"Ready": False, "Stalled": True}),
    ("not as written, on its way", Count(0, 2), [ERROR, WARNING],
     {"Ready": False, "Stalled": True}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "count", "problems", "expected"), SAID)
def test_conditions(
    reason: str, count: Count, problems: list[Problem], expected: dict[str, bool]
) -> None:
    said = of_policy(count, problems)
    assert {item.type: item.status for item in said} == expected
    assert all(item.reason.isalpha() and item.message for item in said)


def test_transition_time_stays_while_the_status_does() -> None:
    first = conditions([Said("Ready", False, "A", "one")], [], 1, "T1")
    same = conditions([Said("Ready", False, "B", "two")], first, 2, "T2")
    turned = conditions([Said("Ready", True, "B", "two")], same, 2, "T3")
    assert [(c[0].last_transition_time, c[0].message) for c in (first, same, turned)] == [
        ("T1", "one"), ("T1", "two"), ("T3", "two"),
    ]  # fmt: skip
    assert same[0].observed_generation == 2
