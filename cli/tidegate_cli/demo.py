"""`tidegate demo`: brings a folder up and shows what a newcomer wants to see.

Runs the very commands it prints; shows nothing that they do not.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from tidegate_cli import main
from tidegate_cli.model import Model
from tidegate_cli.objects import RunObjects
from tidegate_cli.standalone.rundir import RunDir, Supervisor, is_alive


def demo(args: argparse.Namespace) -> int:
    """Exit code of the first command that failed, else 0. A folder that is up is shown again."""
    run_dir = ["--run-dir", str(args.run_dir)]
    first = ["up", args.dir, "--detach"]
    if _is_up(Path(args.run_dir), Path(args.dir)):
        first = ["endpoint", "list"]
        print(f"{args.dir} is up already")
    for words in (first, ["identity", "list"], ["matrix"]):
        code = _show(words, run_dir)
        if code:
            return code
    denied = _a_denial(Path(args.run_dir))
    if denied:
        _show(["explain", *denied], run_dir)
    print(_next(Path(args.dir), denied))
    return 0


def _is_up(run_dir: Path, folder: Path) -> bool:
    state = RunDir.at(run_dir).read()
    if state is None or not is_alive(state) or not state.ready:
        return False
    return state.folder == str(folder.resolve())


def _show(words: list[str], run_dir: list[str]) -> int:
    print(f"\n\033[1m$ tidegate {shlex.join(words)}\033[0m", flush=True)
    return main.main([*run_dir, *words])


def _a_denial(run_dir: Path) -> list[str]:
    """Arguments of `explain` for the first connection that a policy of its destination
    denies: it says more than a source that may not speak at all."""
    cluster: Supervisor = RunDir.at(run_dir).require()
    model = Model.from_objects(RunObjects(run_dir).all())
    for source in cluster.pods:
        for target in cluster.pods:
            for port in target.ports:
                if source is target or port.protocol != "TCP" or not target.addresses:
                    continue
                names = f"{source.namespace}/{source.name}", f"{target.namespace}/{target.name}"
                expected = model.expected(*names, port.port, port.protocol)
                if any(a.verdict.ingress.allowed is False for a in expected.answers):
                    return ["--from", names[0], "--to", names[1], "--port", str(port.port)]
    return []


def _next(folder: Path, denied: list[str]) -> str:
    lines = [
        "",
        "What to try next:",
        f"  edit a policy in {folder} and save it: the kernel follows at once",
        "  tidegate matrix              try every connection again",
        "  tidegate status -v           what each node enforces, and its memory",
        "  tidegate policy get          the rules in the kernel, each with its policy",
        "  tidegate observe -f          every flow, and the policy that decided",
        "  tidegate metrics list        what was dropped, and why",
    ]
    if denied:
        lines.append(f"  tidegate exec {denied[1]} -- bash   a shell inside a pod")
    return "\n".join([*lines, "  make demo-down               remove it all"])
