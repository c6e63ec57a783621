"""The ring of a Service that asks for Maglev: which backend each position of it leads to. Pure, and
a function of the set of backends alone: every node, and every start of a loader, has the same.

What Maglev's tables are for, with a fill that moves less. Each backend ranks all positions by a
hash of its own. A position goes to the backend that ranks it first, unless that one is full; a full
one keeps those that it ranks first, and the others go to the next that would have them. So it
does not matter in which order anything is asked, and when a backend goes, its own positions move
and few others: those that found it, or another, full. (Maglev's fill, where backends take turns,
moves as many more as the ring has too few positions for each: a hundredth at 400 for each.)
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Collection, Sequence
from itertools import compress
from math import ceil
from operator import lt

BackendAddress = tuple[bytes, int]
"""(16 address bytes, port)."""

RING_SIZE = 16_384
"""Positions. With fewer, chance alone moves more than one in a hundred when a backend goes."""
MAX_ROOM, ROOM_EACH = 0.05, 0.004
"""How much more than its share a backend may have: with few backends less, as a part of the ring
is what moves. More room moves less and balances less."""

Ranks = Sequence[int]
"""Position -> what the backend thinks of it, 32 bits; the lowest is what it wants most."""


def ring(backends: Collection[BackendAddress], size: int = RING_SIZE) -> list[BackendAddress]:
    """Position -> backend; no backends, no positions. Takes milliseconds for each backend."""
    names = sorted(set(backends))
    if not names:
        return []
    ranks = [_ranks(name, size) for name in names]
    owners = _first_choices(ranks, size)
    _make_room(owners, ranks, most(len(names), size))
    return [names[owner] for owner in owners]


def most(backends: int, size: int = RING_SIZE) -> int:
    """Positions that one of so many backends may have."""
    return ceil(size / backends * (1 + min(MAX_ROOM, ROOM_EACH * backends)))


def _ranks(name: BackendAddress, size: int) -> Ranks:
    address, port = name
    text = b"tidegate-ring" + address + port.to_bytes(2, "big")
    found = array("I", hashlib.shake_128(text).digest(4 * size))
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _first_choices(ranks: Sequence[Ranks], size: int) -> list[int]:
    """Who ranks each position first; of equals the first by name."""
    best = list(ranks[0])
    owners = [0] * size
    for owner, own in enumerate(ranks[1:], start=1):
        for position in compress(range(size), map(lt, own, best)):
            best[position] = own[position]
            owners[position] = owner
    return owners


def _make_room(owners: list[int], ranks: Sequence[Ranks], room: int) -> None:
    """Until nobody has more than `room`. There is room for all, so it ends: a position only ever
    moves to a backend that ranks it lower."""
    held: list[list[int]] = [[] for _ in ranks]
    for position, owner in enumerate(owners):
        held[owner].append(position)
    full = [owner for owner, positions in enumerate(held) if len(positions) > room]
    while full:
        owner = full.pop()
        held[owner].sort(key=lambda position: (ranks[owner][position], position))
        turned_away = held[owner][room:]
        del held[owner][room:]
        for position in turned_away:
            here = (ranks[owner][position], owner)
            choices = ((own[position], other) for other, own in enumerate(ranks))
            _, other = min(choice for choice in choices if choice > here)
            owners[position] = other
            held[other].append(position)
            if len(held[other]) == room + 1:
                full.append(other)
