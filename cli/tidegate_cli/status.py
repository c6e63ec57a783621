"""`tidegate status`: what each node should enforce, what it does, and what stands in the way.

Puts together objects, the loaders' reports and the kernel; changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tidegate_api.state import NodeState, digest
from tidegate_bpf import clsact, netns
from tidegate_loader.local import Realised

from tidegate_cli import live, render
from tidegate_cli.errors import CliError
from tidegate_cli.objects import NodePlace, RunObjects

DIGEST_SHOWN = 12
MAX_PROBLEMS = 20
"""Shown in a table; -o json has all."""


def status(args: argparse.Namespace) -> int:
    run = RunObjects(args.run_dir)
    wanted = set(run.nodes(args.node))
    states = [item for item in run.all() if isinstance(item, NodeState)]
    nodes = [_node(run, state) for state in states if state.metadata.name in wanted]
    report = {"nodes": nodes, "problems": [_problem(p) for p in run.problems()]}
    if args.output == "table":
        sys.stdout.write(_text(run, report, args.verbose))
    else:
        render.structured(report, args.output)
    return 0 if all(node["inForce"] for node in nodes) else 1


def _problem(problem: Any) -> dict[str, Any]:
    names = problem.__struct_fields__
    return {name: getattr(problem, name) for name in names if getattr(problem, name)}


def _node(run: RunObjects, state: NodeState) -> dict[str, Any]:
    name, desired = state.metadata.name, digest(state.spec)
    realised = run.realised(name)
    found: dict[str, Any] = {
        "name": name,
        "mode": state.spec.mode,
        "desired": desired,
        "realised": (realised.digest or "") if realised else "",
        "endpoints": {
            "desired": len(state.spec.endpoints),
            "realised": len(realised.endpoints) if realised else 0,
        },
        "drift": realised.counters.drift if realised else 0,
        "switches": realised.counters.switches if realised else 0,
        **_condition(realised),
    }
    found["inForce"] = found["realised"] == desired and found["ready"] == "True"
    try:
        with live.NodeMaps(run.pin_dir(name)) as maps:
            found["memory"] = maps.memory()
            found["hooks"] = _hooks(maps, run.place(name))
    except (CliError, OSError) as error:
        found["kernel"] = str(getattr(error, "strerror", None) or error)
    return found


def _condition(realised: Realised | None) -> dict[str, str]:
    """Ready's status, and the reason of what stands in its way (Stalled first)."""
    if realised is None:
        return {"ready": "Unknown", "reason": "NoReport", "message": "the loader has said nothing"}
    conditions = {c.type: c for c in realised.status.conditions}
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
    if bare and place.netns:
        with netns.inside(place.netns):
            found["clsact"] = sum(
                clsact.query(index, ingress=way == "ingress") is not None for index, way in bare
            )
    found["missing"] = len(bare) - found["clsact"]
    return found


# ---- text -----------------------------------------------------------------------------

_HEADER = ["NODE", "MODE", "DESIRED", "REALISED", "ENDPOINTS", "DRIFT", "READY", "HOOKS", "MEMORY"]


def _text(run: RunObjects, report: dict[str, Any], verbose: bool) -> str:
    nodes = report["nodes"]
    parts = [render.table(_HEADER, map(_cells, nodes))]
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
    problems = run.problems()
    if problems:
        shown = [f"  {problem}\n" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"  and {len(problems) - MAX_PROBLEMS} more (-o json has all)\n")
        parts.append(f"\n{len(problems)} problems with the input:\n{''.join(shown)}")
    return "".join(parts)


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
