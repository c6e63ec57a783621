"""Rings emptied into memory: in order, in batches, and not without bound."""

from __future__ import annotations

from typing import Any, cast

import pytest
from tidegate_observer import rings
from tidegate_observer.rings import BATCH, MAX_BUFFERED, Drain, Place


class Source:
    """A ring that has `pieces` to give."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = list(pieces)
        self.closed = False
        self.place = Place(7, 0)

    def reopen(self) -> None:
        pass

    def read(self) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        self.place = Place(7, self.place.bytes + len(piece))
        return piece

    def close(self) -> None:
        self.closed = True


def drain(*sources: Source) -> Drain:
    return Drain(cast("Any", list(sources)))


def test_what_was_read_is_taken_in_order_and_once() -> None:
    one, other = Source(b"a", b"b"), Source(b"c")
    made = drain(one, other)
    made.read()
    made.read()
    assert made.more
    assert (made.take(0), made.take(1)) == (b"ab", b"c")
    assert (made.take(0), made.take(1), made.more) == (b"", b"", False)


def test_a_batch_is_bounded_and_the_rest_stays() -> None:
    made = drain(Source(bytes(BATCH), b"rest"))
    made.read()
    made.read()
    assert made.taken == [None]
    assert len(made.take(0)) == BATCH
    assert made.more
    assert made.taken == [Place(7, BATCH)]
    assert made.take(0) == b"rest"
    assert made.taken == [Place(7, BATCH + 4)]


def test_a_ring_that_nobody_takes_from_is_left_to_fill() -> None:
    source = Source(bytes(MAX_BUFFERED), b"later")
    made = drain(source, Source(b"other"))
    made.read()
    made.read()
    assert source.pieces == [b"later"]
    assert made.pressed()
    assert made.take(1) == b"other"
    made.take(0)
    assert not made.pressed()
    made.read()
    assert made.take(0) == b"later"


def test_a_failure_is_told_once_and_reading_goes_on() -> None:
    made = drain(Source(ValueError("torn"), b"a"))
    made.read()
    made.read()
    with pytest.raises(ValueError, match="torn"):
        made.take(0)
    assert made.take(0) == b"a"


def test_how_far_all_was_read_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not further than any ring was emptied."""
    now = iter(range(1, 100))
    monkeypatch.setattr(rings.time, "time_ns", lambda: next(now))
    source = Source(b"a", ValueError("torn"), bytes(MAX_BUFFERED))
    made = drain(source, Source())
    seen = []
    for _ in range(4):
        made.read()
        seen.append(made.through)
    # The second look failed; by the fourth, nobody has taken what the third has read.
    assert seen == [1, 1, 3, 3]


def test_the_thread_reads_by_itself_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "DRAIN_SECONDS", 0.001)
    source = Source(b"a")
    made = drain(source)
    made.reopen()
    while not made.more:
        pass
    made.stop()
    assert made.take(0) == b"a"
    made.close()
    assert source.closed
