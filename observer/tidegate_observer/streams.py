"""Calls that stream, and whether their clients still take what they are sent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import structlog

STUCK_SECONDS = 30.0
"""A stream that takes nothing for so long, although there is something, is cut."""

log = structlog.get_logger()


@dataclass(eq=False)
class Stream:
    context: grpc.ServicerContext
    peer: str
    moved: float
    """When it last took something, or had nothing to take."""

    def move(self) -> None:
        self.moved = time.monotonic()


class Streams:
    """Those under way; each in a thread of its own."""

    def __init__(self) -> None:
        self._open: set[Stream] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def watched(self, context: grpc.ServicerContext) -> Iterator[Stream]:
        stream = Stream(context, context.peer(), time.monotonic())
        self._open.add(stream)
        try:
            yield stream
        finally:
            self._open.discard(stream)

    def cut_stuck(self) -> None:
        """Ends streams whose clients take nothing: their threads wait in the middle of a send."""
        now = time.monotonic()
        for stream in list(self._open):
            if now - stream.moved > STUCK_SECONDS:
                log.warning("client disconnected", peer=stream.peer, reason="takes nothing")
                stream.context.cancel()  # type: ignore[no-untyped-call]
