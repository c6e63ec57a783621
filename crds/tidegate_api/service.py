"""The table `services`: frontends, and the backends behind them. `choice` says which of the
backends a node uses."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from tidegate_api.base import Address, Model, Name, Network, Port, Protocol

MAX_AFFINITY = 86_400
"""Seconds: as long as the API lets a client stay with its backend."""

Label = Annotated[str, msgspec.Meta(max_length=63)]
Hints = Annotated[list[Name], msgspec.Meta(min_length=1, max_length=64)]
Affinity = Annotated[int, msgspec.Meta(ge=1, le=MAX_AFFINITY)]
Ranges = Annotated[list[Network], msgspec.Meta(min_length=1)]
FrontendKind = Literal["NodePort", "LoadBalancer", "ExternalIP"]
"""All but the ClusterIP's, which is the absent one. They are reached from outside too."""
EVERY_NODE = ("0.0.0.0", "::")
"""Addresses of a NodePort: each node's own `nodePortAddresses` of that family."""


class Frontend(Model, frozen=True, gc=False):
    """One address of a Service's port."""

    address: Address
    """Where clients connect to. Of a NodePort `0.0.0.0` or `::`: every address of that family
    in the node's own `nodePortAddresses`."""
    port: Port
    """Where clients connect to."""
    protocol: Protocol
    """Of the transport."""
    port_name: Label = ""
    """The port's name in the Service; "" for none."""
    kind: FrontendKind | UnsetType = UNSET
    """What the address is to the Service; absent: its ClusterIP."""


class Backend(Model, order=True, frozen=True, gc=False):
    """One endpoint behind frontends. There are fifty thousand, and none holds another object that
    could hold it."""

    address: Address
    """Where the pod is."""
    port: Port
    """Where the pod listens."""
    node: Name | UnsetType = UNSET
    """The node it runs on; absent: nothing asks for it, or on none."""
    zones: Hints | UnsetType = UNSET
    """Zones that should use it, sorted; absent: no hint."""
    nodes: Hints | UnsetType = UNSET
    """Nodes that should use it, sorted; absent: no hint."""
    state: Literal["Terminating"] | UnsetType = UNSET
    """Absent: ready. `Terminating`: it ends, and serves until then. Flows that it has stay; new
    ones come only where nothing is ready."""


class ServicePort(Model, frozen=True):
    """One port of one Service: frontends of one family that share one backend list."""

    namespace: Label
    """Of the Service."""
    name: Name
    """Of the Service."""
    type: Label
    """Of the Service: ClusterIP and so on."""
    frontends: list[Frontend]
    """Addresses that lead here, sorted."""
    backends: list[Backend]
    """Endpoints that serve it, sorted; each address and port once."""
    affinity: Affinity | UnsetType = UNSET
    """Seconds for which a client address keeps its backend; absent: each flow by itself."""
    internal: Literal["Local"] | UnsetType = UNSET
    """`Local`: the ClusterIP leads to the node's own backends only."""
    external: Literal["Local"] | UnsetType = UNSET
    """`Local`: what comes to the node from outside, for the other kinds of frontend, is led to
    the node's own backends only, and its source stays as it is."""
    source_ranges: Ranges | UnsetType = UNSET
    """Who may use the LoadBalancer frontends, sorted; absent: everybody."""
    algorithm: Literal["Maglev"] | UnsetType = UNSET
    """How a new flow gets its backend; absent: at random."""
    health_check_port: Port | UnsetType = UNSET
    """Where every node answers over HTTP whether it has a ready backend of the Service."""


class HostPort(Model, order=True, frozen=True):
    """A port of a node that leads to one of its pods."""

    port: Port
    """On the node."""
    protocol: Protocol
    """Of the transport."""
    target: Port
    """Where the pod listens."""
    address: Address | UnsetType = UNSET
    """The one address of the node that it is for; absent: every one of `nodePortAddresses`."""


_LATER = {
    Frontend: ("kind",),
    Backend: ("node", "zones", "nodes", "state"),
    ServicePort: (
        "affinity",
        "internal",
        "external",
        "source_ranges",
        "algorithm",
        "health_check_port",
    ),
}
"""Fields that format 1 does not have."""


def format_of(port: ServicePort) -> int:
    """The lowest `spec.format` that can say it."""
    later = any(
        getattr(item, field) is not UNSET
        for item in (port, *port.frontends, *port.backends)
        for field in _LATER[type(item)]
    )
    return 2 if later else 1
