"""Services and EndpointSlices -> Service and EndpointPort: cluster IPs and backends.

Derives the endpoints of a Service from its selector, unless somebody wrote
EndpointSlices for it. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tidegate_api import users

from tidegate_operator.manifests import Document
from tidegate_operator.objects import (
    EndpointPort,
    Node,
    ObjectName,
    Pod,
    Service,
    ServicePort,
    World,
)
from tidegate_operator.problems import Problem, Source, at

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
FIRST_CLUSTER_IP = 16
"""Offsets below it are left to those who choose their own (DNS, the API)."""

Family = Literal[4, 6]
_FAMILY: dict[str, Family] = {"IPv4": 4, "IPv6": 6}


def family_of(address: str) -> Family:
    return 6 if ":" in address else 4


class Builder:
    """One build; `problems` is complete after `build`."""

    def __init__(self, cidrs: Sequence[str], previous: World) -> None:
        networks = [ipaddress.ip_network(text) for text in cidrs]
        self._networks = {family_of(str(net)): net for net in networks}
        self._previous = previous
        self._taken: dict[str, ObjectName] = {}
        self.problems: list[Problem] = []

    def build(
        self,
        written: Sequence[Document],
        slices: Sequence[Document],
        pods: Mapping[ObjectName, Pod],
        nodes: Iterable[Node],
    ) -> tuple[dict[ObjectName, Service], dict[ObjectName, tuple[EndpointPort, ...]]]:
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
        index = _Index(pods)
        endpoints = {}
        for name, service in services.items():
            made = self._endpoints(service, by_slice.get(name), index)
            before = self._previous.endpoints.get(name)
            endpoints[name] = before if before is not None and before == made else made
        return services, endpoints

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
        self._unserved(name, spec)
        headless = "None" in (spec.cluster_ip, *spec.cluster_ips)
        addresses: tuple[str, ...] = ()
        if spec.type != "ExternalName" and not headless:
            addresses = tuple(
                self._address(name, family, explicit) for family in _families(spec, explicit)
            )
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
        before = self._previous.services.get(name)
        return before if before is not None and before == made else made

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

    def _unserved(self, name: ObjectName, spec: users.ServiceSpec) -> None:
        """What the Service asks for and does not get yet; the rest of it works."""
        if spec.type == "ExternalName":
            self._report(name, "spec.type", "ExternalName is not yet served: DNS answers it")
        elif spec.type != "ClusterIP":
            self._report(
                name, "spec.type", f"{spec.type} is not yet served: only its ClusterIP answers"
            )
        if spec.session_affinity != "None":
            self._report(name, "spec.sessionAffinity", "ClientIP is not yet served")
        if spec.internal_traffic_policy != "Cluster":
            text = "Local is not yet served: every node's endpoints are used"
            self._report(name, "spec.internalTrafficPolicy", text)
        if spec.external_ips:
            self._report(name, "spec.externalIPs", "are not yet served")

    # ---- endpoints ----

    def _endpoints(
        self, service: Service, written: list[users.EndpointSlice] | None, index: _Index
    ) -> tuple[EndpointPort, ...]:
        if written is None and service.selector is None:
            if service.type != "ExternalName":
                text = "has no selector and no EndpointSlice: it has no endpoints"
                remedy = f"add a selector, or an EndpointSlice labelled {SERVICE_NAME_LABEL}"
                self._report(service.name, "spec.selector", text, remedy)
            return ()
        pods: list[Pod] = []
        if written is None and service.selector is not None:
            pods = index.select(service.name.namespace, service.selector)
            if not pods:
                text = "selects no pod now"
                remedy = "compare the selector with the pods' labels"
                self._report(service.name, "spec.selector", text, remedy)
        found = []
        for address in service.cluster_ips:
            family = family_of(address)
            for port in service.ports:
                if written is not None:
                    backends = _from_slices(port, family, written)
                else:
                    backends = _from_pods(port, family, pods)
                    if pods and not backends:
                        text = f"no pod it selects has a port named {port.target!r}"
                        self._report(service.name, "spec.ports", text, "name a container port so")
                found.append(EndpointPort(port.port, port.protocol, family, backends))
        return tuple(found)


def _families(spec: users.ServiceSpec, explicit: Sequence[str]) -> list[Family]:
    named = [_FAMILY[text] for text in spec.ip_families] or [family_of(text) for text in explicit]
    families = list(dict.fromkeys(named)) or [_FAMILY["IPv4"]]
    if spec.ip_family_policy != "SingleStack" and len(families) == 1:
        families += [6 if families[0] == 4 else 4]
    return families


def _slices(written: Sequence[Document]) -> dict[ObjectName, list[users.EndpointSlice]]:
    found: dict[ObjectName, list[users.EndpointSlice]] = {}
    for document in written:
        assert isinstance(document.object, users.EndpointSlice)
        owner = document.object.metadata.labels.get(SERVICE_NAME_LABEL)
        if owner:
            name = ObjectName(document.key.namespace, owner)
            found.setdefault(name, []).append(document.object)
    return found


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
    port: ServicePort, family: Family, written: Iterable[users.EndpointSlice]
) -> tuple[tuple[str, int], ...]:
    found: set[tuple[str, int]] = set()
    for item in written:
        if _FAMILY.get(item.address_type) != family:
            continue
        for own in item.ports:
            if own.name != port.name or own.protocol != port.protocol:
                continue
            number = own.port if own.port is not None else port.port
            for endpoint in item.endpoints:
                if endpoint.conditions.ready:
                    # Every address of one endpoint is the same endpoint: one will do.
                    found.update(
                        (str(ipaddress.ip_address(text)), number) for text in endpoint.addresses[:1]
                    )
    return tuple(sorted(found))


class _Index:
    """Pods by (namespace, label, value): a selector looks only at its rarest pair."""

    def __init__(self, pods: Mapping[ObjectName, Pod]) -> None:
        self._pods: dict[tuple[str, str, str], list[Pod]] = {}
        for pod in pods.values():
            for key, value in pod.labels.items():
                self._pods.setdefault((pod.namespace, key, value), []).append(pod)

    def select(self, namespace: str, selector: Mapping[str, str]) -> list[Pod]:
        """Pods that carry every pair; `selector` is not empty."""
        lists = [self._pods.get((namespace, *pair), []) for pair in selector.items()]
        rarest = min(lists, key=len)
        return [pod for pod in rarest if selector.items() <= pod.labels.items()]
