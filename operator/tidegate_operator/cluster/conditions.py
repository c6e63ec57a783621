"""Conditions of what people read: what they say, as kstatus, Flux and Argo CD read it. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec import UNSET
from tidegate_api.state import Condition

from tidegate_operator.cluster.kinds import Held
from tidegate_operator.cluster.progress import Standing
from tidegate_operator.cluster.reports import SILENT_SECONDS, States
from tidegate_operator.problems import Problem

MAX_MESSAGE = 1024
MAX_NAMED = 10
"""Nodes that a condition names."""


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Said:
    """A condition without its times."""

    type: str
    status: bool
    reason: str
    message: str


def conditions(
    said: Iterable[Said], before: Iterable[Condition], generation: int, now: str
) -> list[Condition]:
    """In the order of `said`; the time of the last transition stays while the status does."""
    held = {item.type: item for item in before}
    found = []
    for item in said:
        status = "True" if item.status else "False"
        old = held.get(item.type)
        since = old.last_transition_time if old is not None and old.status == status else now
        found.append(
            Condition(
                type=item.type,
                status=status,  # type: ignore[arg-type]
                reason=item.reason,
                message=item.message[:MAX_MESSAGE],
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return found


def of_policy(standing: Standing, problems: Iterable[Problem], why: str = "") -> list[Said]:
    """`Reconciling`, `Stalled` and `NodesSilent` only while true, as kstatus, Flux and Argo CD
    read the first two. `why`: what keeps a node from putting it in force, if that is known."""
    errors = [item for item in problems if item.severity == "error"]
    warnings = "; ".join(_words(item) for item in problems if item.severity == "warning")
    count, silent = standing.count, standing.silent
    place = f"{count.realised} of {count.total} nodes"
    if standing.behind:
        place += f", not yet on {named(standing.behind)}"
    left_out = []
    if silent:
        text = (
            f"not counted, as their loaders have not reported for {SILENT_SECONDS / 60:.0f} "
            f"minutes: {named(silent)}; what is newest then comes before all else there"
        )
        left_out = [Said("NodesSilent", True, "NotReporting", text)]
    if errors:
        text = "; ".join(_words(item) for item in errors)
        return [
            Said("Ready", False, "NotAsWritten", f"{text}; in force on {place}"),
            Said("Stalled", True, "NotAsWritten", text),
            *left_out,
        ]
    if count.realised < count.total or (silent and not count.total):
        reason = "Realising" if count.total else "NoNodeReports"
        text = "; ".join(filter(None, (f"in force on {place}", why)))
        return [
            Said("Ready", False, reason, text),
            Said("Reconciling", True, reason, text),
            *left_out,
        ]
    reason = "Realised" if count.total else "SelectsNothing"
    return [Said("Ready", True, reason, warnings or f"in force on {place}"), *left_out]


def named(nodes: Sequence[str]) -> str:
    """As many as a condition has room for."""
    more = len(nodes) - MAX_NAMED
    return ", ".join(nodes[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _words(problem: Problem) -> str:
    parts = [part for part in (problem.field, problem.message) if part]
    text = ": ".join(parts)
    return f"{text} ({problem.remedy})" if problem.remedy else text


def stalled_nodes(states: States) -> dict[str, str]:
    """Node → what its loader says has to be mended before it can go on."""
    found = {}
    for (_, name), item in states.items():
        status = item.item.status if isinstance(item, Held) else UNSET
        if status is not UNSET:
            for one in status.conditions:
                if one.type == "Stalled" and one.status == "True":
                    found[name] = f"the loader of node {name} says: {one.message}"
    return found
