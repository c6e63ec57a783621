"""Documents -> World: a small cluster made of what people wrote.

Expands workloads into pods, places them, gives addresses. Deterministic; and stable:
given the previous world, what did not change keeps its node and addresses, whatever
was added or removed beside it. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
import ipaddress
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from tidegate_api import users

from tidegate_operator import allocation, meanings, services
from tidegate_operator.manifests import Document, Key
from tidegate_operator.objects import (
    ContainerPort,
    HostPort,
    Node,
    ObjectName,
    Pod,
    Policy,
    PolicyName,
    UserIdentity,
    World,
)
from tidegate_operator.problems import Problem, Source, at
from tidegate_operator.relevance import DEFAULTS as DEFAULT_IDENTITIES
from tidegate_operator.relevance import Relevance, Settings, relevance

COMMAND_ANNOTATION = "tidegate.dev/command"
HOSTNAME_LABEL = "kubernetes.io/hostname"
DEFAULT_NODES = 2
MAX_NODES = 64
MAX_PODS = 10_000
FIRST_SLOT = 2
"""Slot 0 is the network's own address, 1 the node's inside its pod CIDR."""

_NAMESPACE_UUID = uuid.UUID("6f0f2c1c-5d5b-5a0e-9a9e-74696465676d")


@dataclass(frozen=True)
class Options:
    """How to lay the cluster out. CIDRs IPv4 first; each node takes a /24 and a /64."""

    nodes: int | None = None
    """None: as many as there are Node objects, or DEFAULT_NODES without any."""
    keep_nodes: bool = False
    """The nodes of the first world stay: what runs on them cannot move to others."""
    pod_cidrs: tuple[str, ...] = ("10.244.0.0/16", "fd00:10:244::/56")
    service_cidrs: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    first_node: tuple[str, ...] = ("172.18.0.2", "fc00:f853:ccd:e793::2")
    """Addresses of the first node; the others follow it."""
    identities: Settings = DEFAULT_IDENTITIES
    services: services.Settings = services.DEFAULTS


DEFAULTS = Options()


@dataclass(frozen=True, kw_only=True)
class MadeNode(Node):
    index: int
    """Gives addresses and pod CIDRs, and stays while the node lives."""


@dataclass(frozen=True, kw_only=True)
class MadePod(Pod):
    command: str
    """Annotation tidegate.dev/command; "" = the built-in responder."""
    slot: int
    """Its place in the node's pod CIDRs, 0 for host network."""


@dataclass(frozen=True, kw_only=True)
class MadeWorld(World):
    """A World with what the next one is made from."""

    nodes: dict[str, MadeNode]
    pods: dict[ObjectName, MadePod]
    sliced: frozenset[ObjectName]
    """Services whose endpoints are written as EndpointSlices, not derived."""
    expansions: dict[tuple[str, str, str], tuple[object, object]]
    """(kind, namespace, name) -> what it was made from, what it came to."""
    cursors: dict[str, int]
    """node -> the slot given last; addresses rest until the range has gone round."""


EMPTY_WORLD = MadeWorld(
    nodes={},
    namespaces={},
    pods={},
    services={},
    endpoints={},
    policies={},
    identities={},
    sources={},
    relevance=Relevance(),
    asked=Relevance(),
    pod_cidrs=(),
    sliced=frozenset(),
    expansions={},
    cursors={},
)


@dataclass(frozen=True)
class _Wanted:
    """A pod before it has a place. `node` "" = anywhere."""

    namespace: str
    name: str
    labels: dict[str, str]
    annotations: Mapping[str, str]
    spec: users.PodSpec
    node: str
    workload: Key
    origin: object


def build(
    documents: Iterable[Document],
    options: Options = DEFAULTS,
    previous: MadeWorld | None = None,
    hold: bool = False,
) -> tuple[MadeWorld, tuple[Problem, ...]]:
    """One snapshot of `documents`, whose keys are distinct. Never raises for what they say.
    `hold`: see `meanings.held`."""
    builder = _Builder(options, previous or EMPTY_WORLD, hold)
    return builder.build({document.key: document for document in documents})


def workloads(world: MadeWorld) -> dict[tuple[str, str], tuple[str, str]]:
    """(namespace, pod) → (kind, name) of what made it; pods written as such are not in it."""
    found = {}
    for _, made in world.expansions.values():
        for wanted in cast(Sequence[_Wanted], made):
            if wanted.workload.kind != "Pod":
                made_by = wanted.workload.kind, wanted.workload.name
                found[wanted.namespace, wanted.name] = made_by
    return found


def _short(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:6]


def pod_uid(namespace: str, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE_UUID, f"{namespace}/{name}"))


@dataclass
class _Builder:
    options: Options
    previous: MadeWorld
    hold: bool
    problems: list[Problem] = field(default_factory=list)
    _expansions: dict[tuple[str, str, str], tuple[object, object]] = field(default_factory=dict)
    _sources: dict[Key, Source] = field(default_factory=dict)

    def build(self, documents: Mapping[Key, Document]) -> tuple[MadeWorld, tuple[Problem, ...]]:
        by_kind: dict[str, list[Document]] = {}
        self._sources = {key: document.source for key, document in documents.items()}
        for key in sorted(documents):
            by_kind.setdefault(key.kind, []).append(documents[key])
        nodes = self._nodes(by_kind.get("Node", []))
        namespaces = self._namespaces(documents, by_kind.get("Namespace", []))
        found = self._policies(
            [document for kind in meanings.POLICY_KINDS for document in by_kind.get(kind, [])]
        )
        items = [item.object for item in by_kind.get("Identity", [])]
        made = [item.spec for item in items if isinstance(item, users.Identity)]
        asked = relevance(found.values(), self.options.identities, meanings.named(made))
        relevant = meanings.held(asked, self.previous, self.hold)
        wanted = self._expand(by_kind, sorted(nodes))
        pods, cursors = _Placement(self, nodes, relevant).place(wanted)
        served = allocation.Builder(
            self.options.service_cidrs, self.previous, self.options.services
        )
        served_services, endpoints = served.build(
            by_kind.get("Service", []), by_kind.get("EndpointSlice", []), pods, nodes
        )
        self.problems += served.problems
        world = MadeWorld(
            nodes=nodes,
            namespaces=namespaces,
            pods=pods,
            services=served_services,
            endpoints=endpoints,
            policies=found,
            identities=self._identities(by_kind.get("Identity", []), relevant),
            sources={(*key,): source for key, source in self._sources.items()},
            relevance=relevant,
            asked=asked,
            pod_cidrs=self.options.pod_cidrs,
            sliced=served.sliced,
            expansions=self._expansions,
            cursors=cursors,
        )
        return world, tuple(self.problems)

    # ---- nodes, namespaces, policies, identities ----

    def _node_names(self, documents: Sequence[Document]) -> list[str]:
        if self.options.keep_nodes and self.previous.nodes:
            text = "joins at the next `tidegate up`: nodes stay as they were made"
            new = [item for item in documents if item.key.name not in self.previous.nodes]
            for document in new:
                self.problems.append(at(document.source, "warning", text, object=str(document.key)))
            return [*self.previous.nodes]
        names = [document.key.name for document in documents]
        count = self.options.nodes or len(names) or DEFAULT_NODES
        if count > MAX_NODES:
            text = f"{count} nodes wanted; {MAX_NODES} are made"
            self.problems.append(Problem(severity="error", message=text, remedy="use fewer"))
            count = MAX_NODES
        for document in documents[count:]:
            self.problems.append(
                at(
                    document.source,
                    "warning",
                    f"is not made: only {count} nodes are wanted",
                    object=str(document.key),
                    remedy="raise --nodes or leave it out",
                )
            )
        names = names[:count]
        fillers = (f"node-{number}" for number in range(1, 2 * MAX_NODES + 1))
        return names + [name for name in fillers if name not in names][: count - len(names)]

    def _nodes(self, documents: Sequence[Document]) -> dict[str, MadeNode]:
        names = self._node_names(documents)
        labels = {document.key.name: document.object.metadata.labels for document in documents}
        known = {name: self.previous.nodes[name] for name in names if name in self.previous.nodes}
        taken = {node.index for node in known.values()}
        free = iter(index for index in range(MAX_NODES) if index not in taken)
        found = {}
        for name in sorted(names):
            before = known.get(name)
            index = before.index if before is not None else next(free)
            made = self._node(name, index, labels.get(name, {}))
            found[name] = before if before is not None and before == made else made
        return found

    def _node(self, name: str, index: int, labels: Mapping[str, str]) -> MadeNode:
        """A node has its name as a label, as its kubelet would give it."""
        addresses = tuple(
            str(ipaddress.ip_address(first) + index) for first in self.options.first_node
        )
        cidrs = []
        for text in self.options.pod_cidrs:
            whole = ipaddress.ip_network(text)
            bits = 24 if whole.version == 4 else 64
            base = whole.network_address + (index << (whole.max_prefixlen - bits))
            cidrs.append(f"{base}/{bits}")
        return MadeNode(
            name=name,
            addresses=addresses,
            pod_cidrs=tuple(cidrs),
            index=index,
            zone=labels.get(services.ZONE_LABEL, ""),
            labels={HOSTNAME_LABEL: name, **labels},
            port_addresses=services.port_addresses(addresses, self.options.services),
            masquerade=self.options.services.masquerade,
        )

    def _namespaces(
        self, documents: Mapping[Key, Document], declared: Sequence[Document]
    ) -> dict[str, dict[str, str]]:
        labels: dict[str, dict[str, str]] = {"default": {}}
        for key, document in documents.items():
            if key.namespace:
                labels[key.namespace] = {}
            elif isinstance(document.object, users.Identity) and document.object.spec.namespace:
                labels[document.object.spec.namespace] = {}
        for document in declared:
            labels[document.key.name] = document.object.metadata.labels
        return meanings.namespaces(labels)

    def _policies(self, documents: Sequence[Document]) -> dict[PolicyName, Policy]:
        written = {}
        for document in documents:
            assert isinstance(document.object, meanings.WrittenPolicy)
            written[PolicyName(*document.key)] = document.object
        closed = {
            PolicyName(*document.key): document.closed.rules
            for document in documents
            if document.closed is not None
        }
        return meanings.policies(written, self.previous.policies, closed)

    def _identities(
        self, documents: Sequence[Document], relevant: Relevance
    ) -> dict[str, UserIdentity]:
        written = {}
        for document in documents:
            assert isinstance(document.object, users.Identity)
            written[document.key.name] = document.object.spec
        found, stalled = meanings.user_identities(written, relevant, self.options.pod_cidrs)
        for document in documents:
            if document.key.name in stalled:
                self.problems.append(
                    at(
                        document.source,
                        "error",
                        f"stalled: {stalled[document.key.name]}",
                        object=str(document.key),
                        field="spec.cidrs",
                        remedy="name each outside address once, and no pod's",
                    )
                )
        return found

    # ---- pods ----

    def _expand(
        self, by_kind: Mapping[str, list[Document]], nodes: Sequence[str]
    ) -> dict[ObjectName, _Wanted]:
        """Every pod by name. Pods written as such come first: a generated one gives way."""
        found: dict[ObjectName, _Wanted] = {}
        kinds = ("Pod", "StatefulSet", "DaemonSet", "Deployment", "ReplicaSet", "Job")
        for kind in kinds:
            for document in by_kind.get(kind, []):
                for wanted in self._pods_of(document, nodes):
                    name = ObjectName(wanted.namespace, wanted.name)
                    first = found.setdefault(name, wanted)
                    if first is not wanted:
                        self._report(wanted, f"pod {name} is also made by {first.workload}")
                    elif len(found) > MAX_PODS:
                        del found[name]
                        self._report(wanted, f"more than {MAX_PODS} pods", "use fewer replicas")
                        return found
        return found

    def _pods_of(self, document: Document, nodes: Sequence[str]) -> Sequence[_Wanted]:
        """The document's pods; the very same values while nothing of it has changed."""
        across = tuple(nodes) if document.key.kind == "DaemonSet" else ()
        made_from = (document.object, across)
        held = self.previous.expansions.get(document.key)
        if held is None or held[0] != made_from:
            held = (made_from, tuple(_pods_of(document, nodes)))
        self._expansions[document.key] = held
        return cast(Sequence[_Wanted], held[1])

    def _report(self, pod: _Wanted, message: str, remedy: str = "rename one of the two") -> None:
        self.problems.append(
            at(
                self._sources[pod.workload],
                "error",
                message,
                object=f"Pod {pod.namespace}/{pod.name}",
                remedy=remedy,
            )
        )


def _pods_of(document: Document, nodes: Sequence[str]) -> Iterator[_Wanted]:
    kind, namespace, name = document.key
    written = document.object
    code = _short(kind, namespace, name)

    def one(
        template: users.PodTemplate | users.Pod,
        pod: str,
        own: dict[str, str],
        node: str | None = None,
    ) -> _Wanted:
        return _Wanted(
            namespace=namespace,
            name=pod,
            labels={**template.metadata.labels, **own},
            annotations=template.metadata.annotations,
            spec=template.spec,
            node=template.spec.node_name if node is None else node,
            workload=document.key,
            origin=written,
        )

    match written:
        case users.Pod():
            yield one(written, name, {})
        case users.StatefulSet():
            start = written.spec.ordinals.start
            for ordinal in range(start, start + min(written.spec.replicas, MAX_PODS + 1)):
                own = {
                    "statefulset.kubernetes.io/pod-name": f"{name}-{ordinal}",
                    "apps.kubernetes.io/pod-index": str(ordinal),
                    "controller-revision-hash": code,
                }
                yield one(written.spec.template, f"{name}-{ordinal}", own)
        case users.DaemonSet():
            for node in nodes:
                pod = f"{name}-{_short(kind, namespace, name, node)}"
                yield one(written.spec.template, pod, {"controller-revision-hash": code}, node)
        case users.Deployment() | users.ReplicaSet():
            # The hash names the workload, not the template: an edited template changes
            # its pods in place instead of replacing them.
            for index in range(min(written.spec.replicas, MAX_PODS + 1)):
                own = {"pod-template-hash": code}
                yield one(written.spec.template, f"{name}-{code}-{index}", own)
        case users.Job():
            spec = written.spec
            count = 0 if spec.suspend else min(spec.parallelism, MAX_PODS + 1)
            if spec.completions is not None:
                count = min(count, spec.completions)
            own = {"job-name": name, "batch.kubernetes.io/job-name": name}
            for index in range(count):
                yield one(spec.template, f"{name}-{code}-{index}", own)


def with_labels(world: MadeWorld, pods: Mapping[ObjectName, MadePod]) -> MadeWorld:
    """But for the labels of `pods`, which are as they say; the next build has them as written."""
    if not pods:
        return world
    held = {}
    for name, was in pods.items():
        pod = world.pods[name]
        identity = world.relevance.key(pod.namespace, was.labels, pod.ports)
        held[name] = replace(pod, labels=was.labels, identity=identity, origin=was.origin)
    return replace(world, pods={**world.pods, **held})


class _Placement:
    """Gives every wanted pod a node and addresses."""

    def __init__(self, builder: _Builder, nodes: dict[str, MadeNode], relevant: Relevance) -> None:
        self._builder = builder
        self._nodes = nodes
        self._relevant = relevant
        self._same = relevant == builder.previous.relevance
        self._load = dict.fromkeys(nodes, 0)
        self._pending: dict[tuple[Key, str], tuple[str, list[_Wanted]]] = {}
        """(workload, why) -> remedy and its pods: ten thousand replicas are one problem."""
        self._used: dict[str, set[int]] = {name: set() for name in nodes}
        before = builder.previous.cursors
        self._cursors = {name: before.get(name, FIRST_SLOT - 1) for name in nodes}
        self._networks = {
            name: tuple(map(ipaddress.ip_network, node.pod_cidrs)) for name, node in nodes.items()
        }
        # The last address of an IPv4 network is its broadcast address.
        self._slots = {
            name: min((net.num_addresses for net in networks), default=2) - 1
            for name, networks in self._networks.items()
        }

    def place(
        self, wanted: Mapping[ObjectName, _Wanted]
    ) -> tuple[dict[ObjectName, MadePod], dict[str, int]]:
        names = sorted(wanted)
        places: dict[ObjectName, tuple[str, int]] = {}
        for name in names:  # who stays is settled before anybody new is placed
            pod, before = wanted[name], self._builder.previous.pods.get(name)
            if before is None or before.node not in self._nodes:
                continue
            if pod.node in ("", before.node):
                keeps = before.host_network == pod.spec.host_network
                places[name] = (before.node, before.slot if keeps else -1)
                self._load[before.node] += 1
                if keeps:
                    self._used[before.node].add(before.slot)
        for name in names:
            if name not in places and wanted[name].node in self._nodes:
                places[name] = (wanted[name].node, -1)
                self._load[wanted[name].node] += 1
        pods: dict[ObjectName, MadePod] = {}
        for name in names:
            made = self._make(name, wanted[name], places.get(name))
            if made is not None:
                pods[name] = made
        for (_, why), (remedy, pending) in self._pending.items():
            others = f", as {len(pending) - 1} more of it do" if len(pending) > 1 else ""
            self._builder._report(pending[0], f"stays pending{others}: {why}", remedy)
        return pods, self._cursors

    def _pend(self, pod: _Wanted, why: str, remedy: str) -> None:
        self._pending.setdefault((pod.workload, why), (remedy, []))[1].append(pod)

    def _make(
        self, name: ObjectName, pod: _Wanted, place: tuple[str, int] | None
    ) -> MadePod | None:
        if place is None:
            if pod.node:
                known = ", ".join(sorted(self._nodes))
                self._pend(
                    pod,
                    f"there is no node {pod.node}",
                    f"use one of {known}, add a Node of that name, or remove nodeName",
                )
                return None
            node = min(self._load, key=lambda name: (self._load[name], name))
            self._load[node] += 1
            place = (node, -1)
        node, slot = place
        if slot < 0:
            slot = 0 if pod.spec.host_network else self._next_slot(node)
            if slot < 0:
                text = f"node {node} has no free address"
                self._pend(pod, text, "use more nodes or fewer pods")
                return None
        before = self._builder.previous.pods.get(name)
        if (
            before is not None
            and before.origin is pod.origin
            and (before.node, before.slot) == (node, slot)
            and self._same
        ):
            return before
        made = self._pod(pod, node, slot)
        return before if before is not None and before == made else made

    def _next_slot(self, node: str) -> int:
        used, last = self._used[node], self._cursors[node]
        span = self._slots[node] - FIRST_SLOT
        # Once for each pod that waits; 0 is what pods in the host's network have.
        if len(used) - (0 in used) >= span:
            return -1
        for step in range(span):
            slot = FIRST_SLOT + (last - FIRST_SLOT + 1 + step) % span
            if slot not in used:
                used.add(slot)
                self._cursors[node] = slot
                return slot
        return -1

    def _pod(self, pod: _Wanted, node: str, slot: int) -> MadePod:
        if pod.spec.host_network:
            addresses = self._nodes[node].addresses
        else:
            addresses = tuple(str(net.network_address + slot) for net in self._networks[node])
        ports = _ports(pod.spec)
        return MadePod(
            uid=pod_uid(pod.namespace, pod.name),
            namespace=pod.namespace,
            name=pod.name,
            labels=pod.labels,
            node=node,
            addresses=addresses,
            ports=ports,
            host_network=pod.spec.host_network,
            command=pod.annotations.get(COMMAND_ANNOTATION, ""),
            slot=slot,
            identity=self._relevant.key(pod.namespace, pod.labels, ports),
            origin=pod.origin,
            host_ports=() if pod.spec.host_network else _host_ports(pod.spec),
        )


def _ports(spec: users.PodSpec) -> tuple[ContainerPort, ...]:
    """The pod's ports, once each, in the order in which Kubernetes looks for a name: containers,
    then the init containers that go on running."""
    running = [item for item in spec.init_containers if item.restart_policy == "Always"]
    return tuple(
        dict.fromkeys(
            ContainerPort(port.container_port, port.protocol, port.name)
            for container in (*spec.containers, *running)
            for port in container.ports
        )
    )


def _host_ports(spec: users.PodSpec) -> tuple[HostPort, ...]:
    return tuple(
        sorted(
            {
                services.host_port(port.host_port, port.protocol, port.container_port, port.host_ip)
                for container in (*spec.containers, *spec.init_containers)
                for port in container.ports
                if port.host_port
            }
        )
    )
