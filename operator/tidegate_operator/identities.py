"""The ledger of identity numbers: the one stateful step between world and compile.

A number stands for a namespace and the identity-relevant labels of its pods. It is
kept while such a pod or a pre-warming Identity exists, and rests unused afterwards, so
that a late packet or a slow node never meets a number with a new meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate_api.state import FIRST_IDENTITY, IDENTITY_BITS

from tidegate_operator import changes
from tidegate_operator.objects import IdentityKey, ObjectName, Pod, UserIdentity, World

MAX_RELEASED = 10_000
"""Numbers that rest; the longest-resting are forgotten beyond it."""


@dataclass(frozen=True)
class Ledger:
    """`live`: key -> number, in use. `released`: number -> (key, when it was released
    on the ledger's own count), oldest first. `count`: releases so far.
    Never changed after it is made."""

    live: dict[IdentityKey, int]
    released: dict[int, tuple[IdentityKey, int]]
    count: int = 0


EMPTY_LEDGER = Ledger({}, {})


def wanted(world: World) -> dict[IdentityKey, None]:
    """The keys that need a number, in sorted order of their owners: pods that are
    subjects and peers, and pre-warming Identities."""
    keys = {pod.identity: None for pod in world.pods.values() if not pod.host_network}
    keys.update((identity.key, None) for identity in world.identities.values())
    return keys


class Allocator:
    """`allocate` for a world that changes: same result, cost of the change."""

    def __init__(self) -> None:
        self._pods: Mapping[ObjectName, Pod] = {}
        self._identities: Mapping[str, UserIdentity] = {}
        self._counts: dict[IdentityKey, int] = {}
        """Owners of each key."""
        self._given: Ledger | None = None
        """The ledger that has exactly these keys."""

    def allocate(
        self, world: World, ledger: Ledger, moment: int | None = None, rest: int | None = None
    ) -> Ledger:
        touched = self._follow(world)
        given, self._given = self._given, None  # an error half-way makes the next a whole one
        if ledger is given:
            came = [key for key in touched if key in self._counts and key not in ledger.live]
            went = [key for key in touched if key not in self._counts and key in ledger.live]
            self._given = _allocate(ledger, came, went, moment, rest)
        else:
            self._given = allocate(world, ledger, moment, rest)
        return self._given

    def _follow(self, world: World) -> set[IdentityKey]:
        """The keys that may have come or gone."""
        old, now = self._pods, world.pods
        new, lost = changes.both(old, now)
        came = [now[name].identity for name in new if not now[name].host_network]
        left = [old[name] for name in (*lost, *new) if name in old]
        went = [pod.identity for pod in left if not pod.host_network]
        if world.identities is not self._identities:
            came += [identity.key for identity in world.identities.values()]
            went += [identity.key for identity in self._identities.values()]
        for key in came:
            self._counts[key] = self._counts.get(key, 0) + 1
        for key in went:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
        self._pods, self._identities = now, world.identities
        return {*came, *went}


def allocate(
    world: World, ledger: Ledger, moment: int | None = None, rest: int | None = None
) -> Ledger:
    """Give every wanted key a number; release those that nothing wants. Returns the
    same ledger if nothing changed. A released key that returns gets its number back.

    `moment`: seconds, then the ledger counts by it, and a number that has rested for longer
    than `rest` is forgotten."""
    keys = wanted(world)
    came = [key for key in keys if key not in ledger.live]
    return _allocate(ledger, came, ledger.live.keys() - keys.keys(), moment, rest)


def _allocate(
    ledger: Ledger,
    came: Iterable[IdentityKey],
    went: Iterable[IdentityKey],
    moment: int | None,
    rest: int | None,
) -> Ledger:
    new, lost = sorted(came), sorted(went)
    since = None if moment is None or rest is None else moment - rest
    if not new and not lost and not _rested(ledger, since):
        return ledger
    live = dict(ledger.live)
    released, count = dict(ledger.released), max(ledger.count, moment or 0)
    for key in lost:
        count += moment is None
        released[live.pop(key)] = (key, count)
    resting = {key: number for number, (key, _) in released.items()}
    taken = set(live.values())
    for key in new:
        known = resting.get(key)
        number = known if known is not None else _free(key, taken, released)
        released.pop(number, None)
        live[key] = number
        taken.add(number)
    for number in list(released)[: max(len(released) - MAX_RELEASED, 0)]:
        del released[number]
    if since is not None:
        released = {number: item for number, item in released.items() if item[1] >= since}
    return Ledger(live, released, count)


def _rested(ledger: Ledger, since: int | None) -> bool:
    """Has some number rested for its time?"""
    oldest = next(iter(ledger.released.values()), None)
    return since is not None and oldest is not None and oldest[1] < since


def give_way(ledger: Ledger, number: int, key: IdentityKey) -> Ledger:
    """`number` turned out to stand for `key`: what we gave it to needs another, and it rests
    unless `key` has none yet."""
    live = {held: own for held, own in ledger.live.items() if own != number}
    released = dict(ledger.released)
    released.pop(number, None)
    if key in ledger.live and ledger.live[key] == number:
        return ledger
    released[number] = (key, ledger.count)
    return Ledger(live, released, ledger.count)


def _free(key: IdentityKey, taken: set[int], released: Mapping[int, object]) -> int:
    size = (1 << IDENTITY_BITS) - FIRST_IDENTITY
    text = repr(tuple(key)).encode()
    start = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % size
    for step in range(size):
        number = FIRST_IDENTITY + (start + step) % size
        if number not in taken and number not in released:
            return number
    raise OverflowError("every identity number is taken")  # 16 million label sets
