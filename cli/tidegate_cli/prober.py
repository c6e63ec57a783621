"""Real connections from inside one pod, all at once.

What a probe means: a TCP one must get an HTTP answer, a UDP one an echo, and
the answer names the pod that gave it. No model, no table. Slim: it runs in a
forked process for each source.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_OPEN = 256
MAX_ANSWER_BYTES = 65536
UDP_SENDS = 3

TIMED_OUT = "timed out"
CLOSED = "closed without an answer"
CONNECTED = "connected"

_REQUEST = b"GET / HTTP/1.1\r\nHost: tidegate\r\nConnection: close\r\n\r\n"
_DATAGRAM = b"tidegate-probe"


@dataclass(frozen=True)
class Probe:
    address: str
    port: int
    protocol: str
    """TCP or UDP."""
    handshake: bool = False
    """A completed TCP handshake will do: what answers is not our responder."""


@dataclass(frozen=True)
class Result:
    pod: str
    """"namespace/name" that answered; "" = none did."""
    detail: str
    """What happened, for people; "" for a proper answer."""


class _Open:
    """One probe under way. `advance` and `expire` return its result, or None."""

    def __init__(self, probe: Probe, seconds: float) -> None:
        family = socket.AF_INET6 if ":" in probe.address else socket.AF_INET
        kind = socket.SOCK_STREAM if probe.protocol == "TCP" else socket.SOCK_DGRAM
        self.probe = probe
        self.sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        self.events = selectors.EVENT_WRITE
        self.due = time.monotonic() + seconds
        self._answer = bytearray()
        self._sends = 0
        self._resend_after = seconds / UDP_SENDS
        self._end = self.due

    def begin(self) -> Result | None:
        code = self.sock.connect_ex((self.probe.address, self.probe.port))
        if code not in (0, errno.EINPROGRESS):
            return Result("", os.strerror(code))
        return self._send() if self.probe.protocol == "UDP" else None

    def advance(self) -> Result | None:
        try:
            if self.probe.protocol == "UDP":
                return self._parse_echo(self.sock.recv(MAX_ANSWER_BYTES))
            if self.events == selectors.EVENT_WRITE:
                return self._connected()
            return self._read()
        except BlockingIOError:
            return None
        except OSError as error:
            return Result("", os.strerror(error.errno or 0))

    def expire(self) -> Result | None:
        """At `due`: sends a datagram again, or gives up."""
        if self.probe.protocol == "UDP" and self._sends < UDP_SENDS:
            return self._send()
        return Result("", TIMED_OUT)

    def _send(self) -> Result | None:
        self.events = selectors.EVENT_READ
        self._sends += 1
        last = self._sends == UDP_SENDS
        self.due = self._end if last else time.monotonic() + self._resend_after
        try:
            self.sock.send(_DATAGRAM)
        except OSError as error:
            return Result("", os.strerror(error.errno or 0))
        return None

    def _connected(self) -> Result | None:
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return Result("", os.strerror(code))
        if self.probe.handshake:
            return Result("", CONNECTED)
        self.events = selectors.EVENT_READ
        self.sock.send(_REQUEST)
        return None

    def _read(self) -> Result | None:
        data = self.sock.recv(MAX_ANSWER_BYTES)
        self._answer += data
        if data and len(self._answer) <= MAX_ANSWER_BYTES:
            return None
        return parse_http(bytes(self._answer))

    def _parse_echo(self, data: bytes) -> Result:
        name, _, rest = data.partition(b" ")
        if rest == _DATAGRAM:
            return Result(name.decode(errors="replace"), "")
        return Result("", CONNECTED if self.probe.handshake else f"odd datagram {data[:40]!r}")


def parse_http(data: bytes) -> Result:
    head, _, body = data.partition(b"\r\n\r\n")
    if not data:
        return Result("", CLOSED)
    try:
        answer = json.loads(body)
        pod = answer["pod"]
    except (ValueError, KeyError, TypeError):
        return Result("", f"odd answer {head[:40]!r}")
    return Result(str(pod), "")


def run(probes: Sequence[Probe], seconds: float) -> list[Result]:
    """All probes' results, in their order. Each has `seconds` of its own; at
    most MAX_OPEN are under way at once."""
    results: list[Result | None] = [None] * len(probes)
    waiting = deque(range(len(probes)))
    under_way: dict[int, _Open] = {}
    with selectors.DefaultSelector() as selector:

        def finish(index: int, result: Result) -> None:
            results[index] = result
            opened = under_way.pop(index)
            if opened.sock in selector.get_map():
                selector.unregister(opened.sock)
            opened.sock.close()

        while waiting or under_way:
            while waiting and len(under_way) < MAX_OPEN:
                index = waiting.popleft()
                opened = under_way[index] = _Open(probes[index], seconds)
                result = opened.begin()
                if result is not None:
                    finish(index, result)
                else:
                    selector.register(opened.sock, opened.events, index)
            if not under_way:
                continue
            nearest = min(opened.due for opened in under_way.values())
            for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                opened = under_way[key.data]
                result = opened.advance()
                if result is not None:
                    finish(key.data, result)
                elif key.events != opened.events:
                    selector.modify(opened.sock, opened.events, key.data)
            now = time.monotonic()
            for index in [i for i, opened in under_way.items() if opened.due <= now]:
                result = under_way[index].expire()
                if result is not None:
                    finish(index, result)
    return [result for result in results if result is not None]
