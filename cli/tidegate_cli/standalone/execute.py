"""`tidegate exec`: finds the pod or node by name and enters it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tidegate_cli.standalone import enter
from tidegate_cli.standalone.errors import NotUpError, StandaloneError
from tidegate_cli.standalone.rundir import Pod, RunDir, Supervisor, is_alive

NODE_PREFIX = "node/"
MAX_SUGGESTIONS = 8


def exec_in(name: str, argv: Sequence[str], run_dir: Path) -> NoReturn:
    state = RunDir.at(run_dir).require()
    if not state.ready and not is_alive(state):
        raise NotUpError(f"`tidegate up` in {run_dir} did not finish: run `tidegate down`")
    namespace, cgroup = place_of(state, name)
    try:
        enter.run(namespace, cgroup, argv)
    except OSError as error:
        raise StandaloneError(f"cannot enter {name}: {error}") from error


def place_of(state: Supervisor, name: str) -> tuple[Path, Path]:
    """Network namespace and cgroup. Raises StandaloneError."""
    if name.startswith(NODE_PREFIX):
        for node in state.nodes:
            if node.name == name.removeprefix(NODE_PREFIX):
                return Path(node.netns), Path(node.cgroup, "host")
        nodes = ", ".join(f"{NODE_PREFIX}{node.name}" for node in state.nodes)
        raise StandaloneError(f"no node {name}; there are {nodes}")
    pod = find_pod(state.pods, name)
    return Path(pod.netns), Path(pod.cgroup)


def find_pod(pods: Sequence[Pod], name: str) -> Pod:
    """By "namespace/name" or by a name that one pod has; a prefix will do if one
    pod has it (workloads' pods have generated endings). Raises StandaloneError."""
    exact = [pod for pod in pods if name in (pod.key, pod.name)]
    found = exact or [pod for pod in pods if pod.key.startswith(name) or pod.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise StandaloneError(f"{name} is ambiguous: {_some(found)}")
    raise StandaloneError(f"no pod {name}; there are {_some(pods)}")


def _some(pods: Sequence[Pod]) -> str:
    keys = sorted(pod.key for pod in pods)
    more = f", and {len(keys) - MAX_SUGGESTIONS} more" if len(keys) > MAX_SUGGESTIONS else ""
    return ", ".join(keys[:MAX_SUGGESTIONS]) + more
