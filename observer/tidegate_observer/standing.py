"""What is in force on a node, as figures by the names that dashboards for Cilium's agents ask for.

Of agent events and what they are made of; flows are `metrics`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import Metric
from tidegate_api.state import FIRST_IDENTITY

from tidegate_observer.agent import AgentEvent, policies
from tidegate_observer.api import flow_pb2
from tidegate_observer.figures import counter, gauge
from tidegate_observer.flow import Policy
from tidegate_observer.rundir import RunDirSource

ENFORCEMENTS = ("none", "ingress", "egress", "both")
CHANGES = {
    flow_pb2.POLICY_UPDATED: "policy",
    flow_pb2.POLICY_DELETED: "policy",
    flow_pb2.ENDPOINT_CREATED: "endpoint",
    flow_pb2.ENDPOINT_REGENERATE_SUCCESS: "endpoint",
    flow_pb2.IPCACHE_UPSERTED: "upsert",
    flow_pb2.IPCACHE_DELETED: "delete",
    flow_pb2.SERVICE_UPSERTED: "update",
    flow_pb2.SERVICE_DELETED: "remove",
}
"""Agent event → what of it is counted."""


class Standing(NamedTuple):
    """Of all nodes of one process."""

    enforcement: Counter[str]
    """Endpoints by the directions in which policies select them."""
    policies: int
    identities: Counter[str]


def look(sources: Iterable[RunDirSource]) -> Standing:
    enforced: Counter[str] = Counter()
    found: set[Policy] = set()
    numbers: dict[int, str] = {}
    for source in sources:
        enforced.update(source.enforcement())
        found.update(policies(source.directory))
        numbers |= {
            number: "cluster_local" if end.namespace else "cidr"
            for number, end in source.directory.identities.items()
            if number >= FIRST_IDENTITY
        }
    return Standing(enforced, len(found), Counter(numbers.values()))


class Changes:
    """Counts what changed."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.standing = Standing(Counter(), 0, Counter())
        """As it was looked at last; set from outside."""

    def add(self, events: Iterable[AgentEvent]) -> None:
        self._counts.update(
            CHANGES[event.message.type] for event in events if event.message.type in CHANGES
        )

    def collect(self) -> Iterator[Metric]:
        now, count = self.standing, self._counts
        total = sum(now.enforcement.values())
        yield gauge("cilium_endpoint", "pods of the node", {(): total})
        ready = {("ready",): total}
        yield gauge("cilium_endpoint_state", "pods by state", ready, "endpoint_state")
        name = "cilium_policy_endpoint_enforcement_status"
        rows = {(word,): now.enforcement[word] for word in ENFORCEMENTS}
        yield gauge(name, "pods by the directions that policies select", rows, "enforcement")
        yield gauge("cilium_policy", "policies in force", {(): now.policies})
        yield gauge("cilium_policy_max_revision", "of what is in force", {(): count["policy"]})
        done = {("success",): count["policy"]}
        yield counter("cilium_policy_change", "policies that changed", ("outcome",), done)
        done = {("success",): count["endpoint"]}
        name = "cilium_endpoint_regenerations"
        yield counter(name, "pods that came or changed identity", ("outcome",), done)
        kinds = {(word,): now.identities[word] for word in ("cluster_local", "cidr")}
        yield gauge("cilium_identity", "identities", kinds, "type")
        rows = {(word,): count[word] for word in ("upsert", "delete")}
        yield counter("cilium_ipcache_events", "addresses", ("type",), rows)
        rows = {("update",): count["update"], ("delete",): count["remove"]}
        yield counter("cilium_services_events", "frontends", ("action",), rows)
