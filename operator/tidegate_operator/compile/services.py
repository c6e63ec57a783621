"""Services -> the table that nodes read: frontends, backends, and who has an address that
several Services claim. Costs what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec import UNSET
from tidegate_api import state
from tidegate_api.service import EVERY_NODE, FrontendKind, ServicePort

from tidegate_operator.changes import changed, gone
from tidegate_operator.objects import (
    Backend,
    EndpointPort,
    Endpoints,
    ObjectName,
    Service,
)
from tidegate_operator.problems import Problem, Source, at

Claim = tuple[str, int, str]
"""(address, port, protocol) of a frontend."""
_FIELDS: dict[FrontendKind | None, str] = {
    None: "spec.clusterIP",
    "NodePort": "spec.ports",
    "LoadBalancer": "status.loadBalancer",
    "ExternalIP": "spec.externalIPs",
}


class _Rank(NamedTuple):
    """Lower wins: a ClusterIP, then who is known to be older, then the name."""

    outer: bool
    unknown: bool
    since: str
    name: ObjectName


class _Front(NamedTuple):
    kind: FrontendKind | None
    address: str
    port: int


class _Held(NamedTuple):
    service: Service
    endpoints: Endpoints
    ports: list[ServicePort]
    lost: tuple[tuple[_Front, ObjectName], ...]
    """Frontends that another Service has, and which one."""


class ServiceTable:
    """The table of one world after another."""

    def __init__(self) -> None:
        self._services: Mapping[ObjectName, Service] = {}
        self._endpoints: Mapping[ObjectName, Endpoints] = {}
        self._held: dict[ObjectName, _Held] = {}
        self._claims: dict[Claim, tuple[_Rank, ...]] = {}
        self._contested: set[ObjectName] = set()
        self._zoned: set[ObjectName] = set()
        self._node_ported: set[ObjectName] = set()
        self.entries: dict[str, list[ServicePort]] = {}
        """"namespace/name" -> its ports, sorted; another dict whenever anything changed."""
        self.version = 0
        """Counts changes of what `problems` says."""

    @property
    def asks_zones(self) -> bool:
        """Whether a node has to know its zone."""
        return bool(self._zoned)

    @property
    def asks_node_ports(self) -> bool:
        """Whether a node has to know which of its addresses answer for NodePorts."""
        return bool(self._node_ported)

    def update(
        self, services: Mapping[ObjectName, Service], endpoints: Mapping[ObjectName, Endpoints]
    ) -> None:
        if services is self._services and endpoints is self._endpoints:
            return
        held = self._held
        lost = gone(self._services, services)
        dirty = {
            *changed(self._services, services),
            *changed(self._endpoints, endpoints),
        }
        rivals = self._claim_anew(lost, dirty, services)
        for name in lost:
            del held[name]
            self._note(name, None)
        for name in dirty | rivals:
            made = self._make(services[name], endpoints[name])
            held[name] = made
            self._note(name, made)
        self._services, self._endpoints = services, endpoints
        made_anew = {str(name): held[name].ports for name in dirty | rivals}
        if lost or any(bool(ports) != (key in self.entries) for key, ports in made_anew.items()):
            self.entries = {str(name): held[name].ports for name in services if held[name].ports}
        elif made_anew:
            self.entries = self.entries | {key: ports for key, ports in made_anew.items() if ports}

    def problems(self, sources: Mapping[tuple[str, str, str], Source]) -> list[Problem]:
        """Of those that claim what others have; sorted by name."""
        return [
            _conflict(name, front, owner, sources.get(("Service", *name), Source()))
            for name in sorted(self._contested)
            for front, owner in self._held[name].lost
        ]

    # ---- claims ----

    def _claim_anew(
        self,
        lost: Iterable[ObjectName],
        dirty: Iterable[ObjectName],
        services: Mapping[ObjectName, Service],
    ) -> set[ObjectName]:
        """Take the claims of those that changed out and put them in as they are now. Who else
        claims, or has claimed, one of them."""
        touched: set[Claim] = set()
        before: dict[Claim, tuple[_Rank, ...]] = {}
        moved = [name for name in dirty if not self._same_service(name, services[name])]
        for name in (*lost, *moved):
            if name not in self._held:
                continue
            for claim in _claims(self._held[name].service):
                before.setdefault(claim, self._claims[claim])
                left = tuple(rank for rank in self._claims[claim] if rank.name != name)
                touched.add(claim)
                if left:
                    self._claims[claim] = left
                else:
                    del self._claims[claim]
        for name in moved:
            for claim, rank in _claims(services[name]).items():
                touched.add(claim)
                self._claims[claim] = tuple(sorted((*self._claims.get(claim, ()), rank)))
        return {
            rank.name
            for claim in touched
            if len(now := self._claims.get(claim, ())) > 1 or len(before.get(claim, ())) > 1
            for rank in now
            if rank.name in services
        }

    def _same_service(self, name: ObjectName, service: Service) -> bool:
        held = self._held.get(name)
        return held is not None and held.service is service

    def _note(self, name: ObjectName, made: _Held | None) -> None:
        ports = made.ports if made is not None else []
        zoned = any(backend.zones is not UNSET for port in ports for backend in port.backends)
        ported = any(front.kind == "NodePort" for port in ports for front in port.frontends)
        lost = made is not None and bool(made.lost)
        if lost or name in self._contested:
            self.version += 1
        for members, is_one in (
            (self._zoned, zoned),
            (self._node_ported, ported),
            (self._contested, lost),
        ):
            if is_one:
                members.add(name)
            else:
                members.discard(name)

    # ---- one Service ----

    def _make(self, service: Service, endpoints: Endpoints) -> _Held:
        lost: dict[_Front, ObjectName] = {}
        ports = []
        for port in endpoints.ports:
            own = next(
                one
                for one in service.ports
                if (one.port, one.protocol) == (port.port, port.protocol)
            )
            fronts = []
            for front in _fronts(service, port.family, own.port, own.node_port):
                owner = self._claims[front.address, front.port, port.protocol][0].name
                if owner == service.name:
                    fronts.append(front)
                else:
                    lost[front] = owner
            if fronts:
                ports.append(_port(service, port, own.name, fronts))
        ports.sort(
            key=lambda port: (
                port.frontends[0].address,
                port.frontends[0].port,
                port.frontends[0].protocol,
            )
        )
        return _Held(service, endpoints, ports, tuple(lost.items()))


def _claims(service: Service) -> dict[Claim, _Rank]:
    found: dict[Claim, _Rank] = {}
    for address in service.cluster_ips:
        family = 6 if ":" in address else 4
        for port in service.ports:
            for front in _fronts(service, family, port.port, port.node_port):
                rank = _Rank(front.kind is not None, not service.since, service.since, service.name)
                key = (front.address, front.port, port.protocol)
                found[key] = min(found.get(key, rank), rank)
    return found


def _fronts(service: Service, family: int, port: int, node_port: int) -> list[_Front]:
    """Of one port in one family: the ClusterIP first, each address once."""
    v6 = family == 6
    own = next(text for text in service.cluster_ips if (":" in text) == v6)
    found = [_Front(None, own, port)]
    found += [
        _Front(one.kind, one.address, port)
        for one in service.outside
        if (":" in one.address) == v6 and one.address != own
    ]
    if node_port:
        found.append(_Front("NodePort", EVERY_NODE[v6], node_port))
    return found


def _port(service: Service, port: EndpointPort, name: str, fronts: Iterable[_Front]) -> ServicePort:
    frontends = [
        state.Frontend(
            address=front.address,
            port=front.port,
            protocol=port.protocol,
            port_name=name,
            kind=UNSET if front.kind is None else front.kind,
        )
        for front in fronts
    ]
    outer = any(front.kind is not UNSET for front in frontends)
    ranges = [text for text in service.source_ranges if (":" in text) == (port.family == 6)]
    local = service.internal_local or (service.external_local and outer)
    return ServicePort(
        namespace=service.name.namespace,
        name=service.name.name,
        type=service.type,
        frontends=frontends,
        backends=_backends(port.backends, local, hinted=outer or not service.internal_local),
        affinity=service.affinity or UNSET,
        internal="Local" if service.internal_local else UNSET,
        external="Local" if service.external_local and outer else UNSET,
        source_ranges=ranges or UNSET,
        algorithm="Maglev" if service.maglev else UNSET,
        health_check_port=service.health_check_port or UNSET,
    )


def _backends(backends: tuple[Backend, ...], local: bool, hinted: bool) -> list[state.Backend]:
    """With what choosing needs, and no more: the node where a policy is Local; hints where every
    ready backend has some and a policy is not Local."""
    ready = [one for one in backends if not one.ends]
    zones = hinted and all(one.zones for one in ready)
    nodes = hinted and all(one.nodes for one in ready)
    return [
        state.Backend(
            address=one.address,
            port=one.port,
            node=one.node if local and one.node else UNSET,
            zones=list(one.zones) if zones and not one.ends else UNSET,
            nodes=list(one.nodes) if nodes and not one.ends else UNSET,
            state="Terminating" if one.ends else UNSET,
        )
        for one in backends
    ]


def _conflict(name: ObjectName, front: _Front, owner: ObjectName, source: Source) -> Problem:
    what = (
        f"node port {front.port}"
        if front.kind == "NodePort"
        else f"port {front.port} of {front.address}"
    )
    return at(
        source,
        "warning",
        f"{what} belongs to Service {owner}, which is older or comes first by name",
        object=f"Service {name}",
        field=_FIELDS[front.kind],
        remedy="give one of the two another address or port",
    )
