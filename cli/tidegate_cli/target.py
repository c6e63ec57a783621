"""What a command talks to: a run directory, this node's loader, or a cluster.

Explicit flags win. Without any: what is up on this machine, else this node's loader (inside its
pod), else the kubeconfig's cluster; `kubectl tidegate` means the cluster first. Decides that only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tidegate_cli.cluster import kubeconfig
from tidegate_cli.errors import CliError
from tidegate_cli.objects import RunObjects

if TYPE_CHECKING:
    from tidegate_cli.cluster.state import ClusterState

Place: TypeAlias = "RunObjects | ClusterState"

LOCAL_RUN_DIR = Path("/var/lib/tidegate")
LOCAL_PIN_DIR = Path("/sys/fs/bpf/tidegate")
"""Where a node's loader has its state and its pins."""


def choose(args: argparse.Namespace) -> Place:
    """CliError: flags contradict each other, or there is nothing to talk to."""
    cluster = args.kubeconfig is not None or args.context is not None
    if sum((args.run_dir_given, cluster, args.local)) > 1:
        flags = "--run-dir, --local, and --kubeconfig or --context"
        raise CliError(f"{flags} are three places to ask", "give one of them")
    if cluster:
        return _cluster(args)
    if args.local:
        return local()
    if args.run_dir_given:
        return RunObjects(args.run_dir)
    return _implicit(args)


def local() -> RunObjects:
    """This node, as its loader sees it."""
    if not (LOCAL_RUN_DIR / "nodes").is_dir():
        raise CliError(
            f"no loader has its state in {LOCAL_RUN_DIR}",
            "--local is for inside the loader's pod, or on its node",
        )
    _go_first()
    return RunObjects(LOCAL_RUN_DIR, LOCAL_PIN_DIR)


def _go_first() -> None:
    """Where memory runs out, this process ends and not the loader, whose limit it shares."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _implicit(args: argparse.Namespace) -> Place:
    up = (Path(args.run_dir) / "objects").is_dir()
    if as_plugin():
        return _cluster(args)
    if up:
        if kubeconfig.present():
            _say(f"asking what is up in {args.run_dir}; --context NAME asks a cluster")
        return RunObjects(args.run_dir)
    if (LOCAL_RUN_DIR / "nodes").is_dir() and LOCAL_PIN_DIR.is_dir():
        return local()
    if not kubeconfig.present() and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise CliError(
            f"nothing is up in {args.run_dir}, and there is no kubeconfig",
            "run `tidegate up DIR` first, or give --kubeconfig",
        )
    return _cluster(args)


def as_plugin() -> bool:
    """Started as `kubectl tidegate`."""
    return os.path.basename(sys.argv[0]) == "kubectl-tidegate"


def _cluster(args: argparse.Namespace) -> ClusterState:
    # Slow to import, and not needed for what is on this machine.
    from tidegate_cli.cluster.api import connect  # noqa: PLC0415
    from tidegate_cli.cluster.state import ClusterState  # noqa: PLC0415

    api = connect(args.kubeconfig, args.context)
    if args.kubeconfig is None and args.context is None:
        _say(f"asking cluster {api.name} ({api.server})")
    return ClusterState(api)


def _say(text: str) -> None:
    print(f"tidegate: {text}", file=sys.stderr)
