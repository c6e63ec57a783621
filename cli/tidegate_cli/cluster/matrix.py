"""The matrix of a cluster: a pod on each node connects from inside the others there.

TCP only: what listens is not ours, and a UDP server need not answer. A connection that the other
end accepts or refuses counts as reached, for then packets went both ways. Decides no verdict.
"""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tidegate_kube import resources

from tidegate_cli import connectivity, prober
from tidegate_cli.cluster import errand
from tidegate_cli.cluster.probe import encode, task_of
from tidegate_cli.cluster.state import DAEMON_SETS, LOADER_SELECTOR, ClusterState
from tidegate_cli.connectivity import Cell, Destination, Rows
from tidegate_cli.errors import CliError
from tidegate_cli.model import Model
from tidegate_cli.prober import Result
from tidegate_cli.standalone.rundir import Pod, Port

POD_SECONDS = 60.0
"""For an errand's pod to start and end, beside the probes' own time."""
REFUSED = os.strerror(errno.ECONNREFUSED)
MAX_CELLS = 20_000


def of_cluster(
    place: ClusterState,
    namespaces: Sequence[str],
    families: Sequence[int],
    seconds: float,
    node: str | None = None,
) -> list[Cell]:
    """CliError: nothing to ask, or a node cannot be asked from."""
    pods = [pod for pod in running(place) if not namespaces or pod.namespace in namespaces]
    sources = pods if node is None else connectivity.on(pods, place.nodes(node))
    model = Model.from_objects(place.all())
    services = {
        name: ports
        for name, ports in model.services.items()
        if not namespaces or name.partition("/")[0] in namespaces
    }
    columns = [
        column
        for family in families
        for column in connectivity.destinations(pods, services, family)
        if column.protocol == "TCP"
    ]
    if not sources or not columns:
        remedy = "leave --namespace and --node away"
        raise CliError("there is no pod, or no TCP port, to ask", remedy)
    if len(sources) * len(columns) > MAX_CELLS:
        what = (
            f"{len(sources)} pods by {len(columns)} ports are more than {MAX_CELLS:,} connections"
        )
        raise CliError(what, "give --namespace, or --node")
    judge, ask = connectivity.judge_by(model, pods, {}), _Errands(place)
    return connectivity.measure(sources, columns, judge, seconds, ask)


def running(place: ClusterState) -> list[Pod]:
    """Pods in the pod network, as the API tells of them. Those of the host's are no subjects."""
    found = []
    for item in place.api.items(resources.PODS):
        spec, status = item["spec"], item.get("status", {})
        addresses = [entry["ip"] for entry in status.get("podIPs") or ()]
        if spec.get("hostNetwork") or status.get("phase") != "Running" or not addresses:
            continue
        if "deletionTimestamp" not in item["metadata"]:
            found.append(_pod(item, addresses))
    return found


def _pod(item: Any, addresses: list[str]) -> Pod:
    meta, spec = item["metadata"], item["spec"]
    ports = [
        Port(port=p["containerPort"], protocol=p.get("protocol", "TCP"))
        for container in spec["containers"]
        for p in container.get("ports") or ()
    ]
    return Pod(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        node=spec["nodeName"],
        addresses=addresses,
        ports=ports,
        host_network=False,
        command="what the image says",  # not our responder: a handshake will do
        netns="",
        cgroup="",
        ifname="",
    )


class _Errands:
    """Asks each node's share of the rows there."""

    def __init__(self, place: ClusterState) -> None:
        found = list(place.api.items(DAEMON_SETS, labelSelector=LOADER_SELECTOR))
        if not found:
            raise CliError("the loader's DaemonSet is not there", "run `tidegate install`")
        self._api = place.api
        self._daemon_set = found[0]

    def __call__(self, rows: Rows, seconds: float) -> list[list[Result]]:
        by_node: dict[str, list[tuple[Pod, Sequence[Destination]]]] = defaultdict(list)
        for row in rows:
            if row[1]:
                by_node[row[0].node].append(row)
        commands = {
            node: ["tidegate", "probe", encode(task_of(part, seconds))]
            for node, part in by_node.items()
        }
        most = max((len(columns) for _, columns in rows), default=0)
        limit = connectivity.bound(most, seconds) + POD_SECONDS
        answers: dict[str, list[list[str]]] = {}
        for outcome in errand.run(self._api, self._daemon_set, commands, limit):
            if not outcome.done:
                raise CliError(f"cannot ask from the pods of {outcome.node}: {outcome.said}")
            answers |= json.loads(outcome.said)
        return [
            [_result(c, *answer) for c, answer in zip(columns, answers[pod.uid], strict=True)]
            if columns
            else []
            for pod, columns in rows
        ]


def _result(column: Destination, pod: str, detail: str) -> Result:
    # Refused by the pod, which is there; without a backend nobody is.
    if detail == REFUSED and column.backends:
        return Result(pod, prober.CONNECTED)
    return Result(pod, detail)
