"""What the kernel's maps should hold: a pure function of (state, interfaces).

Symbolic: endpoints by UID, rule sets by name, backends by address. Ids, slots
and file descriptors are `plan`'s, bytes are `kernel`'s. May not live here: any
I/O, clock, ctypes, tidegate_bpf, or a memory that changes a result: `Builder`
remembers parts only to return the same object for the same input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import compress

import msgspec
from msgspec import UNSET
from tidegate_api.state import (
    FIRST_IDENTITY,
    Endpoint,
    IPCacheEntry,
    NodeState,
    PeerSet,
    Reserved,
    RuleSet,
    SetPeer,
    StateSlice,
)

from tidegate_loader import addresses, rules, services
from tidegate_loader.addresses import MAPPED, MAPPED_BITS, ZERO, Prefix
from tidegate_loader.local import LocalInterface
from tidegate_loader.rules import Expanded, RuleSetError
from tidegate_loader.services import (
    BackendKey,
    Health,
    Place,
    RangeKey,
    ServicePart,
    Services,
    SharedPart,
)

LOCAL, FRONTEND, PEER = 0x01000000, 0x02000000, 0x04000000
NODE, OWN = 0x08000000, 0x10000000
"""Flags above an ipcache entry's identity; enum tg_ipcache_flags."""
IDENTITY_MASK = 0x00FFFFFF
Part = dict[bytes, int]


class MapsError(Exception):
    """The state is readable and makes no sense; what is in force stays."""


class State(msgspec.Struct, frozen=True):
    """One complete node state: everything the node's NodeState names."""

    node: NodeState
    digest: str
    rule_sets: dict[str, RuleSet]
    peers: dict[str, PeerSet]
    ipcache: tuple[StateSlice, ...]
    """By shard number; so is `services`."""
    services: tuple[StateSlice, ...]


class DesiredEndpoint(msgspec.Struct, frozen=True):
    uid: str
    namespace: str
    name: str
    identity: int
    ifindex: int
    pod_mac: bytes
    host_mac: bytes
    ip4: bytes
    """16 bytes, mapped; all zero: none."""
    ip6: bytes
    ingress: str | None
    """Name of its rule set; None: no policy selects it."""
    egress: str | None


class DesiredMaps(msgspec.Struct, frozen=True):
    """Parts have disjoint keys, and are the same objects as in the last result
    of the same `Builder` where nothing in them changed."""

    endpoints: tuple[DesiredEndpoint, ...]
    rule_sets: dict[str, Expanded]
    ipcache: tuple[Part, ...]
    """16 address bytes -> identity | flags."""
    networks: dict[Prefix, int]
    services: tuple[ServicePart, ...]
    draining: tuple[frozenset[BackendKey], ...]
    """Backends that no frontend here uses, and that keep the flows they have."""
    ranges: frozenset[RangeKey]
    node_addresses: frozenset[bytes]
    """Every address of the node itself."""
    node_source: tuple[bytes, bytes]
    """As whom the node sends on, IPv4 and IPv6; ZERO: not at all."""
    masquerade: dict[Prefix, int]
    """Where to pods' packets go with the node's address (1) or their own (0); empty: all go with
    their own."""
    outer: bool
    """Some frontend is for clients outside the node, or pods' packets are masqueraded: the node
    needs its uplinks."""
    health: dict[int, Health]
    """Health check port -> what it says."""
    service_names: dict[str, str]
    """Frontend text -> what a person calls the service port."""
    pending: tuple[str, ...]
    """Pods of this node whose interface is not known yet."""
    problems: tuple[str, ...]


def build(state: State, interfaces: Mapping[str, LocalInterface]) -> DesiredMaps:
    """The desired maps from scratch. MapsError, RuleSetError: refused whole."""
    return Builder().build(state, interfaces)


def same_parts(parts: tuple[object, ...], known: tuple[object, ...] | None) -> bool:
    """The very same objects, in order."""
    return known is not None and len(parts) == len(known) and all(map(operator.is_, parts, known))


_Served = tuple[tuple[StateSlice | None, ...], dict[int, SharedPart], Place | None]
"""The shards of services that were read last, what was made of each, and for which node."""


class _HostPart(msgspec.Struct, frozen=True):
    """One ipcache shard without the flags that come from elsewhere."""

    hosts: Part
    networks: dict[Prefix, int]


class _FlaggedPart(msgspec.Struct, frozen=True):
    """One ipcache shard as the map holds it."""

    source: _HostPart
    known: frozenset[bytes]
    """Its addresses that have flags."""
    part: Part


class Uplinks(msgspec.Struct, frozen=True):
    """What the node's own interfaces say."""

    addresses: frozenset[bytes] = frozenset()
    """Every address of the node, 16 bytes; loopback's and link-local ones are not among them."""
    source: tuple[bytes, bytes] = (ZERO, ZERO)
    """One that the uplink has, IPv4 and IPv6."""


class Builder:
    """`build` with a memory of parts. The result never depends on it."""

    def __init__(self) -> None:
        self._expanded: dict[str, tuple[RuleSet, tuple[PeerSet, ...], Expanded]] = {}
        self._hosts: dict[int, tuple[StateSlice, _HostPart]] = {}
        self._services: _Served = ((), {}, None)
        self._host_ports: SharedPart | None = None
        self._merged: tuple[tuple[SharedPart, ...], Services] | None = None
        self._own = ""
        self._parts: dict[int, _FlaggedPart] = {}
        self._known: tuple[frozenset[bytes], ...] = ()
        self._extra_networks: dict[Prefix, int] | None = None
        self._flagged: tuple[object, dict[bytes, int]] = (None, {})
        """What flags were made of, and they."""
        self._flags: dict[bytes, int] = {}
        self._extra: Part = {}
        self._networks: tuple[tuple[_HostPart, ...], dict[Prefix, int]] = ((), {})

    def build(
        self,
        state: State,
        interfaces: Mapping[str, LocalInterface],
        uplinks: Uplinks = Uplinks(),  # noqa: B008 - frozen
    ) -> DesiredMaps:
        endpoints, pending, problems = _endpoints(state.node.spec.endpoints, interfaces)
        place = services.place_of(state.node)
        served = self._service_parts(state, place)
        hosts = self._host_parts(state.ipcache, state.node.metadata.name)
        networks = self._merge_networks(hosts)
        flags = self._flags_of(served.addresses, endpoints)
        source = _source(place, uplinks)
        masquerade = _masquerade(state.node, source)
        return DesiredMaps(
            endpoints=endpoints,
            rule_sets=self._rule_sets(state, endpoints),
            ipcache=self._ipcache(hosts, flags, networks),
            networks=networks,
            services=served.parts,
            draining=served.draining,
            ranges=served.ranges,
            node_addresses=uplinks.addresses,
            node_source=source,
            masquerade=masquerade,
            outer=served.outer or bool(masquerade),
            health=served.health,
            service_names=served.names,
            pending=pending,
            problems=(*problems, *served.problems),
        )

    def _flags_of(
        self, frontends: frozenset[bytes], endpoints: tuple[DesiredEndpoint, ...]
    ) -> dict[bytes, int]:
        """Of addresses that are a frontend's or a pod's of this node."""
        made_of = (frontends, endpoints)
        if made_of != self._flagged[0]:
            flags = dict.fromkeys(frontends, FRONTEND)
            for endpoint in endpoints:
                for address in (endpoint.ip4, endpoint.ip6):
                    if address != ZERO:
                        flags[address] = flags.get(address, 0) | LOCAL
            self._flagged = (made_of, flags)
        return self._flagged[1]

    def _rule_sets(self, state: State, endpoints: Iterable[DesiredEndpoint]) -> dict[str, Expanded]:
        names = {n for e in endpoints for n in (e.ingress, e.egress) if n is not None}
        kept: dict[str, tuple[RuleSet, tuple[PeerSet, ...], Expanded]] = {}
        for name in sorted(names):
            rule_set = state.rule_sets[name]
            peers = tuple(state.peers[n] for n in set_names(rule_set))
            held = self._expanded.get(name)
            if held is None or held[0] != rule_set or held[1] != peers:
                held = (rule_set, peers, rules.expand(rule_set, state.peers))
            kept[name] = held
        self._expanded = kept
        return {name: held[2] for name, held in kept.items()}

    def _host_parts(self, slices: tuple[StateSlice, ...], own: str) -> tuple[_HostPart, ...]:
        if own != self._own:
            self._own, self._hosts = own, {}
        kept = {}
        for shard, item in enumerate(slices):
            held = self._hosts.get(shard)
            kept[shard] = held if held and held[0] is item else (item, _host_part(item, own))
        self._hosts = kept
        return tuple(held[1] for held in kept.values())

    def _merge_networks(self, hosts: tuple[_HostPart, ...]) -> dict[Prefix, int]:
        if not same_parts(hosts, self._networks[0]):
            merged: dict[Prefix, int] = {}
            for part in hosts:
                merged.update(part.networks)
            merged = _with_mapped_root(merged)
            self._networks = (hosts, self._networks[1] if merged == self._networks[1] else merged)
        return self._networks[1]

    def _ipcache(
        self,
        hosts: tuple[_HostPart, ...],
        flags: dict[bytes, int],
        networks: dict[Prefix, int],
    ) -> tuple[Part, ...]:
        """Each shard with the flags of its addresses, and frontends nobody else has."""
        same = flags is self._flags or flags == self._flags
        moved = set() if same else {address for address, _ in flags.items() ^ self._flags.items()}
        kept: dict[int, _FlaggedPart] = {}
        for shard, part in enumerate(hosts):
            held = self._parts.get(shard)
            if held is None or held.source is not part or not part.hosts.keys().isdisjoint(moved):
                held = _flagged(part, flags)
            kept[shard] = held
        known = tuple(held.known for held in kept.values())
        if not (same and known == self._known and networks is self._extra_networks):
            taken: frozenset[bytes] = frozenset().union(*known)
            extra = {
                address: lookup_network(networks, address) | flag
                for address, flag in flags.items()
                if flag & FRONTEND and address not in taken
            }
            if extra != self._extra:
                self._extra = extra
        self._parts, self._flags, self._known = kept, flags, known
        self._extra_networks = networks
        return (*(held.part for held in kept.values()), self._extra)

    def _service_parts(self, state: State, place: Place) -> Services:
        slices, known, where = self._services
        if where != place or len(slices) != len(state.services):
            slices, known = (None,) * len(state.services), {}
        parts = known.copy()
        fresh = map(operator.is_not, state.services, slices)
        for shard, item in compress(enumerate(state.services), fresh):
            try:
                parts[shard] = services.shard(item, place, parts.get(shard))
            except ValueError as error:
                raise MapsError(f"{item.metadata.name}: {error}") from error
        self._services = (state.services, parts, place)
        try:
            ports = services.host_ports(state.node.spec.endpoints, place)
        except ValueError as error:
            raise MapsError(f"host ports: {error}") from error
        if self._host_ports is None or ports != self._host_ports:
            self._host_ports = ports
        shards = (*parts.values(), self._host_ports)
        merged = self._merged
        if merged is None or not same_parts(shards, merged[0]):
            merged = (shards, services.merge(shards, merged))
            self._merged = merged
        return merged[1]


def set_names(rule_set: RuleSet) -> list[str]:
    """The peer sets a rule set names, sorted."""
    return sorted({t.peer.name for t in rule_set.spec.terms if isinstance(t.peer, SetPeer)})


# ---- endpoints -------------------------------------------------------------------


def _mac(text: str) -> bytes:
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise MapsError(f"not a hardware address: {text!r}")
    return mac


def _endpoints(
    endpoints: Iterable[Endpoint], interfaces: Mapping[str, LocalInterface]
) -> tuple[tuple[DesiredEndpoint, ...], tuple[str, ...], list[str]]:
    """(those with an interface, UIDs of those without, problems); of two that
    claim one interface or address, the lower UID has it."""
    found: list[DesiredEndpoint] = []
    pending: list[str] = []
    problems: list[str] = []
    claimed: set[int | bytes] = set()
    for endpoint in sorted(endpoints, key=lambda e: e.uid):
        interface = interfaces.get(endpoint.uid)
        if interface is None:
            pending.append(endpoint.uid)
            continue
        made = _endpoint(endpoint, interface)
        keys: set[int | bytes] = {made.ifindex, made.ip4, made.ip6}
        keys.discard(ZERO)
        if claimed & keys:
            who = f"{endpoint.namespace}/{endpoint.name}"
            problems.append(f"endpoint {who} claims an interface or address of another")
            pending.append(endpoint.uid)
            continue
        claimed |= keys
        found.append(made)
    return tuple(found), tuple(pending), problems


def _endpoint(endpoint: Endpoint, interface: LocalInterface) -> DesiredEndpoint:
    """Its first address of each family: the datapath knows one of each."""
    try:
        packed = [addresses.pack(a) for a in interface.addresses or endpoint.addresses]
    except ValueError as error:
        raise MapsError(f"endpoint {endpoint.namespace}/{endpoint.name}: {error}") from error
    return DesiredEndpoint(
        uid=endpoint.uid,
        namespace=endpoint.namespace,
        name=endpoint.name,
        identity=endpoint.identity,
        ifindex=interface.ifindex,
        pod_mac=_mac(interface.pod_mac),
        host_mac=_mac(interface.host_mac),
        ip4=next((a for a in packed if addresses.is_v4(a)), ZERO),
        ip6=next((a for a in packed if not addresses.is_v4(a)), ZERO),
        ingress=None if endpoint.ingress is UNSET else endpoint.ingress,
        egress=None if endpoint.egress is UNSET else endpoint.egress,
    )


# ---- ipcache ---------------------------------------------------------------------


def _host_part(item: StateSlice, own: str) -> _HostPart:
    entries: list[IPCacheEntry] = item.spec.ipcache or []
    cidrs = [e.cidr for e in entries]
    hosts4 = entries
    if not addresses.all_hosts4(cidrs):
        hosts4 = [e for e in entries if e.cidr.endswith("/32") and ":" not in e.cidr]
        cidrs = [e.cidr for e in hosts4]
    networks: dict[Prefix, int] = {}
    try:
        keys = addresses.pack_hosts4(cidrs)
        # As `_host_word`, without a call for each of a hundred thousand.
        words = [
            (i | PEER if e.node is not UNSET else i) if i >= FIRST_IDENTITY else _host_word(e, own)
            for e in hosts4
            for i in (e.identity,)
        ]
        hosts: Part = dict(zip(keys, words, strict=True))
        if len(hosts4) < len(entries):
            seen = set(map(id, hosts4))
            for entry in entries:
                if id(entry) in seen:
                    continue
                if entry.cidr.endswith("/128"):
                    hosts[addresses.pack(entry.cidr[:-4])] = _host_word(entry, own)
                else:
                    networks[addresses.parse_prefix(entry.cidr)] = entry.identity
    except ValueError as error:
        raise MapsError(f"{item.metadata.name}: {error}") from error
    return _HostPart(hosts, networks)


def _host_word(entry: IPCacheEntry, own: str) -> int:
    """A pod has a node; node addresses have reserved identities. The rest are
    addresses outside, of user-made identities. `own`: this node's name."""
    identity = entry.identity
    if identity >= FIRST_IDENTITY:
        return identity | PEER if entry.node is not UNSET else identity
    if identity not in (Reserved.REMOTE_NODE, Reserved.KUBE_APISERVER):
        return identity | PEER
    known = entry.node is not UNSET
    node = NODE if known or identity == Reserved.REMOTE_NODE else 0
    return identity | PEER | node | (OWN if known and entry.node == own else 0)


def _flagged(source: _HostPart, flags: dict[bytes, int]) -> _FlaggedPart:
    known = frozenset(flags.keys() & source.hosts.keys())
    part = source.hosts
    if known:
        part = part | {address: part[address] | flags[address] for address in known}
    return _FlaggedPart(source, known, part)


def _with_mapped_root(networks: dict[Prefix, int]) -> dict[Prefix, int]:
    """An IPv6 network that holds ::ffff:0:0/96 as bits must not name IPv4 addresses."""
    root = MAPPED + bytes(4)
    if (MAPPED_BITS, root) in networks:
        return networks
    if any(b < MAPPED_BITS and addresses.mask(root, b) == a for b, a in networks):
        return networks | {(MAPPED_BITS, root): int(Reserved.WORLD)}
    return networks


def lookup_network(networks: Mapping[Prefix, int], address: bytes) -> int:
    """What the datapath finds for an address without an entry of its own."""
    for bits in sorted({b for b, _ in networks}, reverse=True):
        found = networks.get((bits, addresses.mask(address, bits)))
        if found is not None:
            return found
    return int(Reserved.WORLD)


# ---- the node itself ------------------------------------------------------------------


def _source(place: Place, uplinks: Uplinks) -> tuple[bytes, bytes]:
    """Of each family the first that the cluster knows the node by, else what the uplink has."""
    found = list(uplinks.source)
    for text in reversed(place.addresses):
        address = addresses.pack(text)
        if address in uplinks.addresses:
            found[0 if addresses.is_v4(address) else 1] = address
    return found[0], found[1]


NEVER_MASQUERADED = ("169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8")
"""Link-local and multicast: no router carries them past the link."""


def _masquerade(node: NodeState, source: tuple[bytes, bytes]) -> dict[Prefix, int]:
    """Pods and nodes are left out by who they are, not by this. A family of which the node has
    no address is left alone. MapsError."""
    asked = node.spec.masquerade
    if asked is UNSET:
        return {}
    found = {(MAPPED_BITS, MAPPED + bytes(4)): source[0], (0, ZERO): source[1]}
    prefixes = {prefix: int(address != ZERO) for prefix, address in found.items()}
    try:
        for text in (*NEVER_MASQUERADED, *asked.excludes):
            prefixes[addresses.parse_prefix(text)] = 0
    except ValueError as error:
        raise MapsError(f"masquerade: {error}") from error
    return prefixes


__all__ = [
    "Builder",
    "DesiredEndpoint",
    "DesiredMaps",
    "MapsError",
    "RuleSetError",
    "State",
    "Uplinks",
    "build",
]
