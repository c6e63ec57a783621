"""Allowed flows that must live through whatever a test does, and strangers who ask all the time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rig import cold, install, town
from rig.asking import Askers, Question


@contextlib.contextmanager
def under_way(askers: Askers, place: town.Town) -> Iterator[None]:
    """While in it, flows of friends are under way, which must not break, and strangers ask,
    who must get no answer. Afterwards the cluster is as a cold compile says."""
    place.served(askers)
    streams = {
        name: askers.of(place.pods[name]).begin_stream(
            Question(place.pods["server"].address, 80, seconds=0.02)
        )
        for name in town.FRIENDS
    }
    with _strangers(place):
        yield
    ended = {n: askers.of(place.pods[n]).end_stream(s) for n, s in streams.items()}
    broken = {name: answer for name, answer in ended.items() if answer.detail}
    assert not broken
    place.served(askers)
    place.refused(askers)
    install.wait_realised()
    cold.settle()


@contextlib.contextmanager
def _strangers(place: town.Town) -> Iterator[None]:
    """Strangers ask without a pause, in threads of their own; an answer fails the test."""
    end, failures = threading.Event(), []
    own = Askers()

    def ask() -> None:
        while not end.is_set():
            try:
                place.refused(own)
            except AssertionError as error:
                failures.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        own.close()
    assert not failures, failures[:3]
