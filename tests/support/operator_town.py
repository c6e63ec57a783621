"""An operator in this process, on a real API server, and hands that change its objects."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from support import apiserver as servers
from support import town_api
from support.apiserver import ApiServer
from support.town_api import apply, node, objects, pod
from support.waiting import until
from tidegate_api.state import NodeState, StateSlice
from tidegate_kube import Client, NotFound, resources
from tidegate_operator.cluster.kinds import Held
from tidegate_operator.cluster.lead import Lead
from tidegate_operator.cluster.metrics import Metrics
from tidegate_operator.cluster.reports import Reports
from tidegate_operator.cluster.runner import Runner
from tidegate_operator.cluster.statuses import Statuses
from tidegate_operator.cluster.watches import Watches
from tidegate_operator.leader import NotLeader

SECONDS = 30.0


class Leading:
    """A lead that the test gives and takes."""

    def __init__(self) -> None:
        self.given: int | None = 1
        self.alive = True

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def check(self) -> float:
        if self.given is None:
            raise NotLeader("taken by the test")
        return 10.0

    @property
    def term(self) -> int:
        if self.given is None:
            raise NotLeader("taken by the test")
        return self.given


class Clock:
    """The operator's, for how long it has not heard of nodes; the test may put it forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def wall(self) -> float:
        return time.time() + self.ahead


class Town:
    def __init__(self, client: Client) -> None:
        self.client = client
        self.clock = Clock()
        self.lead = Leading()
        self.verify_every = 0.0
        self._make()

    def _make(self) -> None:
        self.metrics = Metrics()
        self.watches = Watches(self.client)
        lead: Lead = self.lead
        self.reports = reports = Reports(self.clock.monotonic, self.clock.wall)
        self.statuses = Statuses(
            self.client, self.watches, lead, self.metrics, taint=False, reports=reports
        )
        self.runner = Runner(
            self.client,
            self.watches,
            lead,
            self.metrics,
            self.statuses.published,
            verify_every=self.verify_every,
            reports=reports,
        )
        self.watches.changed = lambda: (self.runner.poke(), self.statuses.poke())  # type: ignore[func-returns-value]

    def start(self) -> None:
        self.statuses.start()
        self.runner.start()

    def stop(self) -> None:
        self.statuses.stop()
        self.runner.stop()

    def restart(self) -> None:
        """Another operator, that starts from what the API server holds."""
        self.stop()
        self._make()
        self.start()

    def settled(self) -> None:
        """Until everything that was applied before is published."""
        mark = f"mark-{threading.get_ident()}"
        body = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": mark, "labels": {"at": uuid.uuid4().hex}},
        }
        found = apply(self.client, body)
        at = found["metadata"]["labels"]["at"]

        def done() -> bool:
            published = self.runner.published
            return (
                published is not None
                and published.world.namespaces.get(mark, {}).get("at") == at
                and not self.runner.error
            )

        until(done, "settled", SECONDS)

    def writes(self) -> dict[tuple[str, str], int]:
        """(kind, verb) -> objects published since the operator started; no statuses."""
        return {
            (sample.labels["kind"], sample.labels["verb"]): int(sample.value)
            for metric in self.metrics.objects_written.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
            and sample.labels["verb"] != "status"
            and sample.labels["kind"] not in ("PolicyStatus", "ClusterPolicyStatus", "Node")
        }

    def writes_since(self, before: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        found = {key: count - before.get(key, 0) for key, count in self.writes().items()}
        return {key: count for key, count in found.items() if count}

    def realise(
        self,
        name: str,
        digest: str | None = None,
        formats: tuple[int, ...] = (1,),
        **more: Any,
    ) -> None:
        """As a loader does: the node says that its state, or another, is in force, and what
        formats it reads. `more`: other fields of the status."""
        tree = json.loads(self.client.get(resources.NODE_STATES, name))
        said = digest or tree["metadata"]["annotations"]["tidegate.dev/digest"]
        status = {"realised": said, "endpoints": 0, "drift": 0, "formats": list(formats)}
        tree["status"] = status | more
        body = msgspec.json.encode(tree)
        self.client.update(resources.NODE_STATES, name, body, subresource="status")

    def report(self, name: str, digest: str | None = None) -> None:
        """The same by the town's clock, as a loader does that says when it reports; until the
        operator has taken it in, or moving the clock would move when it came."""
        moment = datetime.datetime.fromtimestamp(self.clock.wall(), datetime.UTC).isoformat()
        self.realise(name, digest, lastReportTime=moment)

        def taken_in() -> bool:
            states = self.watches.node_states.snapshot()
            item = states.get(("", name))
            if not isinstance(item, Held) or item.item.status is UNSET:
                return False
            self.reports.silent(states)
            return item.item.status.last_report_time == moment

        until(taken_in, f"the report of {name}", SECONDS)

    def nodes(self) -> dict[str, NodeState]:
        return objects(self.client, NodeState)

    def ipcache(self) -> dict[str, int]:
        return {
            entry.cidr: entry.identity
            for item in objects(self.client, StateSlice).values()
            for entry in item.spec.ipcache or ()
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An own one: every test leaves objects of all kinds."""
    with servers.running(tmp_path_factory.mktemp("operator")) as made:
        with contextlib.closing(made.client()) as client:
            town_api.install(client)
        yield made


@pytest.fixture
def town(server: ApiServer) -> Iterator[Town]:
    client = server.client()
    clean(client)
    made = Town(client)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        client.close()


def clean(client: Client) -> None:
    kinds = [resources.PODS, resources.NODES, resources.NETWORK_POLICIES, resources.SERVICES]
    kinds += [resources.ENDPOINT_SLICES, resources.POLICY_STATUSES, resources.EVENTS]
    kinds += [resources.TRAFFIC_POLICIES, resources.CLUSTER_POLICY_STATUSES]
    kinds += town_api.OURS.values()
    for resource in kinds:
        for page in client.pages(resource):
            for raw in page.items:
                meta = msgspec.json.decode(raw)["metadata"]
                if meta["name"] == "kubernetes":  # the server's own
                    continue
                with contextlib.suppress(NotFound):
                    town_api.remove(client, resource, meta["name"], meta.get("namespace", ""))


def policy(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


ALLOW = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}]}


def populate(town: Town) -> None:
    for number, name in enumerate(("n1", "n2")):
        apply(town.client, node(name, number))
    apply(town.client, pod("a", "n1", "10.244.0.5", app="a"))
    apply(town.client, pod("b", "n2", "10.244.1.5", app="b"))
    apply(town.client, policy("p", ALLOW))
