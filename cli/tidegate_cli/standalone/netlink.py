"""Route netlink requests, many at a time, in one network namespace.

pyroute2 encodes; we send. Its own sockets cost an event loop each, and a
cluster of thirty namespaces would open thirty.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

from pyroute2 import IPBatch  # type: ignore[import-untyped,unused-ignore]

from tidegate_cli.standalone import netns
from tidegate_cli.standalone.errors import NetworkError

ACK_SECONDS = 10.0
# The acknowledgements of one burst must fit a default receive buffer.
BURST = 64

_NLMSG_ERROR = 2
_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")
_MESSAGE_BYTES = 65536


class Batch:
    """Requests in the order in which the kernel will see them."""

    def __init__(self) -> None:
        self._encoder = IPBatch()
        self._requests: list[tuple[str, bytes]] = []

    def link(self, command: str, **arguments: Any) -> None:
        self._add("link", command, arguments)

    def addr(self, command: str, **arguments: Any) -> None:
        self._add("addr", command, arguments)

    def route(self, command: str, **arguments: Any) -> None:
        self._add("route", command, arguments)

    def _add(self, what: str, command: str, arguments: dict[str, Any]) -> None:
        self._encoder.reset()
        getattr(self._encoder, what)(command, **arguments)
        words = " ".join(f"{key} {value}" for key, value in arguments.items())
        self._requests.append((f"{what} {command} {words}", bytes(self._encoder.batch)))

    def run(self, namespace: Path) -> None:
        """Sends all, once. Raises NetworkError for the first that the kernel refuses;
        those after it in the same burst have run."""
        self._encoder.close()  # it has an event loop of its own
        with netns.inside(namespace):
            channel = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
        with channel:
            channel.bind((0, 0))
            channel.settimeout(ACK_SECONDS)
            for start in range(0, len(self._requests), BURST):
                self._burst(channel, namespace, self._requests[start : start + BURST])

    def _burst(
        self, channel: socket.socket, namespace: Path, requests: list[tuple[str, bytes]]
    ) -> None:
        channel.send(b"".join(request for _, request in requests))
        done = 0
        while done < len(requests):
            try:
                data = channel.recv(_MESSAGE_BYTES)
            except TimeoutError as error:
                raise NetworkError(f"{namespace.name}: netlink does not answer") from error
            offset = 0
            while offset < len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
                if kind == _NLMSG_ERROR:
                    (code,) = _ERROR.unpack_from(data, offset + _HEADER.size)
                    if code:
                        raise NetworkError(
                            f"{namespace.name}: {requests[done][0]}: {os.strerror(-code)}"
                        )
                    done += 1
                offset += (length + 3) & ~3
