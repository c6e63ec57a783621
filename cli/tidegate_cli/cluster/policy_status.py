"""Of policies in a cluster: what their statuses tell of the objects as they are now, and which
nodes lack them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET
from tidegate_api.state import (
    DIGEST_ANNOTATION,
    NodeState,
    NodeStateStatus,
    RuleSet,
    policy_status_name,
)
from tidegate_kube import resources
from tidegate_kube.resources import Resource

from tidegate_cli.cluster.state import ClusterState
from tidegate_cli.errors import CliError
from tidegate_cli.policy_wait import Look, Target

RESOURCES: Mapping[str, Resource] = {
    item.kind: item
    for item in (
        resources.NETWORK_POLICIES,
        resources.TRAFFIC_POLICIES,
        resources.CLUSTER_NETWORK_POLICIES,
    )
}
NOT_YET = "the operator has not looked at it yet"


class Statuses:
    """Of one cluster."""

    def __init__(self, place: ClusterState) -> None:
        self._place = place
        self._api = place.api

    def looks(self, targets: Sequence[Target]) -> dict[Target, Look]:
        return {target: self._look(target) for target in targets}

    def _look(self, target: Target) -> Look:
        """CliError: there is no such policy."""
        policy = self._api.find(RESOURCES[target.kind].path(target.namespace, target.name))
        if policy is None:
            raise CliError(f"there is no {target} in {self._api.name}", "apply it first")
        resource = resources.POLICY_STATUSES if target.namespace else CLUSTER_STATUSES
        name = policy_status_name(target.kind, target.name)
        status = self._api.find(resource.path(target.namespace, name))
        return look_of(policy["metadata"], status)

    def missing(self, targets: Sequence[Target]) -> dict[str, str]:
        """Node → why it lacks one of them, of those that should have one."""
        place = ClusterState(self._api)  # read anew
        sets = {
            item.metadata.name
            for item in place.all()
            if isinstance(item, RuleSet)
            for ref in (*item.spec.policies, *item.spec.others)
            if Target(ref.kind, ref.namespace, ref.name) in targets
        }
        found = {
            name: text
            for name, state in place.states.items()
            if not sets.isdisjoint(state.spec.rule_sets) and (text := why(state))
        }
        if not found:
            operator = place.operator()
            if not operator["ready"] or not operator["leader"]:
                found["operator"] = (
                    f"{operator['ready']} of {operator['replicas']} ready, "
                    f"{'leader ' + operator['leader'] if operator['leader'] else 'no leader'}"
                )
        return found


CLUSTER_STATUSES = resources.CLUSTER_POLICY_STATUSES


def look_of(policy: Mapping[str, Any], status: Mapping[str, Any] | None) -> Look:
    """`policy`: its metadata now; `status`: the whole PolicyStatus, None where there is none."""
    generation = policy.get("generation", 0)
    more = {"generation": generation}
    if status is None:
        return Look(NOT_YET, more=more)
    told, said = status["policy"], status.get("status") or {}
    if told.get("uid") != policy.get("uid"):
        return Look(f"{NOT_YET}: its status tells of one before it, of the same name", more=more)
    if told.get("generation", 0) < generation:
        text = f"its status tells of generation {told.get('generation', 0)}, not of {generation}"
        return Look(f"{NOT_YET}: {text}", more=more)
    if said.get("observedGeneration", 0) < status["metadata"].get("generation", 0):
        return Look(NOT_YET, more=more)
    conditions = {one["type"]: one for one in said.get("conditions") or ()}
    ready = conditions.get("Ready", {"status": "Unknown", "message": NOT_YET})
    done = ready["status"] == "True"
    failed = conditions.get("Stalled", {}).get("status") == "True"
    text = ready["message"]
    if done and "NodesSilent" in conditions:
        text += f"; {conditions['NodesSilent']['message']}"
    return Look(text, done, failed, {**more, "nodes": said.get("nodes") or {}})


def why(state: NodeState, now: datetime.datetime | None = None) -> str:
    """What keeps a node from having in force what is published; "": nothing."""
    status = state.status or NodeStateStatus()
    wanted = (state.metadata.annotations or {}).get(DIGEST_ANNOTATION)
    if status.realised == wanted and wanted is not None:
        return ""
    conditions = {one.type: one for one in status.conditions}
    for kind, on in (("Stalled", "True"), ("Ready", "False")):
        if kind in conditions and conditions[kind].status == on:
            return f"{conditions[kind].message}{_age(status, now)}"
    return f"its loader has said nothing of it{_age(status, now)}"


def _age(status: NodeStateStatus, now: datetime.datetime | None) -> str:
    if status.last_report_time is UNSET:
        return ""
    try:
        then = datetime.datetime.fromisoformat(status.last_report_time)
        age = ((now or datetime.datetime.now(datetime.UTC)) - then).total_seconds()
    except (ValueError, TypeError):
        return ""
    return f" (reported {max(age, 0):.0f} s ago)"
