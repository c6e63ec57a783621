"""From services as the table has them to frontends as this node serves them. Pure.

A frontend that asks for nothing but its backends is a plain tuple of them, because there are
ten thousand; what asks for more is a `Special`. May not live here: ids, slots and bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
from msgspec import UNSET
from tidegate_api.choice import choose
from tidegate_api.service import EVERY_NODE, Frontend
from tidegate_api.state import Backend, Endpoint, NodeState, ServicePort, StateSlice

from tidegate_loader import addresses
from tidegate_loader.rules import PROTOCOLS

AFFINITY, RANGES, OUTSIDE, LOCAL = 0x01, 0x02, 0x04, 0x08
INTERNAL_LOCAL, TWO, RING, HEADER = 0x10, 0x20, 0x40, 0x80
"""enum tg_frontend_flags."""
MAX_BACKENDS = 0xFFFF
"""Backends of one frontend: tg_frontend.count has 16 bits."""

FrontendKey = tuple[bytes, int, int]
"""(16 address bytes, port, protocol number)."""
BackendAddress = tuple[bytes, int]
"""(16 address bytes, port)."""
BackendKey = tuple[bytes, int, int]
"""(16 address bytes, port, protocol number)."""
RangeKey = tuple[int, int, bytes]
"""(service number, bits of 128, 16 address bytes)."""


class Special(msgspec.Struct, frozen=True):
    """A frontend that asks for more than one of its backends."""

    flags: int
    number: int
    """Of the service port: whose affinity, whose source ranges."""
    affinity: int
    """Seconds."""
    elsewhere: bool
    """Some node has a backend: a flow that finds none here is dropped, not refused."""
    inside: tuple[BackendAddress, ...]
    """Sorted; so is `outside`."""
    outside: tuple[BackendAddress, ...]
    """With TWO: what clients from outside get."""


Wanted = tuple[BackendAddress, ...] | Special
ServicePart = dict[FrontendKey, Wanted]


class SharedPart(msgspec.Struct, frozen=True):
    """One shard of the table, as this node serves it."""

    part: ServicePart
    names: dict[str, str]
    """Frontend text -> what a person calls the service port."""
    addresses: frozenset[bytes]
    outer: bool
    ranges: frozenset[RangeKey]
    draining: frozenset[BackendKey]
    """Listed, and used by no frontend here: what has flows to them keeps them."""
    problems: tuple[str, ...]


class Services(msgspec.Struct, frozen=True):
    """All of them. Parts have disjoint keys."""

    parts: tuple[ServicePart, ...]
    names: dict[str, str]
    addresses: frozenset[bytes]
    ranges: frozenset[RangeKey]
    draining: tuple[frozenset[BackendKey], ...]
    outer: bool
    """Some frontend is for clients outside the node."""
    problems: tuple[str, ...]


class Place(msgspec.Struct, frozen=True):
    """What of a node its services depend on."""

    node: str
    zone: str
    addresses: tuple[str, ...]
    """Those that answer for NodePorts."""


def place_of(node: NodeState) -> Place:
    spec = node.spec
    own = spec.node_port_addresses
    return Place(node.metadata.name, spec.zone or "", tuple(own) if own is not UNSET else ())


def backends_of(wanted: Wanted) -> Iterable[BackendAddress]:
    """All that a frontend leads to."""
    return (*wanted.inside, *wanted.outside) if isinstance(wanted, Special) else wanted


def frontend_text(key: FrontendKey) -> str:
    """10.96.0.1:80/TCP, [fd00::1]:80/TCP."""
    address, port, number = key
    text = addresses.text(address)
    host = text if addresses.is_v4(address) else f"[{text}]"
    return f"{host}:{port}/{next(n for n, v in PROTOCOLS.items() if v == number)}"


def number_of(port: ServicePort, frontend: Frontend) -> int:
    """The same on every node, at any time: of whose affinity and ranges it is."""
    family = "6" if ":" in frontend.address else "4"
    name = (port.namespace, port.name, frontend.port_name, frontend.protocol, family)
    return int.from_bytes(hashlib.sha256("\0".join(name).encode()).digest()[:4], "big") or 1


def shard(item: StateSlice, place: Place) -> SharedPart:
    """ValueError: an address is none."""
    made = _Shard(place)
    ports: list[ServicePort] = item.spec.services or []
    for port in ports:
        made.add(port)
    return made.done()


class _Shard:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._part: ServicePart = {}
        self._names: dict[str, str] = {}
        self._ranges: set[RangeKey] = set()
        self._draining: set[BackendKey] = set()
        self._used: set[BackendKey] = set()
        self._problems: list[str] = []

    def add(self, port: ServicePort) -> None:
        plain: dict[bool, tuple[BackendAddress, ...]] = {}
        used: set[BackendAddress] = set()
        protocols = set()
        for frontend in port.frontends:
            protocols.add(PROTOCOLS[frontend.protocol])
            for text in self._addresses(frontend):
                address = addresses.pack(text)
                wanted: Wanted | None
                v4 = addresses.is_v4(address)
                if frontend.kind is UNSET and port.affinity is UNSET and port.internal is UNSET:
                    wanted = plain.get(v4)
                    if wanted is None:
                        found = choose(port, UNSET, self._place.node, self._place.zone)
                        wanted = plain[v4] = self._pack(port, found.backends, v4)
                else:
                    wanted = self._special(port, frontend, v4)
                self._place_one(port, frontend, address, wanted)
                used.update(backends_of(wanted))
        if len(used) < len(port.backends):
            rest = {(addresses.pack(b.address), b.port) for b in port.backends} - used
            self._draining.update((*b, protocol) for b in rest for protocol in protocols)

    def _addresses(self, frontend: Frontend) -> tuple[str, ...]:
        if frontend.kind != "NodePort" or frontend.address not in EVERY_NODE:
            return (frontend.address,)
        six = ":" in frontend.address
        return tuple(text for text in self._place.addresses if (":" in text) == six)

    def _pack(
        self, port: ServicePort, chosen: Iterable[Backend], v4: bool
    ) -> tuple[BackendAddress, ...]:
        packed = [(addresses.pack(b.address), b.port) for b in chosen]
        if len(packed) > MAX_BACKENDS:
            self._problems.append(f"{port.namespace}/{port.name}: only {MAX_BACKENDS} backends fit")
        return tuple(b for b in packed if addresses.is_v4(b[0]) == v4)[:MAX_BACKENDS]

    def _special(self, port: ServicePort, frontend: Frontend, v4: bool) -> Special:
        outer = frontend.kind is not UNSET
        number = number_of(port, frontend)
        here = (self._place.node, self._place.zone)
        inside = self._pack(port, choose(port, frontend.kind, *here).backends, v4)
        outside: tuple[BackendAddress, ...] = ()
        flags = HEADER | (OUTSIDE if outer else 0)
        if port.affinity is not UNSET:
            flags |= AFFINITY
        if not outer and port.internal is not UNSET:
            flags |= INTERNAL_LOCAL
        if outer and port.external is not UNSET:
            flags |= LOCAL | TWO
            found = choose(port, frontend.kind, *here, inside=False)
            outside = self._pack(port, found.backends, v4)
        if frontend.kind == "LoadBalancer" and port.source_ranges is not UNSET:
            flags |= RANGES
            for cidr in port.source_ranges:
                self._ranges.add((number, *addresses.parse_prefix(cidr)))
        return Special(
            flags=flags,
            number=number,
            affinity=0 if port.affinity is UNSET else port.affinity,
            elsewhere=bool(port.backends),
            inside=tuple(sorted(inside)),
            outside=tuple(sorted(outside)),
        )

    def _place_one(
        self, port: ServicePort, frontend: Frontend, address: bytes, wanted: Wanted
    ) -> None:
        key = (address, frontend.port, PROTOCOLS[frontend.protocol])
        if key in self._part:
            self._problems.append(f"{port.namespace}/{port.name}: {frontend_text(key)} is taken")
            return
        self._part[key] = wanted
        suffix = f":{frontend.port_name}" if frontend.port_name else ""
        self._names[frontend_text(key)] = f"{port.namespace}/{port.name}{suffix}"

    def done(self) -> SharedPart:
        return SharedPart(
            self._part,
            self._names,
            frozenset(key[0] for key in self._part),
            any(isinstance(w, Special) and w.flags & OUTSIDE for w in self._part.values()),
            frozenset(self._ranges),
            frozenset(self._draining),
            tuple(self._problems),
        )


def host_ports(endpoints: Iterable[Endpoint], place: Place) -> SharedPart:
    """Ports of the node that lead to its own pods, as one more part. ValueError."""
    part: ServicePart = {}
    names: dict[str, str] = {}
    problems: list[str] = []
    for endpoint in endpoints:
        for port in endpoint.host_ports or ():
            for text in place.addresses if port.address is UNSET else (port.address,):
                address = addresses.pack(text)
                v4 = addresses.is_v4(address)
                packed = [addresses.pack(a) for a in endpoint.addresses]
                backends = tuple((a, port.target) for a in packed if addresses.is_v4(a) == v4)[:1]
                key = (address, port.port, PROTOCOLS[port.protocol])
                who = f"{endpoint.namespace}/{endpoint.name}"
                if key in part:
                    problems.append(f"pod {who}: host port {frontend_text(key)} is taken")
                    continue
                part[key] = Special(OUTSIDE | HEADER, 0, 0, False, backends, ())
                names[frontend_text(key)] = f"{who} (host port)"
    return SharedPart(
        part,
        names,
        frozenset(key[0] for key in part),
        bool(part),
        frozenset(),
        frozenset(),
        tuple(problems),
    )


def merge(shards: tuple[SharedPart, ...]) -> Services:
    """Of two services that claim one frontend, the one in the lower shard has it."""
    parts: list[ServicePart] = []
    names: dict[str, str] = {}
    problems = [p for found in shards for p in found.problems]
    taken: set[FrontendKey] = set()
    for found in shards:
        part = found.part
        if not taken.isdisjoint(part):
            for key in sorted(taken & part.keys()):
                problems.append(f"{found.names[frontend_text(key)]}: {frontend_text(key)} is taken")
            part = {k: v for k, v in part.items() if k not in taken}
        taken |= part.keys()
        parts.append(part)
    for found in reversed(shards):
        names.update(found.names)
    return Services(
        tuple(parts),
        names,
        frozenset[bytes]().union(*(s.addresses for s in shards)),
        frozenset[RangeKey]().union(*(s.ranges for s in shards)),
        tuple(s.draining for s in shards),
        any(s.outer for s in shards),
        tuple(problems),
    )
