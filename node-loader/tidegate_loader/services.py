"""From services as the table has them to frontends as this node serves them. Pure.

A frontend that asks for nothing but its backends is a plain tuple of them, because there are
ten thousand; what asks for more is a `Special`. May not live here: ids, slots and bytes.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from functools import lru_cache
from itertools import compress

import msgspec
from msgspec import UNSET
from tidegate_api.choice import Choice, choose, healthy
from tidegate_api.service import EVERY_NODE, Frontend
from tidegate_api.state import Endpoint, NodeState, ServicePort, StateSlice

from tidegate_loader import addresses, maglev
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


class Health(msgspec.Struct, frozen=True):
    """What a health check port says."""

    service: str
    """namespace/name."""
    endpoints: int
    """Ready ones on this node."""


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
    made: dict[Frontend, Made]
    """By the first frontend of each service port."""
    health: dict[int, Health]
    """By health check port."""


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
    health: dict[int, Health]


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


class Made(msgspec.Struct, frozen=True, gc=False):
    """What one service port is here."""

    port: ServicePort
    entries: tuple[tuple[FrontendKey, str, str, Wanted], ...]
    """(frontend, as text, what a person calls it, what it leads to)."""
    ranges: tuple[RangeKey, ...]
    draining: tuple[BackendKey, ...]
    problems: tuple[str, ...]


@lru_cache(maxsize=32)
def ring_of(members: tuple[BackendAddress, ...]) -> tuple[BackendAddress, ...]:
    """Position -> backend; the frontends of a service port have the same."""
    return tuple(maglev.ring(members))


def places(members: int) -> int:
    """Slots that a ring of so many backends takes."""
    return maglev.RING_SIZE if members else 0


def shard(item: StateSlice, place: Place, before: SharedPart | None = None) -> SharedPart:
    """ValueError: an address is none. `before`: of the same place; what is equal in both is
    the same object, and costs nothing but to see that."""
    known = before.made if before is not None else {}
    part: ServicePart = {}
    names: dict[str, str] = {}
    made: dict[Frontend, Made] = {}
    problems: list[str] = []
    asked: dict[tuple[int, str], list[ServicePort]] = {}
    for port in item.spec.services or ():
        if port.health_check_port is not UNSET:
            name = f"{port.namespace}/{port.name}"
            asked.setdefault((port.health_check_port, name), []).append(port)
        if not port.frontends:
            continue
        first = port.frontends[0]
        found = known.get(first)
        if found is None or found.port != port:
            found = _make(port, place)
        made[first] = found
        problems += found.problems
        for key, text, name, wanted in found.entries:
            if key in part:
                problems.append(f"{port.namespace}/{port.name}: {text} is taken")
                continue
            part[key] = wanted
            names[text] = name
    return SharedPart(
        part,
        names,
        frozenset(key[0] for key in part),
        any(isinstance(w, Special) and w.flags & OUTSIDE for w in part.values()),
        frozenset(key for found in made.values() for key in found.ranges),
        frozenset(key for found in made.values() for key in found.draining),
        tuple(problems),
        made,
        {
            number: Health(name, len(healthy(ports, place.node)))
            for (number, name), ports in asked.items()
        },
    )


def _make(port: ServicePort, place: Place) -> Made:
    plain: dict[bool, tuple[BackendAddress, ...]] = {}
    used: set[BackendAddress] = set()
    ranges: list[RangeKey] = []
    entries = []
    problems = []
    if len(port.backends) > MAX_BACKENDS:
        problems.append(f"{port.namespace}/{port.name}: only {MAX_BACKENDS} backends fit")
    for frontend in port.frontends:
        suffix = f":{frontend.port_name}" if frontend.port_name else ""
        name = f"{port.namespace}/{port.name}{suffix}"
        for address in map(addresses.pack, _addresses(frontend, place)):
            key = (address, frontend.port, PROTOCOLS[frontend.protocol])
            v4 = addresses.is_v4(address)
            wanted: Wanted | None
            if frontend.kind is UNSET and _is_plain(port):
                wanted = plain.get(v4)
                if wanted is None:
                    wanted = plain[v4] = _pack(choose(port, UNSET, place.node, place.zone), v4)
            else:
                wanted = _special(port, frontend, place, v4)
            if isinstance(wanted, Special) and wanted.flags & RANGES:
                networks = map(addresses.parse_prefix, port.source_ranges or ())
                ranges += ((wanted.number, *network) for network in networks)
            entries.append((key, frontend_text(key), name, wanted))
            used.update(backends_of(wanted))
    draining: set[BackendKey] = set()
    if len(used) < len(port.backends):
        rest = {(addresses.pack(b.address), b.port) for b in port.backends} - used
        protocols = {PROTOCOLS[f.protocol] for f in port.frontends}
        draining.update((*b, protocol) for b in rest for protocol in protocols)
    return Made(port, tuple(entries), tuple(ranges), tuple(draining), tuple(problems))


def _is_plain(port: ServicePort) -> bool:
    """Its ClusterIPs ask for nothing but its backends."""
    return port.affinity is UNSET and port.internal is UNSET


def _addresses(frontend: Frontend, place: Place) -> tuple[str, ...]:
    if frontend.kind != "NodePort" or frontend.address not in EVERY_NODE:
        return (frontend.address,)
    six = ":" in frontend.address
    return tuple(text for text in place.addresses if (":" in text) == six)


def _pack(chosen: Choice, v4: bool) -> tuple[BackendAddress, ...]:
    packed = [(addresses.pack(b.address), b.port) for b in chosen.backends]
    return tuple(b for b in packed if addresses.is_v4(b[0]) == v4)[:MAX_BACKENDS]


def _special(port: ServicePort, frontend: Frontend, place: Place, v4: bool) -> Special:
    outer = frontend.kind is not UNSET
    inside = _pack(choose(port, frontend.kind, place.node, place.zone), v4)
    outside: tuple[BackendAddress, ...] = ()
    flags = HEADER | (OUTSIDE if outer else 0)
    if port.affinity is not UNSET:
        flags |= AFFINITY
    # Those of the cluster connect sockets, which have no address yet to be hashed.
    if outer and port.algorithm is not UNSET:
        flags |= RING
    if not outer and port.internal is not UNSET:
        flags |= INTERNAL_LOCAL
    if outer and port.external is not UNSET:
        flags |= LOCAL | TWO
        outside = _pack(choose(port, frontend.kind, place.node, place.zone, inside=False), v4)
    if frontend.kind == "LoadBalancer" and port.source_ranges is not UNSET:
        flags |= RANGES
    return Special(
        flags=flags,
        number=number_of(port, frontend),
        affinity=0 if port.affinity is UNSET else port.affinity,
        elsewhere=bool(port.backends),
        inside=tuple(sorted(inside)),
        outside=tuple(sorted(outside)),
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
        {},
        {},
    )


def _apart(shards: tuple[SharedPart, ...], problems: list[str]) -> list[ServicePart]:
    """Each frontend in one part only."""
    parts: list[ServicePart] = []
    taken: set[FrontendKey] = set()
    for found in shards:
        part = found.part
        if not taken.isdisjoint(part):
            for key in sorted(taken & part.keys()):
                problems.append(f"{found.names[frontend_text(key)]}: {frontend_text(key)} is taken")
            part = {k: v for k, v in part.items() if k not in taken}
        # Not |=, which makes a new set of what is no set: all of it again for each shard.
        taken.update(part)
        parts.append(part)
    return parts


def merge(
    shards: tuple[SharedPart, ...],
    last: tuple[tuple[SharedPart, ...], Services] | None = None,
) -> Services:
    """Of two services that claim one frontend, the one in the lower shard has it. `last`: other
    shards and what was made of them; the result never depends on it."""
    return (_moved(shards, *last) if last is not None else None) or _merged(shards)


def _moved(
    shards: tuple[SharedPart, ...], known: tuple[SharedPart, ...], made: Services
) -> Services | None:
    """While endpoints come and go, frontends stay, and all that is told of them. None: some did
    not, or somebody claims what another has."""
    if len(shards) != len(known):
        return None
    parts, draining = list(made.parts), list(made.draining)
    for at in compress(range(len(shards)), map(operator.is_not, shards, known)):
        new, old = shards[at], known[at]
        if made.parts[at] is not old.part or _told(new) != _told(old):
            return None
        parts[at], draining[at] = new.part, new.draining
    return msgspec.structs.replace(made, parts=tuple(parts), draining=tuple(draining))


def _told(found: SharedPart) -> SharedPart:
    """What of it is merged with what others say: of its frontends all but where they lead."""
    return msgspec.structs.replace(found, part={}, draining=frozenset(), made={})


def _merged(shards: tuple[SharedPart, ...]) -> Services:
    names: dict[str, str] = {}
    parts = [found.part for found in shards]
    problems = [p for found in shards for p in found.problems]
    if len(set[FrontendKey]().union(*parts)) < sum(map(len, parts)):
        parts = _apart(shards, problems)
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
        {port: health for s in shards for port, health in s.health.items()},
    )
