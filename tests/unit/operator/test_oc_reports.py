"""Who counts as dead: nodes that are not heard of for ten minutes, by our clock."""

from __future__ import annotations

import datetime

from msgspec import UNSET, UnsetType
from tidegate_api import API_VERSION
from tidegate_api.state import DIGEST_ANNOTATION, Meta, NodeState, NodeStateSpec, NodeStateStatus
from tidegate_operator.cluster.kinds import Broken, Held
from tidegate_operator.cluster.reports import SILENT_SECONDS, Reports

BEGAN = 1_800_000_000.0
"""Seconds since 1970 when a test begins."""


class Clock:
    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return 5.0 + self.passed

    def wall(self) -> float:
        return BEGAN + self.passed


def at(seconds: float) -> str:
    """A time of the API, so long after the test began."""
    moment = datetime.datetime.fromtimestamp(BEGAN + seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def state(
    name: str,
    said: str | UnsetType | None = UNSET,
    realised: str | UnsetType = "wanted",
    uid: str = "u",
    created: float = 0.0,
) -> dict[tuple[str, str], Held[NodeState] | Broken]:
    """`said`: the time in its status; UNSET: of a loader that says none; None: no status."""
    status: NodeStateStatus | UnsetType = UNSET
    if said is not None:
        status = NodeStateStatus(realised=realised, last_report_time=said)
    meta = Meta(
        name=name, annotations={DIGEST_ANNOTATION: "wanted"}, creation_timestamp=at(created)
    )
    spec = NodeStateSpec(format=1, mode="Enforcing", endpoints=[], rule_sets=[], peer_sets=[],
                         tables={})  # fmt: skip
    item = NodeState(
        api_version=API_VERSION, kind="NodeState", metadata=meta, spec=spec, status=status
    )
    return {("", name): Held(item, "1", uid)}


def made(clock: Clock) -> Reports:
    return Reports(clock.monotonic, clock.wall)


def test_silent_after_ten_minutes_and_back_with_the_next_report() -> None:
    clock = Clock()
    reports = made(clock)
    assert reports.silent(state("n", at(0))) == frozenset()
    clock.passed = SILENT_SECONDS - 1
    assert reports.silent(state("n", at(0))) == frozenset()
    clock.passed = SILENT_SECONDS
    assert reports.silent(state("n", at(0))) == {"n"}
    assert reports.silent(state("n", at(SILENT_SECONDS))) == frozenset()
    clock.passed = 2 * SILENT_SECONDS - 1
    assert reports.silent(state("n", at(SILENT_SECONDS))) == frozenset()


def test_a_nodes_clock_may_be_wrong() -> None:
    """What it says is new whenever it is another time than before."""
    clock = Clock()
    reports = made(clock)
    for step in range(5):
        clock.passed = step * 90.0
        wrong = at(step * 90.0 - 86_400)
        assert reports.silent(state("late", wrong)) == ({"late"} if step == 0 else frozenset())
        early = at(step * 90.0 + 86_400)
        assert made(clock).silent(state("early", early)) == frozenset()


def test_a_new_operator_knows_how_old_a_report_is() -> None:
    clock = Clock()
    assert made(clock).silent(state("n", at(-SILENT_SECONDS - 1))) == {"n"}
    reports = made(clock)
    assert reports.silent(state("n", at(-400))) == frozenset()
    clock.passed = SILENT_SECONDS - 400
    assert reports.silent(state("n", at(-400))) == {"n"}


def test_a_node_that_never_reported_is_silent_when_its_state_is_old() -> None:
    clock = Clock()
    reports = made(clock)
    old = state("old", None, created=-SILENT_SECONDS)
    young = state("young", None)
    assert reports.silent(old | young) == {"old"}
    clock.passed = SILENT_SECONDS
    assert reports.silent(old | young) == {"old", "young"}


def test_a_loader_that_says_no_time_counts() -> None:
    clock = Clock()
    reports = made(clock)
    for clock.passed in (0.0, 10 * SILENT_SECONDS):
        assert reports.silent(state("n")) == frozenset()


def test_another_node_of_the_name_begins_anew() -> None:
    clock = Clock()
    reports = made(clock)
    reports.silent(state("n", at(0)))
    clock.passed = SILENT_SECONDS
    new = state("n", None, uid="other", created=SILENT_SECONDS)
    assert reports.silent(new) == frozenset()


def test_no_time_passes_while_nothing_could_be_heard() -> None:
    clock = Clock()
    reports = made(clock)
    there = state("n", at(0))
    reports.silent(there)
    clock.passed = 100 * SILENT_SECONDS
    assert reports.silent(there, in_touch=False) == frozenset()
    clock.passed += SILENT_SECONDS - 1
    assert reports.silent(there) == frozenset()
    clock.passed += 1
    assert reports.silent(there) == {"n"}


def test_lagging_are_the_living_that_enforce_something_else() -> None:
    clock = Clock()
    reports = made(clock)
    states = {
        **state("same", at(0)),
        **state("behind", at(0), realised="before"),
        **state("fresh", at(0), realised=UNSET),
        **state("new", None),
        **state("dead", at(-SILENT_SECONDS), realised="before"),
        ("", "broken"): Broken("1", "u", "not ours"),
    }
    assert reports.lagging(states) == ["behind"]


def test_a_time_that_is_none_is_as_good_as_now() -> None:
    clock = Clock()
    for text in ("yesterday", "2026-01-01T00:00:00"):
        assert made(clock).silent(state("n", text)) == frozenset()
