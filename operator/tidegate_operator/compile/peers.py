"""Peer sets: which identities a peer selector picks now."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from tidegate_api.state import PeerSet, digest

from tidegate_operator.objects import IdentityKey, PodPeer

NAME_CACHE = 65_536


@lru_cache(maxsize=NAME_CACHE)
def set_name(peer: PodPeer) -> str:
    """Content name of the set: equal selectors have equal names."""
    return digest(peer)


def describe(peer: PodPeer) -> str:
    if peer.namespaces is None:
        return f"pods {peer.pods} in namespace {peer.namespace}"
    return f"pods {peer.pods} in namespaces {peer.namespaces}"


class _Set:
    __slots__ = ("members", "peer", "published")

    def __init__(self, peer: PodPeer, members: set[int]) -> None:
        self.peer = peer
        self.members = members
        self.published: PeerSet | None = None


class PeerSets:
    """The members of every peer selector in use, by set name. An update costs what changed times
    the selectors; a selector that is new costs the identities it may pick."""

    def __init__(self) -> None:
        self.version = 0
        """Changes with the members of any set, and with which sets there are."""
        self._sets: dict[str, _Set] = {}
        self._live: Mapping[IdentityKey, int] = {}
        self._labels: dict[IdentityKey, dict[str, str]] = {}
        self._by_namespace: dict[str, dict[IdentityKey, int]] = {}
        self._namespaces: Mapping[str, dict[str, str]] = {}

    def update(
        self,
        used: Mapping[str, PodPeer],
        live: Mapping[IdentityKey, int],
        namespaces: Mapping[str, dict[str, str]],
    ) -> None:
        """Make the sets those of `used`; `live` are the identities that exist."""
        gone = self._live.items() - live.items() if live is not self._live else set()
        new = live.items() - self._live.items() if live is not self._live else set()
        for key, _ in gone:
            del self._by_namespace[key.namespace][key]
            del self._labels[key]
        for key, number in new:
            self._by_namespace.setdefault(key.namespace, {})[key] = number
            self._labels[key] = dict(key.labels)
        moved = set(new)
        for name, labels in namespaces.items():
            if self._namespaces.get(name) != labels:
                moved.update(self._by_namespace.get(name, {}).items())
        self._live, self._namespaces = live, namespaces
        for name in self._sets.keys() - used.keys():
            del self._sets[name]
            self.version += 1
        if gone or moved:
            for held in self._sets.values():
                self._change(held, gone, moved)
        for name, peer in used.items():
            if name not in self._sets:
                self._sets[name] = _Set(peer, self._pick(peer))
                self.version += 1

    def _change(
        self,
        held: _Set,
        gone: set[tuple[IdentityKey, int]],
        moved: set[tuple[IdentityKey, int]],
    ) -> None:
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

    def _pick(self, peer: PodPeer) -> set[int]:
        if peer.namespace is not None:
            candidates = [self._by_namespace.get(peer.namespace, {})]
        else:
            candidates = list(self._by_namespace.values())
        return {
            number for keys in candidates for key, number in keys.items() if self._picks(peer, key)
        }

    def _picks(self, peer: PodPeer, key: IdentityKey) -> bool:
        if key.cidrs:  # hosts outside are no pods, whatever a selector says
            return False
        if peer.namespaces is None:
            if peer.namespace != key.namespace:
                return False
        elif not peer.namespaces.matches(self._namespaces[key.namespace]):
            return False
        return peer.pods.matches(self._labels[key])

    def is_empty(self, name: str) -> bool:
        return not self._sets[name].members

    def published(self, name: str) -> PeerSet:
        held = self._sets[name]
        if held.published is None:
            held.published = PeerSet(
                name=name, selector=describe(held.peer), identities=sorted(held.members)
            )
        return held.published
