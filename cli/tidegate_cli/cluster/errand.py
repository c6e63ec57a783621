"""Something that has to be done on nodes themselves: a privileged pod on each, for a moment.

Of the loader's image, where the loader would run too, with the node's file system at HOST. Gone
again afterwards, whatever became of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidegate_kube import resources

from tidegate_cli.cluster.api import Api
from tidegate_cli.cluster.state import LOADER_CONTAINER
from tidegate_cli.errors import CliError

HOST = "/host"
"""Where the node's file system is."""
LABELS = {"app.kubernetes.io/part-of": "tidegate", "app.kubernetes.io/name": "tidegate-errand"}
SELECTOR = "app.kubernetes.io/name=tidegate-errand"
POLL_SECONDS = 0.5
OF_POD = ("imagePullSecrets", "tolerations", "priorityClassName")
"""What is taken over from the loader's pod template, and of its container:"""
OF_CONTAINER = ("image", "imagePullPolicy")


@dataclass(frozen=True)
class Outcome:
    node: str
    done: bool
    said: str
    """The log, or why there is none."""


def pod(daemon_set: Any, node: str, name: str, command: Sequence[str]) -> Any:
    """The pod for one node. CliError: the DaemonSet has no container of the loader's name."""
    spec = daemon_set["spec"]["template"]["spec"]
    found = [c for c in spec["containers"] if c["name"] == LOADER_CONTAINER]
    if not found:
        raise CliError(f"the loader's DaemonSet has no container {LOADER_CONTAINER}")
    mount = {"name": "host", "mountPath": HOST, "mountPropagation": "Bidirectional"}
    container = {
        **{key: found[0][key] for key in OF_CONTAINER if key in found[0]},
        "name": "errand",
        "command": list(command),
        "env": [{"name": "NODE_NAME", "value": node}],
        "securityContext": {"privileged": True, "runAsUser": 0, "readOnlyRootFilesystem": True},
        "volumeMounts": [mount],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": LABELS},
        "spec": {
            **{key: spec[key] for key in OF_POD if key in spec},
            "nodeName": node,
            "hostNetwork": True,
            "hostPID": True,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "containers": [container],
            "volumes": [{"name": "host", "hostPath": {"path": "/", "type": "Directory"}}],
        },
    }


def run(
    api: Api, daemon_set: Any, commands: Mapping[str, Sequence[str]], seconds: float
) -> list[Outcome]:
    """Run each node's command there, all at once, and wait. A node that does not manage it in
    time is an outcome, no error."""
    namespace = daemon_set["metadata"]["namespace"]
    base = resources.PODS.path(namespace)
    stamp = format(int(time.time()), "x")
    names = {node: f"tidegate-errand-{stamp}-{index}" for index, node in enumerate(commands)}
    try:
        for node, name in names.items():
            api.create(base, pod(daemon_set, node, name, commands[node]))
        return _await(api, namespace, names, time.monotonic() + seconds)
    finally:
        for name in names.values():
            api.delete(f"{base}/{name}")


def _await(api: Api, namespace: str, names: dict[str, str], deadline: float) -> list[Outcome]:
    found: dict[str, Outcome] = {}
    while len(found) < len(names):
        late = time.monotonic() >= deadline
        held = {
            item["metadata"]["name"]: item
            for item in api.items(resources.PODS, namespace, labelSelector=SELECTOR)
        }
        for node, name in names.items():
            if node not in found:
                outcome = _outcome(api, namespace, node, held.get(name), late)
                if outcome is not None:
                    found[node] = outcome
        if len(found) < len(names):
            time.sleep(POLL_SECONDS)
    return [found[node] for node in names]


def _outcome(api: Api, namespace: str, node: str, item: Any, late: bool) -> Outcome | None:
    if item is None:
        return Outcome(node, False, "its pod was deleted by somebody")
    phase = item.get("status", {}).get("phase", "")
    if phase in ("Succeeded", "Failed"):
        path = resources.PODS.path(namespace, item["metadata"]["name"], "log")
        try:
            said = api.text(path).decode(errors="replace").strip()
        except CliError as error:
            said = str(error)
        return Outcome(node, phase == "Succeeded", said)
    if not late:
        return None
    waiting = [
        f"{c['state']['waiting'].get('reason')}: {c['state']['waiting'].get('message', '')}"
        for c in item.get("status", {}).get("containerStatuses") or ()
        if "waiting" in c.get("state", {})
    ]
    return Outcome(node, False, "; ".join(waiting) or f"its pod is still {phase or 'not started'}")
