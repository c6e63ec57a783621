"""What a Service means: users.Service -> Service, for a folder as for a cluster.

Where it leads to is `endpoints`'; who gets an address that two claim is `compile`'s. No I/O, no
clock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tidegate_api import users
from tidegate_api.service import EVERY_NODE

from tidegate_operator.objects import (
    HostPort,
    ObjectName,
    Outside,
    Protocol,
    Service,
    ServicePort,
)

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
PROXY_LABEL = "service.kubernetes.io/service-proxy-name"
"""On a Service that another proxy serves."""
ZONE_LABEL = "topology.kubernetes.io/zone"
ALGORITHM_ANNOTATION = "tidegate.dev/algorithm"
ALGORITHMS = ("Random", "Maglev")

Family = Literal[4, 6]
FAMILIES: dict[str, Family] = {"IPv4": 4, "IPv6": 6}
NEAR: dict[str, Literal["PreferSameZone", "PreferSameNode"]] = {
    "PreferClose": "PreferSameZone",
    "PreferSameZone": "PreferSameZone",
    "PreferSameNode": "PreferSameNode",
}


@dataclass(frozen=True)
class Settings:
    """What the owner of a cluster decides about its Services, and about its pods' packets to
    what is outside. CIDRs without host bits."""

    external_ips: tuple[str, ...] = ()
    """`spec.externalIPs` inside them are served; () = none is: whoever may write a Service could
    take any address with them."""
    node_ports: tuple[str, ...] = ()
    """Addresses of a node inside them answer for NodePorts; () = its primary ones."""
    maglev: bool = False
    """The algorithm of Services that name none."""
    masquerade: tuple[str, ...] | None = None
    """Pods' packets outside leave with the node's address, but for those to these networks; None:
    none does."""


DEFAULTS = Settings()


def family_of(address: str) -> Family:
    return 6 if ":" in address else 4


def canonical(address: str) -> str:
    return str(ipaddress.ip_address(address))


def inside(address: str, cidrs: Sequence[str]) -> bool:
    found = ipaddress.ip_address(address)
    networks = map(ipaddress.ip_network, cidrs)
    return any(found in network for network in networks if network.version == found.version)


def port_addresses(addresses: Sequence[str], settings: Settings) -> tuple[str, ...]:
    """Which of a node's addresses answer for NodePorts. `addresses`: IPv4 first, and internal
    ones before external ones: the first of each family is the primary one."""
    if settings.node_ports:
        return tuple(text for text in addresses if inside(text, settings.node_ports))
    first: dict[Family, str] = {}
    for text in addresses:
        first.setdefault(family_of(text), text)
    return tuple(first.values())


def host_port(port: int, protocol: Protocol, target: int, address: str) -> HostPort:
    """`address`: as a pod has it; nobody's address is the same as none."""
    own = canonical(address) if address else ""
    return HostPort(port, protocol, target, "" if own in EVERY_NODE else own)


def is_headless(spec: users.ServiceSpec) -> bool:
    return "None" in (spec.cluster_ip, *spec.cluster_ips)


def is_programmed(written: users.Service) -> bool:
    """Whether anything of the Service is for a node to serve."""
    spec = written.spec
    return not (
        spec.type == "ExternalName" or is_headless(spec) or written.metadata.labels.get(PROXY_LABEL)
    )


def service(
    name: ObjectName,
    written: users.Service,
    addresses: tuple[str, ...],
    before: Service | None,
    settings: Settings = DEFAULTS,
    ports: tuple[ServicePort, ...] | None = None,
    health_check_port: int = 0,
) -> Service:
    """`before` if it means the same. `addresses`: its cluster IPs. `ports`, `health_check_port`:
    with numbers that were given to it, where no API server does."""
    spec = written.spec
    made = Service(
        name=name,
        type=spec.type,
        selector=dict(spec.selector) if spec.selector else None,
        ports=service_ports(spec) if ports is None else ports,
        cluster_ips=addresses,
        origin=written,
        outside=_outside(written, settings) if addresses else (),
        affinity=_affinity(spec),
        internal_local=spec.internal_traffic_policy == "Local",
        external_local=is_external_local(spec),
        source_ranges=_source_ranges(spec),
        health_check_port=spec.health_check_node_port or health_check_port
        if needs_health_check(spec)
        else 0,
        maglev=_algorithm(written, settings) == "Maglev",
        near=NEAR.get(spec.traffic_distribution, ""),
        since=_since(written),
    )
    return before if before is not None and before == made else made


def service_ports(spec: users.ServiceSpec) -> tuple[ServicePort, ...]:
    return tuple(
        ServicePort(
            port.port,
            port.protocol,
            port.name,
            port.port if port.target_port is None else port.target_port,
            port.node_port if has_node_ports(spec) else 0,
        )
        for port in spec.ports
    )


def has_node_ports(spec: users.ServiceSpec) -> bool:
    return spec.type in ("NodePort", "LoadBalancer")


def is_external_local(spec: users.ServiceSpec) -> bool:
    """As written, where the Service is reached from outside at all."""
    reached = has_node_ports(spec) or bool(spec.external_ips)
    return reached and spec.external_traffic_policy == "Local"


def needs_health_check(spec: users.ServiceSpec) -> bool:
    return spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local"


def _outside(written: users.Service, settings: Settings) -> tuple[Outside, ...]:
    """Once each; as the load balancer's address where it is that too. Addresses that the load
    balancer proxies (`ipMode: Proxy`) must reach it, and are not for a node to serve."""
    found: dict[str, Outside] = {}
    if written.spec.type == "LoadBalancer":
        for item in written.status.load_balancer.ingress:
            if item.ip and item.ip_mode == "VIP":
                address = canonical(item.ip)
                found[address] = Outside("LoadBalancer", address)
    for text in written.spec.external_ips:
        address = canonical(text)
        if inside(address, settings.external_ips):
            found.setdefault(address, Outside("ExternalIP", address))
    return tuple(sorted(found.values()))


def _affinity(spec: users.ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    return spec.session_affinity_config.client_ip.timeout_seconds


def _source_ranges(spec: users.ServiceSpec) -> tuple[str, ...]:
    """A range of everything is as good as none, for its family."""
    if spec.type != "LoadBalancer":
        return ()
    found = {str(users.network(text.strip())) for text in spec.load_balancer_source_ranges}
    if "0.0.0.0/0" in found:
        found = {text for text in found if ":" in text}
    if "::/0" in found:
        found = {text for text in found if ":" not in text}
    return tuple(sorted(found))


def _algorithm(written: users.Service, settings: Settings) -> str:
    asked = written.metadata.annotations.get(ALGORITHM_ANNOTATION, "")
    return asked if asked in ALGORITHMS else ALGORITHMS[settings.maglev]


def _since(written: users.Service) -> str:
    found = written.metadata.creation_timestamp
    return found if isinstance(found, str) else ""


def remarks(written: users.Service, settings: Settings = DEFAULTS) -> list[tuple[str, str, str]]:
    """What the Service asks for and does not get, (field, message, remedy); the rest works."""
    spec, found = written.spec, []
    if not is_programmed(written):
        return []
    refused = [
        text for text in spec.external_ips if not inside(canonical(text), settings.external_ips)
    ]
    if refused:
        text = f"{', '.join(refused)} not served: no such address is allowed here"
        remedy = "allow the network with --external-ips, or use a LoadBalancer"
        found.append(("spec.externalIPs", text, remedy))
    asked = written.metadata.annotations.get(ALGORITHM_ANNOTATION, "")
    if asked and asked not in ALGORITHMS:
        text = f"{asked!r} is no algorithm: {ALGORITHMS[settings.maglev]} is used"
        found.append(
            (
                f"metadata.annotations[{ALGORITHM_ANNOTATION}]",
                text,
                f"write {' or '.join(ALGORITHMS)}",
            )
        )
    if spec.type == "LoadBalancer" and not written.status.load_balancer.ingress:
        text = "has no address yet: its ClusterIP and NodePorts answer"
        remedy = "a load balancer writes status.loadBalancer"
        found.append(("status.loadBalancer", text, remedy))
    return found
