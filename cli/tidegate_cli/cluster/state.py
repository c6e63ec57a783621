"""A cluster's objects, and its nodes' kernels by way of the loaders' pods."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET
from tidegate_api.state import Identity, NodeState, PolicyStatus, RuleSet, StateObject, StateSlice
from tidegate_kube import resources
from tidegate_kube.resources import Resource

from tidegate_cli.answer import Answers, Question, Told
from tidegate_cli.cluster.api import Api
from tidegate_cli.errors import CliError
from tidegate_cli.objects import OwnPod

LOADER_SELECTOR = "app.kubernetes.io/name=tidegate-loader"
OPERATOR_SELECTOR = "app.kubernetes.io/name=tidegate-operator"
LOADER_CONTAINER = "loader"
OBSERVER_CONTAINER = "observer"
LEASE = "tidegate-operator"
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment", True)
DAEMON_SETS = Resource("apps", "v1", "daemonsets", "DaemonSet", True)
AT_ONCE = 16
"""Nodes that are asked at the same time."""

KINDS: dict[Resource, type[Identity] | type[RuleSet] | type[StateSlice] | type[NodeState]] = {
    resources.IDENTITIES: Identity,
    resources.RULE_SETS: RuleSet,
    resources.STATE_SLICES: StateSlice,
    resources.NODE_STATES: NodeState,
}

T = TypeVar("T")


class Stalled(msgspec.Struct, frozen=True):
    """A policy that is not in force as it is written."""

    severity: str
    message: str
    object: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.object}: {self.message}"


@dataclass(frozen=True)
class LoaderPod:
    namespace: str
    name: str
    node: str
    running: bool
    image: str
    observer: str = ""
    """Of the observer in it: "running", what it is instead, or "" where there is none."""


@dataclass
class Asked:
    """What the nodes said; `failed` has the others, each with why."""

    answers: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class ClusterState:
    """One cluster. Objects are read once, when first asked for. Raises CliError."""

    def __init__(self, api: Api) -> None:
        self.api = api

    # ---- objects ----------------------------------------------------------------------

    @cached_property
    def objects(self) -> list[StateObject]:
        """Every object of the desired state, by kind and name. CliError: not installed."""
        found: list[StateObject] = []
        for resource, kind in KINDS.items():
            found += self._decoded(resource, kind)
        return found

    def all(self) -> list[StateObject]:
        return self.objects

    @cached_property
    def states(self) -> dict[str, NodeState]:
        """By node; only NodeStates are read."""
        if "objects" in self.__dict__:
            found = [item for item in self.objects if isinstance(item, NodeState)]
        else:
            found = self._decoded(resources.NODE_STATES, NodeState)
        return {item.metadata.name: item for item in found}

    def nodes(self, only: str | None = None) -> list[str]:
        """Names of the nodes that have a NodeState, sorted. CliError: `only` is none of them."""
        found = sorted(self.states)
        if only is None:
            return found
        if only not in found:
            raise CliError(f"no node {only!r}", f"--node takes one of: {', '.join(found) or '-'}")
        return [only]

    def pods(self) -> list[OwnPod]:
        """With the labels that they have in the API."""
        return [_own_pod(item) for item in self.items(resources.PODS)]

    def label_sets(self) -> dict[int, int]:
        """Number → how many numbers its pods would have by labels, as the operator says it."""
        return {
            int(item.metadata.name): item.status.label_sets
            for item in self.all()
            if isinstance(item, Identity)
            and item.metadata.name.isdigit()
            and item.status is not UNSET
            and item.status.label_sets
        }

    def problems(self) -> list[Stalled]:
        """Policies that are not in force as written."""
        found: list[Stalled] = []
        for item in self._decoded(resources.POLICY_STATUSES, PolicyStatus):
            name = f"{item.policy.kind} {item.metadata.namespace}/{item.policy.name}"
            conditions = item.status.conditions if item.status else []
            found += [
                Stalled("error", c.message, name)
                for c in conditions
                if c.type == "Stalled" and c.status == "True"
            ]
        return found

    def _decoded(self, resource: Resource, kind: type[T]) -> list[T]:
        found = []
        for item in self.items(resource):
            try:
                found.append(msgspec.convert(item, kind))
            except msgspec.ValidationError as error:
                name = f"{resource.kind} {item['metadata']['name']}"
                text = f"tidegate: {name} is left out, it is of another version: {error}"
                print(text, file=sys.stderr)
        return found

    def items(self, resource: Resource) -> list[Any]:
        """Sorted by namespace and name. CliError: the kind is not there."""
        try:
            found = list(self.api.items(resource))
        except CliError as error:
            if getattr(error, "code", 0) != 404:
                raise
            what = f"Tidegate is not installed in {self.api.name} ({resource.kind} is unknown)"
            raise CliError(what, "`tidegate install`, or name another --context") from error
        return sorted(
            found, key=lambda i: (i["metadata"].get("namespace", ""), i["metadata"]["name"])
        )

    def operator(self) -> dict[str, Any]:
        """Its replicas, how many are ready, and who leads: "" for nobody."""
        found = {"replicas": 0, "ready": 0, "leader": ""}
        for item in self.api.items(DEPLOYMENTS, labelSelector=OPERATOR_SELECTOR):
            found["replicas"] = item["spec"].get("replicas", 1)
            found["ready"] = item.get("status", {}).get("readyReplicas", 0)
            namespace = item["metadata"]["namespace"]
            lease = self.api.find(resources.LEASES.path(namespace, LEASE))
            found["leader"] = ((lease or {}).get("spec") or {}).get("holderIdentity") or ""
        return found

    # ---- the nodes' kernels ---------------------------------------------------------------

    @cached_property
    def loaders(self) -> dict[str, LoaderPod]:
        """The loader's pod of each node; one that runs before one that does not."""
        found: dict[str, LoaderPod] = {}
        for pod in self.loader_pods():
            if pod.node not in found or pod.running:
                found[pod.node] = pod
        return found

    def loader_pods(self) -> list[LoaderPod]:
        """The loader's pods as they are now."""
        items = self.api.items(resources.PODS, labelSelector=LOADER_SELECTOR)
        return [pod for pod in map(_loader_pod, items) if pod.node]

    def ask(self, nodes: Iterable[str], words: Callable[[str], Sequence[str]]) -> Asked:
        """Run `tidegate --local -o json WORDS` on each node, all at once, and read the JSON that
        it prints. `words`: of a node."""
        asked, names = Asked(), list(nodes)
        self.loaders  # noqa: B018 - read once, before there are threads
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for node, answer in zip(
                names, pool.map(lambda n: self._one(n, words(n)), names), strict=True
            ):
                if isinstance(answer, CliError):
                    asked.failed[node] = str(answer)
                else:
                    asked.answers[node] = answer
        return asked

    def asker(self) -> Asker:
        return Asker(self)

    def _one(self, node: str, words: Sequence[str]) -> Any:
        try:
            return self.run(node, ["-o", "json", *words])
        except CliError as error:
            return error

    def run(self, node: str, words: Sequence[str]) -> Any:
        """One node's answer. CliError: its loader does not run, or the command failed there."""
        pod = self.loaders.get(node)
        if pod is None or not pod.running:
            what = "is not running" if pod else "there is none"
            raise CliError(f"the loader of {node} cannot be asked: {what}", "`kubectl get pods -A`")
        command = ["tidegate", "--local", *words]
        ran = self.api.execute(pod.namespace, pod.name, LOADER_CONTAINER, command)
        try:
            return json.loads(ran.out)
        except ValueError:
            said = (ran.err or ran.out).strip().removeprefix("tidegate: ")
            raise CliError(f"{node}: {said or f'exit code {ran.code}'}") from None


class Asker:
    """Puts `explain`'s questions to nodes: to each all of its own, and to all at once."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._digests: dict[str, str] = {}

    def ask(self, wanted: Sequence[tuple[str, Question]]) -> list[Told]:
        """The answers of (node, question), in their order. CliError: a node cannot be asked."""
        nodes = list(dict.fromkeys(node for node, _ in wanted))
        own = {node: [q for n, q in wanted if n == node] for node in nodes}
        texts = {node: msgspec.json.encode(questions).decode() for node, questions in own.items()}
        asked = self._state.ask(nodes, lambda node: ["answer", texts[node]])
        for text in asked.failed.values():
            raise CliError(text)
        told = {}
        for node, data in asked.answers.items():
            answers = msgspec.convert(data, Answers)
            self._digests[node] = answers.digest
            told[node] = iter(answers.told)
        return [next(told[node]) for node, _ in wanted]

    def digests(self) -> dict[str, str]:
        """Of each node asked so far: the state that it has in force."""
        return self._digests


def _own_pod(item: Any) -> OwnPod:
    meta, status = item["metadata"], item.get("status") or {}
    return OwnPod(
        namespace=meta["namespace"],
        name=meta["name"],
        labels=meta.get("labels") or {},
        addresses=[one["ip"] for one in status.get("podIPs") or ()],
        host_network=bool(item["spec"].get("hostNetwork")),
    )


def _loader_pod(item: Any) -> LoaderPod:
    containers = item.get("status", {}).get("containerStatuses") or ()
    states = {c["name"]: next(iter(c.get("state") or {"unknown": None})) for c in containers}
    wanted = {c["name"]: c for c in item["spec"]["containers"]}
    ends = "deletionTimestamp" in item["metadata"]
    observes = OBSERVER_CONTAINER in wanted
    return LoaderPod(
        namespace=item["metadata"]["namespace"],
        name=item["metadata"]["name"],
        node=item["spec"].get("nodeName", ""),
        running=states.get(LOADER_CONTAINER) == "running" and not ends,
        image=wanted[LOADER_CONTAINER]["image"] if LOADER_CONTAINER in wanted else "",
        observer=states.get(OBSERVER_CONTAINER, "unknown") if observes and not ends else "",
    )
