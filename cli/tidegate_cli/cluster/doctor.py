"""What a cluster has and lacks, a line each; of every node what its loader's pod finds there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from tidegate_kube import resources

from tidegate_cli.cluster.state import DAEMON_SETS, KINDS, LOADER_SELECTOR, ClusterState
from tidegate_cli.doctor import Line

OLDEST = (1, 32)
"""Of Kubernetes."""
GROUP = "/apis/tidegate.dev/v1alpha1"


def examine(place: ClusterState, only: str | None) -> list[Line]:
    """Every check, whatever the others say. CliError: the API server does not answer."""
    lines = [_version(place), _kinds(place)]
    if lines[-1].grade == "FAIL":  # nothing below is there
        return lines
    lines += [_operator(place), *_loaders(place), *_states(place), _proxy(place)]
    return [*lines, *_nodes(place, only)]


def _version(place: ClusterState) -> Line:
    found = place.api.get("/version")
    text = str(found.get("gitVersion", ""))
    digits = [
        int("".join(c for c in found.get(k, "0") if c.isdigit()) or 0) for k in ("major", "minor")
    ]
    detail = f"{text} at {place.api.server}"
    if tuple(digits) < OLDEST:
        return Line("FAIL", "Kubernetes", detail, f"upgrade to {OLDEST[0]}.{OLDEST[1]} or newer")
    return Line("ok", "Kubernetes", detail)


def _kinds(place: ClusterState) -> Line:
    found = place.api.find(GROUP) or {"resources": []}
    served = {item["name"] for item in found["resources"]}
    wanted = [r.plural for r in (*KINDS, resources.POLICY_STATUSES)]
    missing = [name for name in wanted if name not in served]
    if missing:
        return Line("FAIL", "kinds", f"not served: {', '.join(missing)}", "run `tidegate install`")
    return Line("ok", "kinds", f"{len(wanted)} of tidegate.dev/v1alpha1")


def _operator(place: ClusterState) -> Line:
    found = place.operator()
    detail = f"{found['ready']} of {found['replicas']} ready, leader {found['leader'] or 'nobody'}"
    if found["ready"] and found["leader"]:
        return Line("ok", "operator", detail)
    return Line("FAIL", "operator", detail, "`tidegate sysdump` has its log")


def _loaders(place: ClusterState) -> Iterator[Line]:
    found = list(place.api.items(DAEMON_SETS, labelSelector=LOADER_SELECTOR))
    if not found:
        yield Line("FAIL", "loader", "there is no DaemonSet", "run `tidegate install`")
    for item in found:
        status: Any = item.get("status", {})
        ready, wanted = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
        good = wanted and ready == wanted
        detail = f"{ready} of {wanted} ready"
        yield Line("ok" if good else "FAIL", "loader", detail, "`tidegate status` says which not")


def _states(place: ClusterState) -> Iterator[Line]:
    nodes = {item["metadata"]["name"] for item in place.api.items(resources.NODES)}
    without = sorted(nodes - place.states.keys())
    if without:
        detail = f"none of {', '.join(without)}"
        yield Line("FAIL", "node states", detail, "the operator writes them: is it ready?")
    late = []
    for name, state in sorted(place.states.items()):
        conditions = {c.type: c.status for c in state.status.conditions} if state.status else {}
        if conditions.get("Ready") != "True":
            late.append(name)
    if late:
        yield Line("FAIL", "in force", f"not on {', '.join(late)}", "`tidegate status` says why")
    elif not without:
        yield Line("ok", "in force", f"on {len(place.states)} nodes")


def _proxy(place: ClusterState) -> Line:
    found = place.api.find(DAEMON_SETS.path("kube-system", "kube-proxy"))
    if found is None:
        return Line("ok", "kube-proxy", "not there; Services are Tidegate's")
    remedy = "remove the DaemonSet kube-system/kube-proxy: one of them is enough"
    return Line("warn", "kube-proxy", "serves Services too", remedy)


def _nodes(place: ClusterState, only: str | None) -> Iterator[Line]:
    asked = place.ask(place.nodes(only), lambda _node: ["doctor"])
    for node, answer in asked.answers.items():
        try:
            lines = msgspec.convert(answer, list[Line])
        except msgspec.ValidationError as error:
            lines = [Line("FAIL", "loader", f"is of another version: {error}", "upgrade it")]
        for line in lines:
            yield Line(line.grade, f"{node} {line.name}", line.detail, line.remedy)
    for node, text in asked.failed.items():
        yield Line("FAIL", f"{node} loader", text, "is its pod running?")
