"""Services and EndpointSlices -> Service and EndpointPort: cluster IPs and backends.

Derives the endpoints of a Service from its selector, unless somebody wrote
EndpointSlices for it. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from tidegate_api import users

from tidegate_operator.manifests import Document
from tidegate_operator.objects import (
    EndpointList,
    EndpointPort,
    Endpoints,
    Node,
    ObjectName,
    Pod,
    Service,
    ServicePort,
)
from tidegate_operator.problems import Problem, Source, at

if TYPE_CHECKING:
    from tidegate_operator.world import MadeWorld

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
FIRST_CLUSTER_IP = 16
"""Offsets below it are left to those who choose their own (DNS, the API)."""

Family = Literal[4, 6]
_FAMILY: dict[str, Family] = {"IPv4": 4, "IPv6": 6}


def family_of(address: str) -> Family:
    return 6 if ":" in address else 4


def canonical(address: str) -> str:
    return str(ipaddress.ip_address(address))


class Builder:
    """One build; `problems` and `sliced` are complete after `build`."""

    def __init__(self, cidrs: Sequence[str], previous: MadeWorld) -> None:
        networks = [ipaddress.ip_network(text) for text in cidrs]
        self._networks = {family_of(str(net)): net for net in networks}
        self._previous = previous
        self._taken: dict[str, ObjectName] = {}
        self.problems: list[Problem] = []
        self.sliced: frozenset[ObjectName] = frozenset()

    def build(
        self,
        written: Sequence[Document],
        slices: Sequence[Document],
        pods: Mapping[ObjectName, Pod],
        nodes: Iterable[Node],
    ) -> tuple[dict[ObjectName, Service], dict[ObjectName, Endpoints]]:
        held: dict[ObjectName, users.Service] = {}
        sources: dict[ObjectName, Source] = {}
        for document in written:
            assert isinstance(document.object, users.Service)
            name = ObjectName(document.key.namespace, document.key.name)
            held[name] = document.object
            sources[name] = document.source
        self._sources = sources
        ranges = [ipaddress.ip_network(cidr) for node in nodes for cidr in node.pod_cidrs]
        explicit = {name: self._explicit(name, held[name].spec, ranges) for name in held}
        services = {name: self._service(name, held[name], explicit[name]) for name in held}
        by_slice = _slices(slices)
        endpoints = {}
        select = _Select(pods, self._previous.pods)
        for name, service in services.items():
            made = self._reusable(service, name in by_slice, select)
            if made is None:
                made = _endpoints(service, by_slice.get(name), select)
                before = self._previous.endpoints.get(name)
                made = before if before is not None and before == made else made
            endpoints[name] = made
            for note in made.notes:
                self._report(name, *note)
        self.sliced = frozenset(by_slice)
        return services, endpoints

    def _reusable(self, service: Service, sliced: bool, select: _Select) -> Endpoints | None:
        """The endpoints of the previous world, if nothing they depend on has changed."""
        if sliced or self._previous.services.get(service.name) is not service:
            return None
        if service.name in self._previous.sliced or select.changed(service):
            return None
        return self._previous.endpoints.get(service.name)

    # ---- cluster IPs ----

    def _report(self, name: ObjectName, field: str, message: str, remedy: str = "") -> None:
        self.problems.append(
            at(
                self._sources[name],
                "warning",
                message,
                object=f"Service {name}",
                field=field,
                remedy=remedy,
            )
        )

    def _explicit(
        self,
        name: ObjectName,
        spec: users.ServiceSpec,
        pod_ranges: Sequence[users.IPNetwork],
    ) -> list[str]:
        """Addresses that the Service chose itself, at most one a family; all of them
        are taken before any is given."""
        if spec.type == "ExternalName" or "None" in (spec.cluster_ip, *spec.cluster_ips):
            return []
        chosen: list[str] = []
        for text in dict.fromkeys((spec.cluster_ip, *spec.cluster_ips)):
            if not text:
                continue
            address = ipaddress.ip_address(text)
            canonical = str(address)
            owner = self._taken.setdefault(canonical, name)
            if owner != name:
                self._report(
                    name,
                    "spec.clusterIP",
                    f"{text} belongs to Service {owner}; another one is given",
                    "choose a free address or leave clusterIP out",
                )
            elif any(address in net for net in pod_ranges if net.version == address.version):
                self._report(
                    name,
                    "spec.clusterIP",
                    f"{text} lies among the pods' addresses; another one is given",
                    "leave clusterIP out",
                )
            elif family_of(canonical) not in map(family_of, chosen):
                chosen.append(canonical)
        return chosen

    def _service(self, name: ObjectName, written: users.Service, explicit: list[str]) -> Service:
        spec = written.spec
        for field, message in unserved(spec):
            self._report(name, field, message)
        addresses: tuple[str, ...] = ()
        if spec.type != "ExternalName" and "None" not in (spec.cluster_ip, *spec.cluster_ips):
            addresses = tuple(
                self._address(name, family, explicit) for family in _families(spec, explicit)
            )
        return service(name, written, addresses, self._previous.services.get(name))

    def _address(self, name: ObjectName, family: Family, explicit: Sequence[str]) -> str:
        own = next((text for text in explicit if family_of(text) == family), None)
        if own is not None:
            return own
        before = self._previous.services.get(name)
        for text in before.cluster_ips if before is not None else ():
            if family_of(text) == family and self._taken.setdefault(text, name) == name:
                return text
        network = self._networks[family]
        size = network.num_addresses - FIRST_CLUSTER_IP - 1
        start = int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:4], "big") % size
        kept = {
            text
            for other, service in self._previous.services.items()
            if other in self._sources
            for text in service.cluster_ips
        }
        for step in range(size):
            offset = FIRST_CLUSTER_IP + (start + step) % size
            text = str(network.network_address + offset)
            if text not in kept and self._taken.setdefault(text, name) == name:
                return text
        raise OverflowError(f"every address of {network} is taken")


# ---- Shared with the cluster's builder ------------------------------------------------


def service(
    name: ObjectName, written: users.Service, addresses: tuple[str, ...], before: Service | None
) -> Service:
    """`before` if it means the same."""
    if before is not None and before.origin is written and before.cluster_ips == addresses:
        return before
    spec = written.spec
    made = Service(
        name=name,
        type=spec.type,
        selector=dict(spec.selector) if spec.selector else None,
        ports=tuple(
            ServicePort(
                port.port,
                port.protocol,
                port.name,
                port.port if port.target_port is None else port.target_port,
            )
            for port in spec.ports
        ),
        cluster_ips=addresses,
        origin=written,
    )
    return before if before is not None and before == made else made


def unserved(spec: users.ServiceSpec) -> list[tuple[str, str]]:
    """What the Service asks for and does not get yet, (field, message); the rest works."""
    found = []
    if spec.type == "ExternalName":
        found.append(("spec.type", "ExternalName is not yet served: DNS answers it"))
    elif spec.type != "ClusterIP":
        text = f"{spec.type} is not yet served: only its ClusterIP answers"
        found.append(("spec.type", text))
    if spec.session_affinity != "None":
        found.append(("spec.sessionAffinity", "ClientIP is not yet served"))
    if spec.internal_traffic_policy != "Cluster":
        text = "Local is not yet served: every node's endpoints are used"
        found.append(("spec.internalTrafficPolicy", text))
    if spec.external_ips:
        found.append(("spec.externalIPs", "are not yet served"))
    return found


def endpoints_of(service: Service, slices: Sequence[EndpointList]) -> Endpoints:
    """Where the Service leads, from its EndpointSlices."""
    return Endpoints(
        tuple(
            EndpointPort(port.port, port.protocol, family, _from_slices(port, family, slices))
            for family in map(family_of, service.cluster_ips)
            for port in service.ports
        )
    )


# ---- Endpoints ---------------------------------------------------------------------


def _endpoints(
    service: Service, written: Sequence[EndpointList] | None, select: _Select
) -> Endpoints:
    if written is not None:
        return endpoints_of(service, written)
    notes: list[tuple[str, str, str]] = []
    if service.selector is None:
        if service.type != "ExternalName":
            text = "has no selector and no EndpointSlice: it has no endpoints"
            remedy = f"add a selector, or an EndpointSlice labelled {SERVICE_NAME_LABEL}"
            notes.append(("spec.selector", text, remedy))
        return Endpoints((), tuple(notes))
    pods = select.pods(service.name.namespace, service.selector)
    if not pods:
        remedy = "compare the selector with the pods' labels"
        notes.append(("spec.selector", "selects no pod now", remedy))
    found = []
    for address in service.cluster_ips:
        family = family_of(address)
        for place, port in enumerate(service.ports):
            backends = _from_pods(port, family, pods)
            if pods and not backends:
                field = f"spec.ports[{place}].targetPort"
                text = f"no pod it selects has a port named {port.target!r}"
                notes.append((field, text, "give a container port that name"))
            found.append(EndpointPort(port.port, port.protocol, family, backends))
    return Endpoints(tuple(found), tuple(dict.fromkeys(notes)))


def _families(spec: users.ServiceSpec, explicit: Sequence[str]) -> list[Family]:
    named = [_FAMILY[text] for text in spec.ip_families] or [family_of(text) for text in explicit]
    families = list(dict.fromkeys(named)) or [_FAMILY["IPv4"]]
    if spec.ip_family_policy != "SingleStack" and len(families) == 1:
        families += [6 if families[0] == 4 else 4]
    return families


def _slices(written: Sequence[Document]) -> dict[ObjectName, list[EndpointList]]:
    found: dict[ObjectName, list[EndpointList]] = {}
    for document in written:
        assert isinstance(document.object, users.EndpointSlice)
        owner = document.object.metadata.labels.get(SERVICE_NAME_LABEL)
        if owner:
            name = ObjectName(document.key.namespace, owner)
            found.setdefault(name, []).append(_endpoint_list(document.object))
    return found


def _endpoint_list(written: users.EndpointSlice) -> EndpointList:
    return EndpointList(
        family=_FAMILY.get(written.address_type),
        ports=tuple((port.name, port.protocol, port.port) for port in written.ports),
        # Every address of one endpoint is the same endpoint: one will do.
        ready=tuple(
            str(ipaddress.ip_address(endpoint.addresses[0]))
            for endpoint in written.endpoints
            if endpoint.conditions.ready and endpoint.addresses and written.address_type in _FAMILY
        ),
    )


def _from_pods(
    port: ServicePort, family: Family, pods: Iterable[Pod]
) -> tuple[tuple[str, int], ...]:
    found: set[tuple[str, int]] = set()
    for pod in pods:
        number = port.target if isinstance(port.target, int) else _named(pod, port)
        address = next((text for text in pod.addresses if family_of(text) == family), None)
        if number is not None and address is not None:
            found.add((address, number))
    return tuple(sorted(found))


def _named(pod: Pod, port: ServicePort) -> int | None:
    for own in pod.ports:
        if own.name == port.target and own.protocol == port.protocol:
            return own.port
    return None


def _from_slices(
    port: ServicePort, family: Family, slices: Iterable[EndpointList]
) -> tuple[tuple[str, int], ...]:
    found: set[tuple[str, int]] = set()
    for item in slices:
        if item.family != family:
            continue
        for name, protocol, own in item.ports:
            if name == port.name and protocol == port.protocol:
                number = own if own is not None else port.port
                found.update((address, number) for address in item.ready)
    return tuple(sorted(found))


class _Select:
    """Pods by the selector of a Service. The index is made only if it will pay."""

    FEW = 8
    """So many selections scan all pods; more make the index."""

    def __init__(self, pods: Mapping[ObjectName, Pod], before: Mapping[ObjectName, Pod]) -> None:
        self._all = pods
        self._count = 0
        self._index: dict[tuple[str, str, str], list[Pod]] | None = None
        # Both what a changed pod was and what it is: it may leave a Service or join one.
        self._changes = [pod for name, pod in pods.items() if before.get(name) is not pod]
        self._changes += [pod for name, pod in before.items() if pods.get(name) is not pod]

    def changed(self, service: Service) -> bool:
        """Has a pod that the Service selects, or did, changed since the previous world?"""
        selector = service.selector
        return selector is not None and any(
            pod.namespace == service.name.namespace and selector.items() <= pod.labels.items()
            for pod in self._changes
        )

    def pods(self, namespace: str, selector: Mapping[str, str]) -> list[Pod]:
        """Pods that carry every pair; `selector` is not empty."""
        self._count += 1
        if self._count <= self.FEW:
            candidates: Iterable[Pod] = self._all.values()
        else:
            index = self._index = self._index or self._make_index()
            lists = [index.get((namespace, *pair), []) for pair in selector.items()]
            rarest: list[Pod] = min(lists, key=len)
            candidates = rarest
        return [
            pod
            for pod in candidates
            if pod.namespace == namespace and selector.items() <= pod.labels.items()
        ]

    def _make_index(self) -> dict[tuple[str, str, str], list[Pod]]:
        found: dict[tuple[str, str, str], list[Pod]] = {}
        for pod in self._all.values():
            for key, value in pod.labels.items():
                found.setdefault((pod.namespace, key, value), []).append(pod)
        return found
