"""The sub-commands `up`, `demo`, `down` and `exec`: arguments only.

Each sets `run`, a function from the parsed arguments to an exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidegate_cli import standalone
from tidegate_cli.arguments import (
    add_identities,
    add_load_balancer,
    add_masquerade,
    add_policy_log,
    command,
    node_count,
    number,
)
from tidegate_cli.standalone.errors import StandaloneError
from tidegate_cli.standalone.options import UpOptions

MAX_WAIT = 3600.0


def add_parser(subparsers: Any) -> None:
    up = command(
        subparsers,
        "up",
        "make a cluster on this machine out of a folder of manifests",
        description="Makes nodes and pods out of network namespaces, loads the policy of every "
        "manifest below DIR into the kernel, and follows DIR until it is ended.",
    )
    up.add_argument("dir", metavar="DIR", help="folder of Kubernetes manifests, read recursively")
    up.add_argument(
        "--nodes",
        type=node_count,
        metavar="N",
        help="number of nodes (default: as many as DIR has Node objects, or 2)",
    )
    up.add_argument(
        "--detach", action="store_true", help="return when it is ready, and leave it running"
    )
    up.add_argument(
        "--wait",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="give up, and remove everything, if not all is realised by then (default: 60)",
    )
    up.add_argument("--no-observer", action="store_true", help="without what shows flows")
    add_policy_log(up)
    add_identities(up)
    add_masquerade(up)
    add_load_balancer(up)
    up.set_defaults(run=_reported(_up))

    demo = command(
        subparsers,
        "demo",
        "bring a folder up and show it: identities, matrix, a denial explained",
    )
    demo.add_argument("dir", metavar="DIR", help="folder of Kubernetes manifests")
    demo.set_defaults(run=_reported(_demo))

    down = command(
        subparsers,
        "down",
        "remove the cluster from this machine",
        description="Ends `tidegate up` and removes every process, namespace, cgroup and pin of "
        "it, also after a crash. Harmless when nothing is up.",
    )
    down.set_defaults(run=_reported(_down))

    execute = command(
        subparsers,
        "exec",
        "run a command inside a pod or node",
        description="Runs CMD in the network namespace and cgroup of a pod (NAMESPACE/NAME, or a "
        "NAME or beginning that only one pod has) or of a node (node/NAME).",
    )
    execute.add_argument("pod", metavar="POD", help="namespace/name, name, or node/NAME")
    execute.add_argument("argv", metavar="CMD", nargs=argparse.REMAINDER, help="after `--`")
    execute.set_defaults(run=_reported(_exec))


def _seconds(text: str) -> float:
    return number(text, 1.0, MAX_WAIT, " seconds")


def _reported(action: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`action` with our own errors printed as one line for people."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return action(arguments)
        except StandaloneError as error:
            print(f"tidegate: {error}", file=sys.stderr)
            return 2  # as `main` says

    return run


def _up(arguments: argparse.Namespace) -> int:
    return standalone.up(
        UpOptions(
            folder=Path(arguments.dir),
            run_dir=Path(arguments.run_dir),
            nodes=arguments.nodes,
            detach=arguments.detach,
            observer=not arguments.no_observer,
            policy_log=(
                f"--policy-log-deny={arguments.policy_log_deny}",
                f"--policy-log-allow={arguments.policy_log_allow}",
                *(f"--policy-log-policy={name}" for name in arguments.policy_log_policy),
            ),
            wait=arguments.wait,
            identities=arguments.identities,
            excluded_labels=arguments.excluded_labels,
            masquerade=arguments.non_masquerade_cidrs if arguments.masquerade else None,
            load_balancer=arguments.load_balancer_mode,
            acceleration=arguments.load_balancer_acceleration,
        )
    )


def _demo(arguments: argparse.Namespace) -> int:
    # Imports what every shown command imports: later, as they do.
    from tidegate_cli import demo  # noqa: PLC0415

    return demo.demo(arguments)


def _down(arguments: argparse.Namespace) -> int:
    there_was = standalone.down(arguments.run_dir)
    print(f"removed {there_was}" if there_was else f"nothing is up in {arguments.run_dir}")
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise StandaloneError("exec needs a command: tidegate exec POD -- CMD…")
    standalone.exec_in(arguments.pod, argv, arguments.run_dir)
