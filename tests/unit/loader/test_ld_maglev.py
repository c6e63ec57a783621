"""Rings: the same wherever they are computed, even, and little moves when a backend goes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from operator import ne

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tidegate_loader.maglev import RING_SIZE, BackendAddress, most, ring


def backend(number: int, port: int = 8080) -> BackendAddress:
    return bytes(10) + b"\xff\xff" + (0x0AF40000 + number).to_bytes(4, "big"), port


BACKENDS = st.sets(st.integers(0, 5000).map(backend), min_size=1, max_size=12)


def matched(backends: Collection[BackendAddress], size: int) -> list[BackendAddress]:
    """The same matching, found the plain way: every wish of every backend, the dearest first;
    it is granted if the position is free and the backend not full."""
    wishes = []
    for name in sorted(backends):
        text = b"tidegate-ring" + name[0] + name[1].to_bytes(2, "big")
        data = hashlib.shake_128(text).digest(4 * size)
        for position in range(size):
            rank = int.from_bytes(data[4 * position : 4 * position + 4], "little")
            wishes.append((rank, name, position))
    found: dict[int, BackendAddress] = {}
    has: Counter[BackendAddress] = Counter()
    for _, name, position in sorted(wishes):
        if position not in found and has[name] < most(len(backends), size):
            found[position] = name
            has[name] += 1
    return [found[position] for position in range(size)]


@settings(max_examples=60, deadline=None)
@given(BACKENDS, st.sampled_from((16, 64, 256)))
def test_it_is_the_one_stable_matching(backends: set[BackendAddress], size: int) -> None:
    assert ring(backends, size) == matched(backends, size)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40).map(backend), min_size=1, max_size=12))
def test_order_and_repeats_do_not_matter(backends: list[BackendAddress]) -> None:
    shuffled = sorted(backends * 2, key=lambda name: hashlib.sha256(name[0]).digest())
    assert ring(shuffled, 512) == ring(backends, 512)


def test_nobody_and_one() -> None:
    assert ring([]) == []
    assert ring([backend(1)], 8) == [backend(1)] * 8


def test_a_ring_is_what_it_was() -> None:
    """Nodes of two versions agree: a change of this moves every client."""
    found = ring([backend(number) for number in range(7)])
    text = b"".join(address + port.to_bytes(2, "big") for address, port in found)
    assert (len(found), hashlib.sha256(text).hexdigest()[:16]) == (RING_SIZE, "8587da7dfb2713aa")


@pytest.mark.parametrize("count", [2, 3, 5, 10, 40, 120])
def test_even_and_steady(count: int) -> None:
    names = [backend(number * 37) for number in range(count)]
    whole = ring(names)
    shares = Counter(whole)
    assert max(shares.values()) <= most(count)
    assert min(shares.values()) >= RING_SIZE / count * 0.75
    for gone in names[:3]:
        rest = ring([name for name in names if name != gone])
        assert sum(map(ne, whole, rest)) / RING_SIZE <= 1 / count + 0.01
        assert gone not in rest
