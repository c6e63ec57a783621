"""A folder's Services and EndpointSlices -> Service and Endpoints: what an API server and its
controllers would give them, and nobody else does here: cluster IPs, node ports, endpoints.

Deterministic; and stable: what a Service has got it keeps while it is there. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from tidegate_api import users

from tidegate_operator import endpoints, services
from tidegate_operator.manifests import Document
from tidegate_operator.objects import Endpoints, Node, ObjectName, Pod, Service, ServicePort
from tidegate_operator.problems import Problem, Source, at
from tidegate_operator.services import FAMILIES, Family, canonical, family_of

if TYPE_CHECKING:
    from tidegate_operator.world import MadeWorld

FIRST_CLUSTER_IP = 16
"""Offsets below it are left to those who choose their own (DNS, the API)."""
NODE_PORTS = range(30_000, 32_768)

NodePort = tuple[int, str]
"""(port, protocol)."""


class Builder:
    """One build; `problems` and `sliced` are complete after `build`."""

    def __init__(
        self, cidrs: Sequence[str], previous: MadeWorld, settings: services.Settings
    ) -> None:
        networks = [ipaddress.ip_network(text) for text in cidrs]
        self._networks = {family_of(str(net)): net for net in networks}
        self._previous = previous
        self._settings = settings
        self._taken: dict[str, ObjectName] = {}
        self._ports: set[NodePort] = set()
        self.problems: list[Problem] = []
        self.sliced: frozenset[ObjectName] = frozenset()

    def build(
        self,
        written: Sequence[Document],
        slices: Sequence[Document],
        pods: Mapping[ObjectName, Pod],
        nodes: Mapping[str, Node],
    ) -> tuple[dict[ObjectName, Service], dict[ObjectName, Endpoints]]:
        held: dict[ObjectName, users.Service] = {}
        sources: dict[ObjectName, Source] = {}
        for document in written:
            assert isinstance(document.object, users.Service)
            name = ObjectName(document.key.namespace, document.key.name)
            held[name] = document.object
            sources[name] = document.source
        self._sources = sources
        ranges = [ipaddress.ip_network(cidr) for node in nodes.values() for cidr in node.pod_cidrs]
        explicit = {name: self._explicit(name, held[name], ranges) for name in held}
        self._keep_ports(held)
        found = {name: self._service(name, held[name], explicit[name]) for name in held}
        return found, self._endpoints(found, slices, pods, nodes)

    # ---- endpoints ----

    def _endpoints(
        self,
        found: Mapping[ObjectName, Service],
        slices: Sequence[Document],
        pods: Mapping[ObjectName, Pod],
        nodes: Mapping[str, Node],
    ) -> dict[ObjectName, Endpoints]:
        by_service = endpoints.by_service(slices)
        made_of: dict[ObjectName, Endpoints] = {}
        select = endpoints.Select(pods, self._previous.pods)
        zones = {name: node.zone for name, node in nodes.items()}
        moved = zones != {name: node.zone for name, node in self._previous.nodes.items()}
        for name, service in found.items():
            made = None
            if not moved:
                made = self._reusable(service, name in by_service, select)
            if made is None:
                made = endpoints.derive(service, by_service.get(name), select, nodes)
                before = self._previous.endpoints.get(name)
                made = before if before is not None and before == made else made
            made_of[name] = made
            for note in made.notes:
                self._report(name, *note)
        self.sliced = frozenset(by_service)
        return made_of

    def _reusable(
        self, service: Service, sliced: bool, select: endpoints.Select
    ) -> Endpoints | None:
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
        written: users.Service,
        pod_ranges: Sequence[users.IPNetwork],
    ) -> list[str]:
        """Addresses that the Service chose itself, at most one a family; all of them
        are taken before any is given."""
        spec = written.spec
        if not services.is_programmed(written):
            return []
        chosen: list[str] = []
        for text in dict.fromkeys((spec.cluster_ip, *spec.cluster_ips)):
            if not text:
                continue
            address = ipaddress.ip_address(text)
            chosen_text = canonical(text)
            owner = self._taken.setdefault(chosen_text, name)
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
            elif family_of(chosen_text) not in map(family_of, chosen):
                chosen.append(chosen_text)
        return chosen

    def _service(self, name: ObjectName, written: users.Service, explicit: list[str]) -> Service:
        before = self._previous.services.get(name)
        for remark in services.remarks(written, self._settings):
            self._report(name, *remark)
        addresses: tuple[str, ...] = ()
        if services.is_programmed(written):
            addresses = tuple(
                self._address(name, family, explicit)
                for family in _families(written.spec, explicit)
            )
        if not addresses or not services.has_node_ports(written.spec):
            return services.service(name, written, addresses, before, self._settings)
        ports = tuple(
            self._with_node_port(name, written.spec, port)
            for port in services.service_ports(written.spec)
        )
        check = written.spec.health_check_node_port
        if services.needs_health_check(written.spec) and not check:
            check = self._node_port(name, (0, "TCP"), before.health_check_port if before else 0)
        return services.service(name, written, addresses, before, self._settings, ports, check)

    # ---- node ports ----

    def _keep_ports(self, held: Mapping[ObjectName, users.Service]) -> None:
        """Those that Services chose themselves; of two that chose the same, both have it, and the
        compiler says who is served."""
        for written in held.values():
            if services.has_node_ports(written.spec):
                self._ports |= {
                    (port.node_port, port.protocol) for port in written.spec.ports if port.node_port
                }
                self._ports.add((written.spec.health_check_node_port, "TCP"))
        self._kept = {
            (port.node_port, port.protocol)
            for name, service in self._previous.services.items()
            if name in held
            for port in service.ports
        } | {
            (service.health_check_port, "TCP")
            for name, service in self._previous.services.items()
            if name in held
        }

    def _with_node_port(
        self, name: ObjectName, spec: users.ServiceSpec, port: ServicePort
    ) -> ServicePort:
        wanted = spec.type == "NodePort" or spec.allocate_load_balancer_node_ports
        if port.node_port or not wanted:
            return port
        before = self._previous.services.get(name)
        held = next(
            (
                other.node_port
                for other in (before.ports if before is not None else ())
                if (other.port, other.protocol) == (port.port, port.protocol)
            ),
            0,
        )
        key = (port.port, port.protocol)
        return replace(port, node_port=self._node_port(name, key, held))

    def _node_port(self, name: ObjectName, key: NodePort, held: int) -> int:
        """`held`: what it had; else the first free one from its name's hash on. OverflowError:
        there is none."""
        protocol = key[1]
        text = f"{name}:{key[0]}/{protocol}"
        start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        size = len(NODE_PORTS)
        first = [held] if held else []
        for number in chain(first, (NODE_PORTS[(start + step) % size] for step in range(size))):
            one = (number, protocol)
            if one in self._ports or (number != held and one in self._kept):
                continue
            self._ports.add(one)
            return number
        raise OverflowError("every node port is taken")

    # ---- cluster IPs, one by one ----

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


def _families(spec: users.ServiceSpec, explicit: Sequence[str]) -> list[Family]:
    named = [FAMILIES[text] for text in spec.ip_families] or [family_of(text) for text in explicit]
    families = list(dict.fromkeys(named)) or [FAMILIES["IPv4"]]
    if spec.ip_family_policy != "SingleStack" and len(families) == 1:
        families += [6 if families[0] == 4 else 4]
    return families
