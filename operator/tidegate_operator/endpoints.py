"""Where a Service leads: from EndpointSlices, or derived from its selector as the controller of
a cluster would. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tidegate_api import users

from tidegate_operator.manifests import Document
from tidegate_operator.objects import (
    Backend,
    EndpointList,
    EndpointPort,
    Endpoints,
    Listed,
    Node,
    ObjectName,
    Pod,
    Service,
    ServicePort,
)
from tidegate_operator.services import (
    FAMILIES,
    SERVICE_NAME_LABEL,
    Family,
    canonical,
    family_of,
)


def from_slices(service: Service, slices: Sequence[EndpointList]) -> Endpoints:
    """What EndpointSlices say of each of its ports."""
    return Endpoints(
        tuple(
            EndpointPort(port.port, port.protocol, family, _of_port(port, family, slices))
            for family in map(family_of, service.cluster_ips)
            for port in service.ports
        )
    )


def _of_port(
    port: ServicePort, family: Family, slices: Iterable[EndpointList]
) -> tuple[Backend, ...]:
    found: list[Backend] = []
    for item in slices:
        if item.family != family:
            continue
        for name, protocol, own in item.ports:
            if name == port.name and protocol == port.protocol:
                number = own if own is not None else port.port
                found += [Backend(one.address, number, *one[1:]) for one in item.endpoints]
    return _distinct(found)


def _distinct(found: Iterable[Backend]) -> tuple[Backend, ...]:
    """Sorted, each address and port once: an endpoint that moves between slices is in both for a
    while, and a new pod may have the address of one that ends. The one that is ready counts."""
    held: dict[tuple[str, int], Backend] = {}
    for one in found:
        key = one[:2]
        other = held.get(key)
        if other is None or (one.ends, one) < (other.ends, other):
            held[key] = one
    return tuple(sorted(held.values()))


def listed(
    addresses: Sequence[str],
    ready: bool,
    serving: bool,
    terminating: bool,
    node: str,
    zones: Iterable[str],
    nodes: Iterable[str],
) -> Listed | None:
    """One endpoint of a slice; None: it gets no connection. Every address of one endpoint is the
    same endpoint: one will do."""
    if not addresses or not (ready or (serving and terminating)):
        return None
    return Listed(
        canonical(addresses[0]), node, tuple(sorted(zones)), tuple(sorted(nodes)), not ready
    )


# ---- A folder's ---------------------------------------------------------------------


def by_service(written: Sequence[Document]) -> dict[ObjectName, list[EndpointList]]:
    found: dict[ObjectName, list[EndpointList]] = {}
    for document in written:
        assert isinstance(document.object, users.EndpointSlice)
        owner = document.object.metadata.labels.get(SERVICE_NAME_LABEL)
        if owner:
            name = ObjectName(document.key.namespace, owner)
            found.setdefault(name, []).append(_endpoint_list(document.object))
    return found


def _endpoint_list(written: users.EndpointSlice) -> EndpointList:
    family = FAMILIES.get(written.address_type)
    found = [
        listed(
            one.addresses,
            one.conditions.ready,
            one.conditions.serving,
            one.conditions.terminating,
            one.node_name,
            (zone.name for zone in one.hints.for_zones),
            (node.name for node in one.hints.for_nodes),
        )
        for one in (written.endpoints if family is not None else ())
    ]
    return EndpointList(
        family=family,
        ports=tuple((port.name, port.protocol, port.port) for port in written.ports),
        endpoints=tuple(one for one in found if one is not None),
    )


def derive(
    service: Service,
    written: Sequence[EndpointList] | None,
    select: Select,
    nodes: Mapping[str, Node],
) -> Endpoints:
    """`written` where somebody wrote slices for the Service, else of the pods that it selects."""
    if written is not None:
        return from_slices(service, written)
    notes: list[tuple[str, str, str]] = []
    if service.selector is None:
        if service.type != "ExternalName":
            text = "has no selector and no EndpointSlice: it has no endpoints"
            remedy = f"add a selector, or an EndpointSlice labelled {SERVICE_NAME_LABEL}"
            notes.append(("spec.selector", text, remedy))
        return Endpoints(from_slices(service, ()).ports, tuple(notes))
    pods = select.pods(service.name.namespace, service.selector)
    if not pods:
        remedy = "compare the selector with the pods' labels"
        notes.append(("spec.selector", "selects no pod now", remedy))
    found = []
    for address in service.cluster_ips:
        family = family_of(address)
        for place, port in enumerate(service.ports):
            backends = _from_pods(service, port, family, pods, nodes)
            if pods and not backends:
                field = f"spec.ports[{place}].targetPort"
                text = f"no pod it selects has a port named {port.target!r}"
                notes.append((field, text, "give a container port that name"))
            found.append(EndpointPort(port.port, port.protocol, family, backends))
    return Endpoints(tuple(found), tuple(dict.fromkeys(notes)))


def _from_pods(
    service: Service,
    port: ServicePort,
    family: Family,
    pods: Iterable[Pod],
    nodes: Mapping[str, Node],
) -> tuple[Backend, ...]:
    """Every pod is ready. Hints as the controller gives them: an endpoint should be used where
    it is itself."""
    found = []
    for pod in pods:
        number = port.target if isinstance(port.target, int) else _named(pod, port)
        address = next((text for text in pod.addresses if family_of(text) == family), None)
        if number is None or address is None:
            continue
        zone = nodes[pod.node].zone if pod.node in nodes else ""
        found.append(
            Backend(
                address,
                number,
                pod.node,
                (zone,) if service.near and zone else (),
                (pod.node,) if service.near == "PreferSameNode" else (),
            )
        )
    return _distinct(found)


def _named(pod: Pod, port: ServicePort) -> int | None:
    for own in pod.ports:
        if own.name == port.target and own.protocol == port.protocol:
            return own.port
    return None


class Select:
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
