"""Something that has to be done on nodes themselves: a privileged pod on each, for a moment.

Made like the loader's own `node-setup` container: same image, same mounts, same tolerations. Gone
again afterwards, whatever became of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate_kube import resources

from tidegate_cli.cluster.api import Api
from tidegate_cli.errors import CliError

SETUP = "node-setup"
LABELS = {"app.kubernetes.io/part-of": "tidegate", "app.kubernetes.io/name": "tidegate-errand"}
SELECTOR = "app.kubernetes.io/name=tidegate-errand"
POLL_SECONDS = 0.5
OF_POD = ("hostNetwork", "dnsPolicy", "imagePullSecrets", "tolerations", "priorityClassName")
"""What is taken over from the loader's pod template."""


@dataclass(frozen=True)
class Outcome:
    node: str
    done: bool
    said: str
    """The log, or why there is none."""


def pod(daemon_set: Any, node: str, name: str, command: Sequence[str]) -> Any:
    """The pod for one node. CliError: the DaemonSet has no container to take after."""
    spec = daemon_set["spec"]["template"]["spec"]
    setup = [c for c in spec.get("initContainers") or () if c["name"] == SETUP]
    if not setup:
        raise CliError(f"the loader's DaemonSet has no init container {SETUP}")
    container = {key: value for key, value in setup[0].items() if key not in ("args", "command")}
    mounted = {mount["name"] for mount in container.get("volumeMounts") or ()}
    volumes = [volume for volume in spec.get("volumes") or () if volume["name"] in mounted]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": LABELS},
        "spec": {
            **{key: spec[key] for key in OF_POD if key in spec},
            "nodeName": node,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "containers": [{**container, "name": "errand", "command": list(command)}],
            "volumes": volumes,
        },
    }


def run(
    api: Api, daemon_set: Any, nodes: Sequence[str], command: Sequence[str], seconds: float
) -> list[Outcome]:
    """Run `command` on every node at once, and wait. A node that does not manage it in time is
    an outcome, no error."""
    namespace = daemon_set["metadata"]["namespace"]
    base = resources.PODS.path(namespace)
    stamp = format(int(time.time()), "x")
    names = {node: f"tidegate-errand-{stamp}-{index}" for index, node in enumerate(nodes)}
    try:
        for node, name in names.items():
            api.create(base, pod(daemon_set, node, name, command))
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
