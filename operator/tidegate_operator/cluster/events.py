"""Kubernetes events: on a change for the worse or the better, on the object concerned."""

from __future__ import annotations

import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog
from tidegate_api.state import PolicyStatusStatus
from tidegate_kube import Client, KubeError, resources

from tidegate_operator.cluster.kinds import NodeFacts, ServiceFacts
from tidegate_operator.objects import PolicyName
from tidegate_operator.problems import Problem

CONTROLLER = "tidegate.dev/operator"
MAX_NOTE = 1024
"""Bytes that the API takes."""
MAX_EVENTS_ONCE = 20
"""Of one kind, in one round: a cluster full of them is no reason for a storm."""

API_VERSIONS = {
    item.kind: item.api_version
    for item in (
        resources.NETWORK_POLICIES,
        resources.CLUSTER_NETWORK_POLICIES,
        resources.TRAFFIC_POLICIES,
    )
}
"""Of the kinds of policies."""

log = structlog.get_logger()


class Events:
    """An event that cannot be posted is logged, and lost: the condition says the same."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._instance = f"{socket.gethostname()}-{os.getpid()}"
        self._services: dict[tuple[str, str], frozenset[str]] | None = None
        self._of_nodes: dict[str, Mapping[str, str]] = {}

    def policy(
        self,
        name: PolicyName,
        uid: str,
        before: PolicyStatusStatus,
        now: PolicyStatusStatus,
        check: Callable[[], float],
    ) -> None:
        """When it stalls, why it does changes, or it goes on."""
        old, new = _stalled(before), _stalled(now)
        if old == new:
            return
        regarding = {
            "apiVersion": API_VERSIONS[name.kind],
            "kind": name.kind,
            "namespace": name.namespace,
            "name": name.name,
            "uid": uid,
        }
        if new is not None:
            self._post(regarding, "Warning", "NotAsWritten", new, check)
        else:
            self._post(
                regarding, "Normal", "AsWritten", "all of it is in force, or about to", check
            )

    def nodes(
        self,
        reason: str,
        why: Mapping[str, str],
        there: Mapping[tuple[str, str], NodeFacts],
        check: Callable[[], float],
    ) -> None:
        """`why`: node → what there is to say of it; once for each reason, while it is so."""
        before = self._of_nodes.get(reason, {})
        fresh = [name for name in sorted(why) if why[name] != before.get(name)]
        self._of_nodes[reason] = why
        for name in fresh[:MAX_EVENTS_ONCE]:
            node = there.get(("", name))
            if node is not None:
                regarding = {"apiVersion": "v1", "kind": "Node", "namespace": "", "name": name,
                             "uid": node.uid}  # fmt: skip
                self._post(regarding, "Warning", reason, why[name], check)

    def services(
        self,
        problems: Sequence[Problem],
        there: Mapping[tuple[str, str], ServiceFacts],
        check: Callable[[], float],
    ) -> None:
        """What of a Service came to be not served. What was so at the start is no news."""
        now: dict[tuple[str, str], set[str]] = {}
        for problem in problems:
            kind, _, name = problem.object.partition(" ")
            key = (name.partition("/")[0], name.partition("/")[2])
            if kind == "Service" and key in there:
                now.setdefault(key, set()).add(f"{problem.field}: {problem.message}")
        before = self._services
        self._services = {key: frozenset(texts) for key, texts in now.items()}
        if before is None:
            return
        fresh = [key for key in now if not now[key] <= before.get(key, frozenset())]
        for key in sorted(fresh)[:MAX_EVENTS_ONCE]:
            regarding = {
                "apiVersion": "v1",
                "kind": "Service",
                "namespace": key[0],
                "name": key[1],
                "uid": str(there[key].written.metadata.uid or ""),
            }
            text = "; ".join(sorted(now[key] - before.get(key, frozenset())))
            self._post(regarding, "Warning", "NotServed", text, check)

    def _post(
        self,
        regarding: dict[str, Any],
        kind: str,
        reason: str,
        note: str,
        check: Callable[[], float],
    ) -> None:
        left = check()
        moment = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        namespace = regarding["namespace"] or "default"
        event = {
            "apiVersion": resources.EVENTS.api_version,
            "kind": "Event",
            "metadata": {
                "name": f"{regarding['name'][:200]}.{uuid.uuid4().hex[:16]}",
                "namespace": namespace,
            },
            "eventTime": moment,
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance[:128],
            "action": "Publish",
            "reason": reason,
            "regarding": regarding,
            "note": note[:MAX_NOTE],
            "type": kind,
        }
        body = msgspec.json.encode(event)
        began = time.monotonic()
        try:
            self._client.create(resources.EVENTS, body, namespace, timeout=min(left, 5.0))
        except KubeError as error:
            log.warning(
                "event not posted",
                error=str(error),
                reason=reason,
                object=f"{regarding['kind']} {namespace}/{regarding['name']}",
                seconds=round(time.monotonic() - began, 1),
            )


def _stalled(status: PolicyStatusStatus) -> str | None:
    for item in status.conditions:
        if item.type == "Stalled" and item.status == "True":
            return item.message
    return None
