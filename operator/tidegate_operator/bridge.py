"""Peer sets between an old state and a new one, in which numbers differ. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
from tidegate_api.state import PeerSet


def with_fresh(item: PeerSet, fresh: Mapping[int, Collection[int]]) -> PeerSet:
    """Knows each fresh number where it knows those in whose place that comes (fresh -> old), at
    named ports too."""

    def grown(numbers: list[int]) -> list[int]:
        known = set(numbers)
        return sorted(known | {new for new, olds in fresh.items() if known.issuperset(olds)})

    members = grown(item.identities)
    if members == item.identities:
        return item
    ports = [
        msgspec.structs.replace(port, identities=grown(port.identities)) for port in item.ports
    ]
    return msgspec.structs.replace(item, identities=members, ports=ports)


def with_stay(now: PeerSet, before: PeerSet, stay: set[int]) -> PeerSet:
    """`now`, with those members of before that `stay`, at the named ports that they had."""
    ports = {(port.protocol, port.port): port for port in now.ports}
    for port in before.ports:
        left = stay.intersection(port.identities)
        if left:
            held = ports.get((port.protocol, port.port))
            numbers = left.union(held.identities) if held is not None else left
            made = msgspec.structs.replace(port, identities=sorted(numbers))
            ports[port.protocol, port.port] = made
    return msgspec.structs.replace(
        now,
        identities=sorted(stay.union(now.identities)),
        ports=[port for _, port in sorted(ports.items())],
    )
