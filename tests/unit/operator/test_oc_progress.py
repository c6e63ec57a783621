"""How far policies are in force: by digests that nodes report, late, twice or never."""

from __future__ import annotations

import pytest
from tidegate_operator.cluster.conditions import MAX_NAMED, Said, conditions, named, of_policy
from tidegate_operator.cluster.progress import (
    KEPT_DIGESTS,
    PEERS_SECONDS,
    Count,
    PolicyKey,
    Progress,
    Standing,
)
from tidegate_operator.objects import PolicyName
from tidegate_operator.problems import Problem

P1: PolicyKey = (PolicyName("NetworkPolicy", "default", "p"), "uid", 1)
P2: PolicyKey = (PolicyName("NetworkPolicy", "default", "p"), "uid", 2)
BOTH = ["n1", "n2"]


def test_in_force_when_every_node_says_so() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    assert (progress.of(P1).count, progress.everywhere()) == (Count(0, 2), 0)
    progress.realised({"n1": "a1"})
    assert (progress.of(P1).count, progress.everywhere()) == (Count(1, 2), 0)
    progress.realised({"n1": "a1", "n2": "b1"})
    assert (progress.of(P1).count, progress.everywhere()) == (Count(2, 2), 1)


def test_edited_policy_starts_anew_but_for_nodes_that_need_nothing() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    progress.published({"n1": "a2", "n2": "b1"}, {P2: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    assert progress.of(P2).count == Count(1, 2)
    assert progress.of(P1).count == Count(0, 0)
    progress.realised({"n1": "a2"})
    assert progress.of(P2).count == Count(2, 2)


def test_pods_that_come_and_go_do_not_undo_it() -> None:
    """The node is always behind, and the policy was in force all the while."""
    progress = Progress()
    progress.published({"n1": "a1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1"})
    for number in range(2, 9):
        progress.published({"n1": f"a{number}"}, {P1: ["n1"]})
        progress.realised({"n1": f"a{number - 1}"})
        assert progress.of(P1).count == Count(1, 1)
        assert progress.everywhere() == number - 1


def test_node_where_it_comes_to_matter_has_to_realise_it() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1", "n2": "b1"})
    progress.published({"n1": "a1", "n2": "b2"}, {P1: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    assert progress.of(P1).count == Count(1, 2)
    progress.realised({"n2": "b2"})
    assert progress.of(P1).count == Count(2, 2)


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
    assert progress.of(P1).count == Count(1, 2)
    progress.published({"n2": "b1"}, {P1: ["n2"]})
    progress.realised({"n2": "b1"})
    assert (progress.of(P1).count, progress.everywhere()) == (Count(1, 1), 2)


def test_what_is_kept_has_a_bound() -> None:
    progress = Progress()
    for number in range(KEPT_DIGESTS + 1):
        progress.published({"n1": f"a{number}"}, {})
    progress.realised({"n1": "a0"})
    assert progress.everywhere() == 0


def test_a_silent_node_is_not_counted_and_has_to_say_anew_what_it_has() -> None:
    progress = Progress()
    progress.published({"n1": "a1", "n2": "b1"}, {P1: BOTH})
    progress.realised({"n1": "a1", "n2": "b1"})
    assert progress.of(P1) == Standing(Count(2, 2), [], [])
    progress.realised({"n1": "a1", "n2": "b1"}, silent={"n2"})
    assert progress.of(P1) == Standing(Count(1, 1), [], ["n2"])
    progress.published({"n1": "a2", "n2": "b2"}, {P2: BOTH})
    progress.realised({"n1": "a2", "n2": "b1"}, silent={"n2"})
    assert (progress.of(P2), progress.everywhere()) == (Standing(Count(1, 1), [], ["n2"]), 2)
    # Back, with what it had: that is not what is meant now. Then with something unknown.
    for said in ("b1", "?"):
        progress.realised({"n1": "a2", "n2": said})
        assert progress.of(P2) == Standing(Count(1, 2), ["n2"], [])
    progress.realised({"n1": "a2", "n2": "b2"})
    assert progress.of(P2) == Standing(Count(2, 2), [], [])


def test_what_a_silent_node_said_before_is_void() -> None:
    progress = Progress()
    progress.published({"n1": "a1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1"})
    progress.realised({"n1": "a1"}, silent={"n1"})
    progress.realised({})  # heard of again, but nothing of what is in force
    assert progress.of(P1) == Standing(Count(0, 1), ["n1"], [])


PEERS = [
    ("says nothing of them", [("p1", 0.0), ("p2", 1.0)], None, 99.0, False),
    ("has the newest", [("p1", 0.0), ("p2", 1.0)], "p2", 99.0, False),
    ("a moment behind", [("p1", 0.0), ("p2", 50.0)], "p1", 50.0 + PEERS_SECONDS / 2, False),
    ("behind for long", [("p1", 0.0), ("p2", 50.0)], "p1", 50.0 + PEERS_SECONDS, True),
    ("behind for long, then more", [("p1", 0.0), ("p2", 50.0), ("p3", 54.9)], "p1", 55.0, True),
    ("on its way", [("p1", 0.0), ("p2", 50.0), ("p3", 54.9)], "p2", 55.0, False),
    ("back to what it was", [("p1", 0.0), ("p2", 50.0), ("p1", 99.0)], "p1", 99.0, False),
    ("says what nobody knows", [("p1", 0.0)], "?", PEERS_SECONDS, True),
    ("the same, a moment ago", [("p1", 0.0)], "?", PEERS_SECONDS / 2, False),
]


@pytest.mark.parametrize(("reason", "published", "said", "now", "late"), PEERS)
def test_a_node_that_stays_behind_with_peers_does_not_have_it_in_force(
    reason: str, published: list[tuple[str, float]], said: str | None, now: float, late: bool
) -> None:
    progress = Progress()
    progress.published({"n1": "a1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1"})
    for digest, at in published:
        progress.peers({"n1": digest}, at)
    told = {} if said is None else {"n1": said}
    progress.realised_peers(told, now)
    assert progress.of(P1).count == Count(0 if late else 1, 1)
    # And when it has caught up, it is.
    progress.realised_peers({"n1": published[-1][0]}, now + 99.0)
    assert progress.of(P1).count == Count(1, 1)


def test_digests_of_peers_have_a_bound() -> None:
    progress = Progress()
    progress.published({"n1": "a1"}, {P1: ["n1"]})
    progress.realised({"n1": "a1"})
    for number in range(KEPT_DIGESTS + 1):
        progress.peers({"n1": f"p{number}"}, float(number))
    progress.realised_peers({"n1": "p0"}, 1.0 + PEERS_SECONDS)
    assert progress.of(P1).count == Count(0, 1)


ERROR = Problem(severity="error", field="spec.ingress[0].ports[0].port", message="is not yet")
WARNING = Problem(severity="warning", field="spec.podSelector", message="selects no pod now")
READY = {"Ready": True}
ON_ITS_WAY = {"Ready": False, "Reconciling": True}
STALLED = {"Ready": False, "Stalled": True}
LEFT_OUT = {"NodesSilent": True}
SAID = [
    ("in force", (2, 2), [], [], [], READY, "in force on 2 of 2 nodes"),
    ("selects nothing", (0, 0), [], [], [WARNING], READY, "selects no pod now"),
    ("on its way", (1, 2), ["n2"], [], [], ON_ITS_WAY,
     "in force on 1 of 2 nodes, not yet on n2"),
    ("not as written, in force", (2, 2), [], [], [ERROR], STALLED, "is not yet"),
    ("not as written, on its way", (0, 2), BOTH, [], [ERROR, WARNING], STALLED, "on n1, n2"),
    ("all that is counted", (1, 1), [], ["n2"], [], READY | LEFT_OUT, "in force on 1 of 1 nodes"),
    ("on its way, one silent", (0, 1), ["n1"], ["n2"], [], ON_ITS_WAY | LEFT_OUT, "not yet on n1"),
    ("nobody is heard of", (0, 0), [], BOTH, [], ON_ITS_WAY | LEFT_OUT, "on 0 of 0 nodes"),
    ("stalled, one silent", (1, 1), [], ["n2"], [ERROR], STALLED | LEFT_OUT, "is not yet"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "count", "behind", "silent", "problems", "expected", "words"), SAID
)
def test_conditions(
    reason: str,
    count: tuple[int, int],
    behind: list[str],
    silent: list[str],
    problems: list[Problem],
    expected: dict[str, bool],
    words: str,
) -> None:
    said = of_policy(Standing(Count(*count), behind, silent), problems)
    assert {item.type: item.status for item in said} == expected
    assert all(item.reason.isalpha() and item.message for item in said)
    assert words in said[0].message
    if silent:
        assert f"not reported for 10 minutes: {', '.join(silent)};" in said[-1].message


def test_few_nodes_are_named_and_the_others_counted() -> None:
    nodes = [f"n{number}" for number in range(MAX_NAMED + 3)]
    assert named(nodes[:2]) == "n0, n1"
    assert named(nodes).endswith("n9 and 3 more")


def test_transition_time_stays_while_the_status_does() -> None:
    first = conditions([Said("Ready", False, "A", "one")], [], 1, "T1")
    same = conditions([Said("Ready", False, "B", "two")], first, 2, "T2")
    turned = conditions([Said("Ready", True, "B", "two")], same, 2, "T3")
    assert [(c[0].last_transition_time, c[0].message) for c in (first, same, turned)] == [
        ("T1", "one"), ("T1", "two"), ("T3", "two"),
    ]  # fmt: skip
    assert same[0].observed_generation == 2
