"""From the services that a node should serve and those it does to ids, slots and ranges. Pure.

What has not changed is not looked at: one endpoint's change costs its own frontends, at any
number of services. `Index` is derived from what is in force and only saves looking for it.
"""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress

import msgspec

from tidegate_loader.services import (
    RING,
    BackendAddress,
    BackendKey,
    FrontendKey,
    ServicePart,
    Special,
    Wanted,
    backends_of,
    frontend_text,
    places,
    ring_of,
)

REST_SECONDS = 600
"""How long a backend id rests: the longest conntrack and affinity time."""
RANGE_REST_SECONDS = 10
"""How long a range of slots rests; a program holds a frontend's word for microseconds."""
FREE, ACTIVE = 0, 1
SLOT_HEADER = 4
"""TG_SLOT_HEADER: number, affinity, size of the second list, whether there are any elsewhere."""


class FrontendInForce(msgspec.Struct, frozen=True, gc=False):
    base: int
    count: int
    """Slots that it takes."""
    backends: Wanted | None
    """None: the word, a slot or a backend is not as it should be."""


class BackendInForce(msgspec.Struct, frozen=True, gc=False):
    key: BackendKey
    state: int
    freed_at: int


class Resting(msgspec.Struct, frozen=True):
    """Slots that a program may still be reading."""

    base: int
    count: int
    until: int


class Held(msgspec.Struct, frozen=True):
    """What is in force of services, and what the maps hold at most."""

    frontends: Mapping[FrontendKey, FrontendInForce]
    backends: Mapping[int, BackendInForce]
    resting: tuple[Resting, ...]
    now: int
    max_frontends: int
    max_slots: int
    max_backends: int


class ServicesPlan(msgspec.Struct):
    delete: tuple[FrontendKey, ...] = ()
    backends: dict[int, BackendInForce] = msgspec.field(default_factory=dict)
    slots: dict[int, tuple[int, ...]] = msgspec.field(default_factory=dict)
    turned: dict[int, int] = msgspec.field(default_factory=dict)
    """Positions of rings in force -> backend ids."""
    rings: dict[FrontendKey, FrontendInForce] = msgspec.field(default_factory=dict)
    """What these positions make of them."""
    upsert: dict[FrontendKey, FrontendInForce] = msgspec.field(default_factory=dict)
    free: dict[int, BackendInForce] = msgspec.field(default_factory=dict)


class Index:
    """Ids by address, how often each is used, and the slots that nobody has."""

    def __init__(self, held: Held) -> None:
        self.ids: dict[BackendKey, int] = {}
        self.resting: dict[int, int] = {}
        """Free ids -> since when."""
        self.highest = 0
        self.uses = array("I", bytes(4 * held.max_backends))
        self.idle: set[int] = set()
        """Active ids that no frontend uses."""
        for number, backend in sorted(held.backends.items()):
            self.backend(number, backend)
        for key, frontend in held.frontends.items():
            self.used(key, frontend, 1)
        self.gaps = _gaps(held)

    def backend(self, number: int, backend: BackendInForce) -> None:
        """It is in force."""
        self.highest = max(self.highest, number)
        if backend.state == ACTIVE or backend.key not in self.ids:
            self.ids[backend.key] = number
        if backend.state == ACTIVE:
            self.resting.pop(number, None)
            if not self.uses[number]:
                self.idle.add(number)
        else:
            self.idle.discard(number)
            self.resting[number] = backend.freed_at

    def written(self, number: int, before: BackendInForce | None, now: BackendInForce) -> None:
        """An id has another backend, or another state."""
        if before is not None and before.key != now.key and self.ids.get(before.key) == number:
            del self.ids[before.key]
        self.backend(number, now)

    def used(self, key: FrontendKey, frontend: FrontendInForce | None, by: int) -> None:
        """A frontend came into force (1) or is there no more (-1)."""
        if frontend is None or frontend.backends is None:
            return
        for address in backends_of(frontend.backends):
            number = self.ids.get((*address, key[2]))
            if number is not None:
                self.uses[number] += by
                (self.idle.discard if self.uses[number] else self.idle.add)(number)

    def taken(self, base: int, count: int) -> None:
        """Slots are in use now."""
        end = base + count
        left = []
        for start, size in self.gaps:
            if start + size <= base or start >= end:
                left.append((start, size))
                continue
            if start < base:
                left.append((start, base - start))
            if start + size > end:
                left.append((end, start + size - end))
        self.gaps = left

    def rested(self, ranges: Iterable[Resting]) -> None:
        self.gaps[:0] = [(r.base, r.count) for r in ranges]


def _gaps(held: Held) -> list[tuple[int, int]]:
    taken = [(f.base, f.count) for f in held.frontends.values() if f.count]
    taken += [(r.base, r.count) for r in held.resting if r.until > held.now]
    found: list[tuple[int, int]] = []
    at = 0
    for base, count in sorted(taken):
        if base > at:
            found.append((at, base - at))
        at = max(at, base + count)
    if at < held.max_slots:
        found.append((at, held.max_slots - at))
    return found


class _Ranges:
    """Slots for this plan: of a gap of just that size, else of the first that is large enough."""

    def __init__(self, index: Index, held: Held) -> None:
        self._gaps = list(index.gaps)
        self._held = held
        self._given: list[tuple[int, int]] = []

    def take(self, count: int) -> int | None:
        """A base of `count` free slots; None: there are none in a row."""
        base = self._take(count)
        if base is None and self._gaps:
            # Neighbours that became free one after the other are one gap.
            given = tuple(Resting(*g, self._held.now + 1) for g in self._given)
            resting = (*self._held.resting, *given)
            self._gaps = _gaps(msgspec.structs.replace(self._held, resting=resting))
            base = self._take(count)
        if base is not None:
            self._given.append((base, count))
        return base

    def _take(self, count: int) -> int | None:
        best = None
        for index, (_, size) in enumerate(self._gaps):
            if size == count:
                best = index
                break
            if size > count and best is None:
                best = index
        if best is None:
            return None
        base, size = self._gaps[best]
        self._gaps[best : best + 1] = [(base + count, size - count)] if size > count else []
        return base


class _Backends:
    """Ids: a backend keeps its id; a new one gets an id that never was, or has rested."""

    def __init__(self, index: Index, held: Held) -> None:
        self._index = index
        self._held = held
        self._new: dict[BackendKey, int] = {}
        self._lost: set[BackendKey] = set()
        self.written: dict[int, BackendInForce] = {}
        self._free = self._candidates()

    def id_of(self, key: BackendKey) -> int | None:
        number = self._new.get(key)
        if number is None and key not in self._lost:
            number = self._index.ids.get(key)
        return number

    def _candidates(self) -> Iterator[int]:
        due = self._held.now - REST_SECONDS
        rested = sorted(n for n, since in self._index.resting.items() if since <= due and n > 0)
        yield from (n for n in rested if n not in self.written)
        yield from range(self._index.highest + 1, self._held.max_backends)

    def take(self, key: BackendKey) -> int | None:
        number = self.id_of(key)
        if number is None:
            number = next(self._free, None)
            if number is None:
                return None
            old = self._held.backends.get(number)
            if old is not None and self.id_of(old.key) == number:
                self._lost.add(old.key)
                self._new.pop(old.key, None)
            self._new[key] = number
        held = self.written.get(number) or self._held.backends.get(number)
        if held is None or held.key != key or held.state != ACTIVE:
            self.written[number] = BackendInForce(key, ACTIVE, 0)
        return number


def changes(
    parts: tuple[ServicePart, ...],
    known: tuple[ServicePart, ...] | None,
    held: Mapping[FrontendKey, FrontendInForce],
) -> tuple[list[FrontendKey], dict[FrontendKey, Wanted]]:
    """(frontends to delete, frontends to write). `known`: the parts that are in force; those
    that are still the same objects are not looked into."""
    if known is None or len(known) != len(parts):
        wanted: ServicePart = {}
        for part in parts:
            wanted.update(part)
        gone = [key for key in held if key not in wanted]
        return gone, {k: w for k, w in wanted.items() if _differs(held.get(k), w)}
    upserts: dict[FrontendKey, Wanted] = {}
    left: list[FrontendKey] = []
    pairs = list(compress(zip(parts, known, strict=True), map(operator.is_not, parts, known)))
    for part, old in pairs:
        for key, new in part.items():
            if (old.get(key) is not new or key not in held) and _differs(held.get(key), new):
                upserts[key] = new
        left += [key for key in old if key not in part]
    if not left:
        return [], upserts
    moved = set().union(*(part.keys() for part, _ in pairs))
    return [key for key in left if key in held and key not in moved], upserts


def _differs(now: FrontendInForce | None, wanted: Wanted) -> bool:
    return now is None or now.backends != wanted


def plan_services(
    gone: list[FrontendKey],
    upserts: Mapping[FrontendKey, Wanted],
    draining: tuple[frozenset[BackendKey], ...],
    held: Held,
    index: Index,
    problems: list[str],
) -> ServicesPlan:
    ids, ranges = _Backends(index, held), _Ranges(index, held)
    found = ServicesPlan(delete=tuple(sorted(gone)), backends=ids.written)
    room = held.max_frontends - len(held.frontends) + len(gone)
    uses: Counter[int] = Counter()
    for key in gone:
        _count(uses, index, key, held.frontends[key], -1)
    for key in sorted(upserts):
        wanted, before = upserts[key], held.frontends.get(key)
        if before is None:
            if room <= 0:
                problems.append(f"frontends is full: no room for {frontend_text(key)}")
                continue
            room -= 1
        numbers = _slots(key, wanted, ids)
        turned = None if numbers is None else _turned(key, wanted, before, numbers, index)
        if numbers is not None and turned is not None and before is not None:
            found.turned.update(turned)
            found.rings[key] = FrontendInForce(before.base, before.count, wanted)
        elif numbers is None or (base := ranges.take(len(numbers)) if numbers else 0) is None:
            problems.append(f"no room for the backends of {frontend_text(key)}")
            continue  # what is in force stays: its backends are in use
        else:
            if numbers:
                found.slots[base] = numbers
            found.upsert[key] = FrontendInForce(base, len(numbers), wanted)
        if before is not None:
            _count(uses, index, key, before, -1)
        for address in backends_of(wanted):
            number = ids.id_of((*address, key[2]))
            if number is not None:
                uses[number] += 1
    unused = {n for n, by in uses.items() if by < 0 and index.uses[n] + by <= 0}
    idle = {n for n in index.idle if uses[n] <= 0}
    for number in sorted(unused | idle):
        backend = held.backends[number]
        if (
            backend.state == ACTIVE
            and number not in ids.written
            and not any(backend.key in listed for listed in filter(None, draining))
        ):
            found.free[number] = BackendInForce(backend.key, FREE, held.now)
    return found


def _count(
    uses: Counter[int], index: Index, key: FrontendKey, frontend: FrontendInForce, by: int
) -> None:
    if frontend.backends is None:
        return
    for address in backends_of(frontend.backends):
        number = index.ids.get((*address, key[2]))
        if number is not None:
            uses[number] += by


def _slots(key: FrontendKey, wanted: Wanted, ids: _Backends) -> tuple[int, ...] | None:
    """What the frontend's slots hold; None: there are no ids."""
    if not isinstance(wanted, Special):
        numbers = _take(wanted, key[2], ids)
        return None if numbers is None else tuple(numbers)
    slots = _header(wanted)
    for listed in (wanted.inside, wanted.outside):
        numbers = _take(listed, key[2], ids)
        if numbers is None:
            return None
        if wanted.flags & RING:
            slots += _ring(listed, numbers)
        else:  # programs look for a client's backend by halves
            slots += sorted(numbers)
    return tuple(slots)


def _header(wanted: Special) -> list[int]:
    outer = len(wanted.outside)
    size = places(outer) if wanted.flags & RING else outer
    return [wanted.number, wanted.affinity, size, int(wanted.elsewhere)]


def _ring(listed: tuple[BackendAddress, ...], numbers: Iterable[int]) -> list[int]:
    by_address = dict(zip(listed, numbers, strict=True))
    return [by_address[address] for address in ring_of(listed)]


def _turned(
    key: FrontendKey,
    wanted: Wanted,
    before: FrontendInForce | None,
    numbers: tuple[int, ...],
    index: Index,
) -> dict[int, int] | None:
    """The positions that change where a ring takes another's place; None: it has to have slots of
    its own. Programs read it meanwhile, and find a backend that is in use before or after."""
    if before is None or not isinstance(wanted, Special) or not wanted.flags & RING:
        return None
    old = before.backends
    if not isinstance(old, Special) or old.flags != wanted.flags or _header(old) != _header(wanted):
        return None
    held = _header(old)
    for listed in (old.inside, old.outside):
        known = [index.ids.get((*address, key[2])) for address in listed]
        if None in known:
            return None
        held += _ring(listed, [number for number in known if number is not None])
    if len(held) != len(numbers) or len(held) != before.count:
        return None
    pairs = enumerate(zip(held, numbers, strict=True), before.base)
    return {at: new for at, (was, new) in pairs if was != new}


def _take(listed: Iterable[BackendAddress], protocol: int, ids: _Backends) -> list[int] | None:
    numbers = []
    for address, port in listed:
        number = ids.take((address, port, protocol))
        if number is None:
            return None
        numbers.append(number)
    return numbers
