"""`tidegate status`: what each node should enforce, what it does, and what stands in the way.

Puts together objects, the loaders' reports and the kernel; changes nothing. In a cluster the API
says what is wanted and reported, and each node what its kernel holds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from tidegate_api.state import Condition, NodeState, NodeStateStatus, digest
from tidegate_bpf import clsact, netns

from tidegate_cli import live, render
from tidegate_cli.errors import CliError
from tidegate_cli.objects import NodePlace, RunObjects
from tidegate_cli.target import choose

if TYPE_CHECKING:
    from tidegate_cli.cluster.state import ClusterState

DIGEST_SHOWN = 12
MAX_PROBLEMS = 20
"""Shown in a table; -o json has all."""


def status(args: argparse.Namespace) -> int:
    place = choose(args)
    if isinstance(place, RunObjects):
        report: dict[str, Any] = {"nodes": _of_run(place, args.node)}
    else:
        report = {"operator": place.operator(), "nodes": _of_cluster(place, args.node)}
    report["identities"] = _identities(place)
    problems = place.problems()
    report["problems"] = [_problem(p) for p in problems]
    if args.output == "table":
        sys.stdout.write(_text(report, [str(p) for p in problems], args.verbose))
    else:
        render.structured(report, args.output)
    return 0 if all(node["inForce"] for node in report["nodes"]) else 1


def _of_run(run: RunObjects, only: str | None) -> list[dict[str, Any]]:
    wanted = set(run.nodes(only))
    states = [item for item in run.all() if isinstance(item, NodeState)]
    return [_node(run, state) for state in states if state.metadata.name in wanted]


def _of_cluster(place: ClusterState, only: str | None) -> list[dict[str, Any]]:
    nodes = place.nodes(only)
    asked = place.ask(nodes, lambda _node: ["status"])
    found = []
    for name in nodes:
        state = place.states[name]
        status = state.status or NodeStateStatus()
        node = _reported(state, status)
        answer = asked.answers.get(name)
        own: dict[str, Any] = {"kernel": asked.failed.get(name, "")}
        if answer is not None and answer["nodes"]:
            own = answer["nodes"][0]
        node |= {key: own[key] for key in ("switches", "memory", "hooks", "kernel") if own.get(key)}
        found.append(node)
    return found


def _identities(place: RunObjects | ClusterState) -> dict[str, int]:
    """Numbers that pods have, and how many more it would take by labels."""
    sets = place.label_sets()
    return {"numbers": len(sets), "saved": sum(sets.values()) - len(sets)}


def _problem(problem: Any) -> dict[str, Any]:
    names = problem.__struct_fields__
    return {name: getattr(problem, name) for name in names if getattr(problem, name)}


def _node(run: RunObjects, state: NodeState) -> dict[str, Any]:
    name = state.metadata.name
    realised = run.realised(name)
    found = _reported(state, realised.status if realised else NodeStateStatus())
    found["switches"] = realised.counters.switches if realised else 0
    try:
        with live.NodeMaps(run.pin_dir(name)) as maps:
            found["memory"] = maps.memory()
            found["hooks"] = _hooks(maps, run.place(name))
    except (CliError, OSError) as error:
        found["kernel"] = str(getattr(error, "strerror", None) or error)
    return found


def _reported(state: NodeState, status: NodeStateStatus) -> dict[str, Any]:
    """What is wanted of a node, and what its loader says of it."""
    desired = digest(state.spec)
    found: dict[str, Any] = {
        "name": state.metadata.name,
        "mode": state.spec.mode,
        "desired": desired,
        "realised": status.realised or "",
        "endpoints": {"desired": len(state.spec.endpoints), "realised": status.endpoints},
        "drift": status.drift,
        **_condition(status.conditions),
    }
    found["inForce"] = found["realised"] == desired and found["ready"] == "True"
    return found


def _condition(said_of_it: list[Condition]) -> dict[str, str]:
    """Ready's status, and the reason of what stands in its way (Stalled first)."""
    if not said_of_it:
        return {"ready": "Unknown", "reason": "NoReport", "message": "the loader has said nothing"}
    conditions = {c.type: c for c in said_of_it}
    ready, stalled = conditions.get("Ready"), conditions.get("Stalled")
    said = stalled if stalled is not None and stalled.status == "True" else ready
    return {
        "ready": ready.status if ready is not None else "Unknown",
        "reason": said.reason if said is not None else "",
        "message": said.message if said is not None else "",
    }


def _hooks(maps: live.NodeMaps, place: NodePlace) -> dict[str, int]:
    """How many hooks hold a program, by kind."""
    pinned = maps.hooks()
    found = {kind: len(names) for kind, names in pinned.items()}
    bare = [
        (endpoint.row.ifindex, way)
        for endpoint in maps.endpoints()
        for way in ("ingress", "egress")
        if f"{endpoint.row.ifindex}-{way}" not in pinned["tcx"]
    ]
    found["clsact"] = 0
    if bare:
        with netns.inside(place.netns) if place.netns else contextlib.nullcontext():
            found["clsact"] = sum(
                clsact.query(index, ingress=way == "ingress") is not None for index, way in bare
            )
    found["missing"] = len(bare) - found["clsact"]
    return found


# ---- text -----------------------------------------------------------------------------

_HEADER = ["NODE", "MODE", "DESIRED", "REALISED", "ENDPOINTS", "DRIFT", "READY", "HOOKS", "MEMORY"]


def _text(report: dict[str, Any], problems: list[str], verbose: bool) -> str:
    nodes = report["nodes"]
    parts = [f"{_operator(report['operator'])}\n"] if "operator" in report else []
    found = report["identities"]
    if found["numbers"]:
        parts.append(f"{render.numbers(found['numbers'], found['numbers'] + found['saved'])}\n")
    parts.append(render.table(_HEADER, map(_cells, nodes)))
    for node in nodes:
        for line in (node["message"] if node["ready"] != "True" else "", node.get("kernel", "")):
            if line:
                parts.append(f"{node['name']}: {line}\n")
    if verbose:
        rows = [
            (node["name"], name, render.size(used))
            for node in nodes
            for name, used in sorted(node.get("memory", {}).items(), key=lambda item: -item[1])
        ]
        parts.append("\n" + render.table(("NODE", "MAP", "MEMORY"), rows))
    if problems:
        shown = [f"  {problem}\n" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"  and {len(problems) - MAX_PROBLEMS} more (-o json has all)\n")
        problem = "problem" if len(problems) == 1 else "problems"
        parts.append(f"\n{len(problems)} {problem} with the input:\n{''.join(shown)}")
    return "".join(parts)


def _operator(found: dict[str, Any]) -> str:
    leader = f", leader {found['leader']}" if found["leader"] else ", no leader"
    return f"operator: {found['ready']} of {found['replicas']} ready{leader}"


def _cells(node: dict[str, Any]) -> tuple[object, ...]:
    hooks = node.get("hooks")
    words = [f"{kind}={count}" for kind, count in hooks.items() if count] if hooks else []
    ready = node["ready"] if node["ready"] == "True" else f"{node['ready']} ({node['reason']})"
    counts = node["endpoints"]
    return (
        node["name"],
        node["mode"],
        node["desired"][:DIGEST_SHOWN],
        node["realised"][:DIGEST_SHOWN] or "-",
        f"{counts['realised']}/{counts['desired']}",
        node["drift"],
        ready,
        " ".join(words) or "-",
        render.size(sum(node["memory"].values())) if "memory" in node else "-",
    )
