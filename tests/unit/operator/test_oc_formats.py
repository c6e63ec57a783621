"""Which nodes' loaders are too old for what is published."""

from __future__ import annotations

import pytest
from msgspec import UNSET
from tidegate_api import API_VERSION
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    Condition,
    Meta,
    NodeState,
    NodeStateSpec,
    NodeStateStatus,
)
from tidegate_operator.cluster import formats
from tidegate_operator.cluster.kinds import Held


def state(number: int, status: NodeStateStatus | None) -> NodeState:
    spec = NodeStateSpec(
        format=number, mode="Enforcing", endpoints=[], rule_sets=[], peer_sets=[], tables={}
    )
    return NodeState(
        api_version=API_VERSION,
        kind="NodeState",
        metadata=Meta(name="n", annotations={DIGEST_ANNOTATION: "wanted"}),
        spec=spec,
        status=UNSET if status is None else status,
    )


def stalled(reason: str) -> list[Condition]:
    return [
        Condition(
            type="Stalled",
            status="True",
            reason=reason,
            message="so it is",
            last_transition_time="2026-01-01T00:00:00Z",
        )
    ]


@pytest.mark.parametrize(
    ("why", "number", "status", "named"),
    [
        ("it has said nothing", 9, None, False),
        ("nor what it reads", 9, NodeStateStatus(realised="before"), False),
        ("it reads it", 2, NodeStateStatus(realised="before", formats=[1, 2]), False),
        ("it does not", 9, NodeStateStatus(realised="before", formats=[1, 2]), True),
        ("it is in force", 9, NodeStateStatus(realised="wanted", formats=[1, 2]), False),
        (
            "it is in force, by one before it",
            9,
            NodeStateStatus(realised="wanted", formats=[1, 2], conditions=stalled("UnknownFormat")),
            True,
        ),
        (
            "it is stalled by something else",
            9,
            NodeStateStatus(realised="wanted", formats=[1, 2], conditions=stalled("Other")),
            False,
        ),
    ],
)
def test_who_is_named(why: str, number: int, status: NodeStateStatus | None, named: bool) -> None:
    found = formats.unread({("", "n"): Held(state(number, status), "1", "u")}, {}, {})
    assert ("n" in found) == named, why
    if named:
        assert "reads format 1 and 2, not format 9" in found["n"]
