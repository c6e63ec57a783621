"""Which backends of a service port a node uses: the one place that decides it, for the loader
as for whoever explains. docs/services.md tells it in prose. Pure.

The words of the API: a backend is ready, or it is ending and serves until it has ended (the
others are in no list); a traffic policy is Cluster or Local; a hint names zones or nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from msgspec import UNSET, UnsetType

from tidegate_api.service import Backend, FrontendKind, ServicePort


class Choice(NamedTuple):
    """`backends`: in the order of the service port. `empty`: what becomes of a new flow if there
    are none. `Reject`: nobody serves it, which the client is told at once. `Drop`: the policy is
    Local, and only other nodes have backends."""

    backends: tuple[Backend, ...]
    empty: Literal["Reject", "Drop"]


def choose(
    port: ServicePort,
    kind: FrontendKind | UnsetType,
    node: str,
    zone: str = "",
    *,
    inside: bool = True,
) -> Choice:
    """What the node `node`, in `zone` ("" for none), uses for frontends of `kind`. `inside`: for
    flows that begin on the node itself, in a pod or in a process; else for those that reach it
    from elsewhere."""
    if _is_local(port, kind, inside):
        own = _usable([backend for backend in port.backends if backend.node == node])
        return Choice(own, "Drop" if port.backends else "Reject")
    return Choice(_near(_usable(port.backends), node, zone), "Reject")


def healthy(ports: Iterable[ServicePort], node: str) -> frozenset[str]:
    """What `health_check_port` tells of: the addresses of the node's own ready backends, over all
    `ports` of one Service. The answer is 200 if there are any, else 503."""
    return frozenset(
        backend.address
        for port in ports
        for backend in port.backends
        if backend.node == node and backend.state is UNSET
    )


def _is_local(port: ServicePort, kind: FrontendKind | UnsetType, inside: bool) -> bool:
    """An outer address asked from inside the cluster always has Cluster's meaning."""
    if kind is UNSET:
        return port.internal == "Local"
    return port.external == "Local" and not inside


def _usable(backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """The ready ones; where nothing is ready, those that end and still serve."""
    ready = tuple(backend for backend in backends if backend.state is UNSET)
    return ready or tuple(backends)


def _near(backends: tuple[Backend, ...], node: str, zone: str) -> tuple[Backend, ...]:
    """As the hints have it: those for the node, else those for its zone. A hint that not every
    ready backend has, or that none has for here, counts for nothing; nor do hints of backends
    that end, so all of those are used."""
    if not backends or backends[0].state is not UNSET:
        return backends
    for hints, here in (
        ([backend.nodes for backend in backends], node),
        ([backend.zones for backend in backends], zone),
    ):
        near = tuple(
            backend
            for backend, hint in zip(backends, hints, strict=True)
            if hint is not UNSET and here in hint
        )
        if near and UNSET not in hints:
            return near
    return backends
