"""How far an installation is, and what is wrong with it. Asks, and decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tidegate_api.state import NodeState, digest
from tidegate_kube import resources

from tidegate_cli.cluster.api import Api
from tidegate_cli.cluster.state import (
    DAEMON_SETS,
    DEPLOYMENTS,
    LOADER_SELECTOR,
    OPERATOR_SELECTOR,
    ClusterState,
)
from tidegate_cli.errors import CliError

POLL_SECONDS = 0.5
FINE = ("ContainerCreating", "PodInitializing")
"""Reasons to wait that pass by themselves."""
LOG_LINES = 3


@dataclass(frozen=True)
class Count:
    """`done` of `wanted`."""

    what: str
    done: int
    wanted: int

    @property
    def whole(self) -> bool:
        return 0 < self.wanted == self.done

    def __str__(self) -> str:
        return f"{self.what} {self.done}/{self.wanted}"


def counts(api: Api) -> list[Count]:
    """Operators and loaders that are ready, and nodes that enforce what they should."""
    return [
        _workload(api, "operator", DEPLOYMENTS, OPERATOR_SELECTOR),
        _workload(api, "loaders", DAEMON_SETS, LOADER_SELECTOR),
        _enforcing(api),
    ]


def _workload(api: Api, what: str, resource: Any, selector: str) -> Count:
    done = wanted = 0
    for item in api.items(resource, labelSelector=selector):
        status = item.get("status", {})
        if status.get("observedGeneration", 0) < item["metadata"]["generation"]:
            wanted += 1  # not looked at yet
            continue
        if resource is DEPLOYMENTS:
            wanted += item["spec"].get("replicas", 1)
            done += min(status.get("readyReplicas", 0), status.get("updatedReplicas", 0))
        else:
            wanted += status.get("desiredNumberScheduled", 0)
            done += min(status.get("numberReady", 0), status.get("updatedNumberScheduled", 0))
    return Count(what, done, wanted)


def _enforcing(api: Api) -> Count:
    nodes = {item["metadata"]["name"] for item in api.items(resources.NODES)}
    states = ClusterState(api).states
    done = sum(name in states and enforces(states[name]) for name in nodes)
    return Count("nodes in force", done, len(nodes))


def enforces(state: NodeState) -> bool:
    """Its newest state is in force, and read back from the kernel."""
    status = state.status
    if not status or status.realised != digest(state.spec):
        return False
    return any(c.type == "Ready" and c.status == "True" for c in status.conditions)


def wait(
    seconds: float, look: Callable[[], list[Count]], say: Callable[[str], None]
) -> list[Count]:
    """Until all counts are whole, or the time is over. Each change is said. An API server that
    does not answer for a while is waited for."""
    deadline, said = time.monotonic() + seconds, ""
    while True:
        try:
            found = look()
            text = ", ".join(map(str, found))
        except CliError as error:
            found, text = [], str(error)
        if text != said:
            say(text)
            said = text
        if (found and all(count.whole for count in found)) or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)


# ---- what is wrong ----------------------------------------------------------------------


def troubles(api: Api) -> list[str]:
    """Everything that stands in the way, for people; "" is nothing."""
    found: list[str] = []
    for selector in (OPERATOR_SELECTOR, LOADER_SELECTOR):
        for pod in api.items(resources.PODS, labelSelector=selector):
            found += _of_pod(api, pod)
    for resource, selector in ((DEPLOYMENTS, OPERATOR_SELECTOR), (DAEMON_SETS, LOADER_SELECTOR)):
        workloads = list(api.items(resource, labelSelector=selector))
        if not workloads:
            found.append(f"there is no {resource.kind} with the label {selector}")
        for item in workloads:
            found += _of_workload(api, item)
    for name, state in sorted(ClusterState(api).states.items()):
        for condition in state.status.conditions if state.status else ():
            bad = (condition.type == "Ready") != (condition.status == "True")
            if condition.type in ("Ready", "Stalled") and bad:
                found.append(f"NodeState {name}: {condition.reason}: {condition.message}")
    return list(dict.fromkeys(found))


def _of_pod(api: Api, pod: Any) -> Iterator[str]:
    meta, status = pod["metadata"], pod.get("status", {})
    where = f"pod {meta['namespace']}/{meta['name']}"
    if pod["spec"].get("nodeName"):
        where += f" on {pod['spec']['nodeName']}"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            yield f"{where}: not scheduled: {condition.get('message', '')}"
    for group in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(group) or ():
            yield from _of_container(api, meta, where, container)


def _of_container(api: Api, meta: Any, where: str, status: Any) -> Iterator[str]:
    state, last = status.get("state", {}), status.get("lastState", {})
    waiting = state.get("waiting")
    ended = state.get("terminated") or last.get("terminated")
    name = status["name"]
    if waiting and waiting.get("reason") not in FINE:
        text = f"{waiting.get('reason', '')}: {waiting.get('message', '')}".rstrip(": ")
        yield f"{where}: container {name}: {text}"
    if ended and ended.get("exitCode") and not status.get("ready"):
        previous = "terminated" not in state
        log = _last_lines(api, meta, name, previous)
        yield f"{where}: container {name} ended with {ended['exitCode']}{log}"


def _last_lines(api: Api, meta: Any, container: str, previous: bool) -> str:
    path = resources.PODS.path(meta["namespace"], meta["name"], "log")
    query = {"container": container, "tailLines": str(LOG_LINES)}
    if previous:
        query["previous"] = "true"
    try:
        text = api.text(path, **query).decode(errors="replace").strip()
    except CliError:
        return ""
    return "".join(f"\n      {line}" for line in text.splitlines())


def _of_workload(api: Api, item: Any) -> Iterator[str]:
    """Pods that cannot even be made are told of in events."""
    meta = item["metadata"]
    namespace = f"/api/v1/namespaces/{meta['namespace']}/events"
    for event in api.each(namespace, fieldSelector=f"involvedObject.uid={meta['uid']}"):
        if event.get("type") == "Warning":
            yield f"{item['kind']} {meta['name']}: {event.get('reason')}: {event.get('message')}"
