"""Peer sets: who a peer selector picks now."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

from tidegate_api.state import NamedPort, PeerSet, Reserved, digest

from tidegate_operator.objects import (
    PROTOCOLS,
    EntityPeer,
    IdentityKey,
    IdentityPeer,
    NamedPortPeer,
    Node,
    NodePeer,
    Picked,
    PodPeer,
    Protocol,
    UserIdentity,
)
from tidegate_operator.relevance import port_label

NAME_CACHE = 65_536
NOBODY: Mapping[str, UserIdentity] = MappingProxyType({})
NO_NODES: Mapping[str, Node] = MappingProxyType({})

CONSTANT: Mapping[str, tuple[Reserved, ...]] = {
    "world": (Reserved.WORLD,),
    "cluster": (Reserved.HOST, Reserved.KUBE_APISERVER, Reserved.REMOTE_NODE),
}
"""Members of an entity's set that no object stands for."""


@lru_cache(maxsize=NAME_CACHE)
def set_name(peer: Picked) -> str:
    """Content name of the set: equal selectors have equal names."""
    return digest(peer)


def describe(peer: Picked) -> str:
    match peer:
        case PodPeer(namespace=None):
            return f"pods {peer.pods} in namespaces {peer.namespaces}"
        case PodPeer():
            return f"pods {peer.pods} in namespace {peer.namespace}"
        case EntityPeer():
            return f"entity {peer.entity}"
        case NodePeer():
            return f"nodes {peer.nodes}"
        case IdentityPeer():
            return f"identity {peer.identity}"
        case NamedPortPeer():
            port = f"{peer.protocol} port" if peer.protocol else "port"
            return f"{describe(peer.peer)} with {port} {peer.port}"


class _Set:
    __slots__ = ("addresses", "members", "peer", "published")

    def __init__(self, peer: Picked, members: set[int]) -> None:
        self.peer = peer
        self.members = members
        self.addresses: list[str] = []
        self.published: PeerSet | None = None


class PeerSets:
    """The members of every peer selector in use, by set name. An update costs what changed times
    the selectors; a selector that is new costs the identities it may pick."""

    def __init__(self) -> None:
        self.version = 0
        """Changes with the members of any set, and with which sets there are."""
        self.emptied = 0
        """Changes with which sets there are, and which of them are empty."""
        self._sets: dict[str, _Set] = {}
        self._live: Mapping[IdentityKey, int] = {}
        self._keys: dict[int, IdentityKey] = {}
        self._labels: dict[IdentityKey, dict[str, str]] = {}
        self._by_namespace: dict[str, dict[IdentityKey, int]] = {}
        self._namespaces: Mapping[str, dict[str, str]] = {}
        self._made: Mapping[str, UserIdentity] = NOBODY
        self._nodes: Mapping[str, Node] = NO_NODES

    def update(
        self,
        used: Mapping[str, Picked],
        live: Mapping[IdentityKey, int],
        namespaces: Mapping[str, dict[str, str]],
        made: Mapping[str, UserIdentity] = NOBODY,
        nodes: Mapping[str, Node] = NO_NODES,
    ) -> None:
        """Make the sets those of `used`; `live` are the identities that exist, `made` those of
        users by name."""
        gone, new = _differing(self._live, live)
        for key, number in gone:
            del self._by_namespace[key.namespace][key]
            del self._labels[key]
            del self._keys[number]
        for key, number in new:
            self._by_namespace.setdefault(key.namespace, {})[key] = number
            self._labels[key] = dict(key.labels)
            self._keys[number] = key
        moved = set(new)
        for name, labels in namespaces.items():
            if self._namespaces.get(name) != labels:
                moved.update(self._by_namespace.get(name, {}).items())
        renamed = made is not self._made and made != self._made
        self._live, self._namespaces, self._made = live, namespaces, made
        for name in self._sets.keys() - used.keys():
            del self._sets[name]
            self.version += 1
            self.emptied += 1
        if gone or moved:
            for held in self._sets.values():
                self._change(held, gone, moved)
        if renamed:
            for held in self._sets.values():
                if isinstance(held.peer, IdentityPeer):
                    self._change(held, set(), set(live.items()))
        for name, peer in used.items():
            if name not in self._sets:
                self._sets[name] = _Set(peer, self._pick(peer))
                self.version += 1
                self.emptied += 1
                self._address(self._sets[name], nodes)
        if nodes is not self._nodes and nodes != self._nodes:
            for held in self._sets.values():
                self._address(held, nodes)
        self._nodes = nodes

    def _change(
        self,
        held: _Set,
        gone: set[tuple[IdentityKey, int]],
        moved: set[tuple[IdentityKey, int]],
    ) -> None:
        was_empty = not held.members
        dropped = {number for _, number in gone} & held.members
        held.members -= dropped
        changed = bool(dropped)
        for key, number in moved:
            if self._picks(held.peer, key) != (number in held.members):
                held.members ^= {number}
                changed = True
        if changed:
            held.published = None
            self.version += 1
            self.emptied += was_empty != (not held.members)

    def _address(self, held: _Set, nodes: Mapping[str, Node]) -> None:
        if not isinstance(held.peer, NodePeer):
            return
        picked = [node for node in nodes.values() if held.peer.nodes.matches(node.labels)]
        addresses = sorted({_host(text) for node in picked for text in node.addresses})
        if addresses != held.addresses:
            held.addresses, held.published = addresses, None
            self.version += 1
            self.emptied += 1

    def _pick(self, peer: Picked) -> set[int]:
        pods = peer.peer if isinstance(peer, NamedPortPeer) else peer
        if isinstance(pods, PodPeer) and pods.namespace is not None:
            candidates = [self._by_namespace.get(pods.namespace, {})]
        else:
            candidates = list(self._by_namespace.values())
        return {
            number for keys in candidates for key, number in keys.items() if self._picks(peer, key)
        }

    def _picks(self, peer: Picked, key: IdentityKey) -> bool:
        match peer:
            case PodPeer():
                return self._picks_pod(peer, key)
            case NamedPortPeer():
                labels = self._labels[key]
                return self._picks_pod(peer.peer, key) and any(
                    port_label(protocol, peer.port) in labels for protocol in _protocols(peer)
                )
            case IdentityPeer():
                made = self._made.get(peer.identity)
                return made is not None and made.key == key
            case EntityPeer():
                return bool(key.cidrs) == (peer.entity == "world")
            case NodePeer():
                return False

    def _picks_pod(self, peer: PodPeer, key: IdentityKey) -> bool:
        if key.cidrs:  # hosts outside are no pods, whatever a selector says
            return False
        if peer.namespaces is None:
            if peer.namespace != key.namespace:
                return False
        elif not peer.namespaces.matches(self._namespaces[key.namespace]):
            return False
        return peer.pods.matches(self._labels[key])

    def is_empty(self, name: str) -> bool:
        held = self._sets[name]
        return not (held.members or held.addresses or isinstance(held.peer, EntityPeer))

    def published(self, name: str) -> PeerSet:
        held = self._sets[name]
        if held.published is None:
            members = set(held.members)
            if isinstance(held.peer, EntityPeer):
                members.update(map(int, CONSTANT[held.peer.entity]))
            held.published = PeerSet(
                name=name,
                selector=describe(held.peer),
                identities=sorted(members),
                cidrs=held.addresses,
                ports=self._ports(held),
            )
        return held.published

    def _ports(self, held: _Set) -> list[NamedPort]:
        if not isinstance(held.peer, NamedPortPeer):
            return []
        found: dict[tuple[Protocol, int], list[int]] = {}
        for number in sorted(held.members):
            labels = self._labels[self._keys[number]]
            for protocol in _protocols(held.peer):
                port = labels.get(port_label(protocol, held.peer.port))
                if port is not None:
                    found.setdefault((protocol, int(port)), []).append(number)
        return [
            NamedPort(protocol=protocol, port=port, identities=numbers)
            for (protocol, port), numbers in sorted(found.items())
        ]


def _protocols(peer: NamedPortPeer) -> Iterable[Protocol]:
    return PROTOCOLS if peer.protocol is None else (peer.protocol,)


def _host(address: str) -> str:
    return str(ipaddress.ip_network(address))


_Items = set[tuple[IdentityKey, int]]


def _differing(
    before: Mapping[IdentityKey, int], now: Mapping[IdentityKey, int]
) -> tuple[_Items, _Items]:
    """(gone, new)"""
    if before is now:
        return set(), set()
    gone = {(key, number) for key, number in before.items() if now.get(key) != number}
    return gone, {(key, number) for key, number in now.items() if before.get(key) != number}
