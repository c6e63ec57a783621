"""Built-in responders: one process that answers on every pod's ports.

TCP ports answer HTTP/1.1 with a JSON body that names the pod and the client's
address; UDP ports echo the datagram after the pod's name and a space. The
process stays in its own namespace and opens each socket inside the pod's.
`tidegate up` drives it by JSON lines on a socket, and it outlives `up`: it
stands for the workload, which does not die with its network.

Runs as `python -m tidegate_cli.standalone.responder FD`. Stays slim: standard
library and `netns` only.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate_cli.standalone import netns

BACKLOG = 512
MAX_HEAD_BYTES = 16384
MAX_DATAGRAM_BYTES = 65536
MAX_CONNECTIONS = 16384

_ANCILLARY_BYTES = 64
_SCTP = "SCTP"
NO_SCTP = "SCTP has no responder: this kernel has no SCTP sockets (CONFIG_IP_SCTP)"


@dataclass
class _Served:
    """What is open for one pod."""

    pod: str
    address: str
    listeners: list[socket.socket] = field(default_factory=list)
    connections: set[socket.socket] = field(default_factory=set)


@dataclass
class _Connection:
    served: _Served
    client: str
    buffer: bytearray = field(default_factory=bytearray)


class Responder:
    def __init__(self, control: socket.socket) -> None:
        self._selector = selectors.DefaultSelector()
        self._served: dict[str, _Served] = {}
        self._connections = 0
        self._control = control
        self._input = bytearray()
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self._on_control)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                # An earlier event of the same round may have closed this one.
                if key.fileobj in self._selector.get_map():
                    handler: Callable[[Any], None] = key.data
                    handler(key.fileobj)

    def _on_control(self, control: socket.socket) -> None:
        data = control.recv(65536)
        if not data:
            self._selector.unregister(control)
            control.close()
            return
        self._input += data
        while (end := self._input.find(b"\n")) >= 0:
            request = json.loads(self._input[:end])
            del self._input[: end + 1]
            problems = self._add(request) if request["op"] == "add" else self._remove(request)
            control.setblocking(True)
            control.sendall(json.dumps({"problems": problems}).encode() + b"\n")
            control.setblocking(False)

    def _add(self, request: dict[str, Any]) -> list[str]:
        served = _Served(request["pod"], request["address"])
        self._served[request["uid"]] = served
        problems = []
        for port, protocol in request["ports"]:
            if protocol == _SCTP:
                problems.append(f"{served.pod}: port {port}/{protocol}: {NO_SCTP}")
                continue
            try:
                self._listen(served, Path(request["netns"]), port, protocol)
            except OSError as error:
                problems.append(f"{served.pod}: port {port}/{protocol}: {error.strerror}")
        return problems

    def _remove(self, request: dict[str, Any]) -> list[str]:
        served = self._served.pop(request["uid"], None)
        if served is not None:
            for sock in served.listeners:
                self._selector.unregister(sock)
                sock.close()
            for sock in list(served.connections):
                self._close(sock, served)
        return []

    def _listen(self, served: _Served, namespace: Path, port: int, protocol: str) -> None:
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        with netns.inside(namespace):
            sock = socket.socket(socket.AF_INET6, kind)
        try:
            # One socket for both families.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setblocking(False)
            if protocol == "TCP":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("::", port))
                sock.listen(BACKLOG)
                handler = self._acceptor(served)
            else:
                # On a node's namespace the reply must leave from the address asked.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                sock.bind(("::", port))
                handler = self._echo(served)
        except OSError:
            sock.close()
            raise
        served.listeners.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, handler)

    def _acceptor(self, served: _Served) -> Callable[[socket.socket], None]:
        def accept(listener: socket.socket) -> None:
            try:
                sock, client = listener.accept()
            except OSError:
                return  # the client has gone
            if self._connections >= MAX_CONNECTIONS:
                sock.close()
                return
            sock.setblocking(False)
            self._connections += 1
            served.connections.add(sock)
            connection = _Connection(served, _plain(client[0]))
            self._selector.register(
                sock, selectors.EVENT_READ, lambda s: self._on_request(s, connection)
            )

        return accept

    def _on_request(self, sock: socket.socket, connection: _Connection) -> None:
        try:
            data = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.buffer += data
        try:
            keep = bool(data) and self._answer(sock, connection)
        except OSError:
            keep = False
        if not keep:
            self._close(sock, connection.served)

    def _answer(self, sock: socket.socket, connection: _Connection) -> bool:
        """Answers every whole request in the buffer; False ends the connection."""
        buffer = connection.buffer
        while (end := buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(buffer[:end]).lower()
            length = _content_length(head)
            if length is None:
                return False
            if len(buffer) < end + 4 + length:
                return len(buffer) <= MAX_HEAD_BYTES
            del buffer[: end + 4 + length]
            served = connection.served
            answer = {
                "pod": served.pod,
                "address": served.address,
                "client": connection.client,
            }
            body = json.dumps(answer).encode() + b"\n"
            close = b"\r\nconnection: close" in head
            sock.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                + (b"Connection: close\r\n" if close else b"")
                + b"Content-Length: %d\r\n\r\n" % len(body)
                + body
            )
            if close:
                return False
        return len(buffer) <= MAX_HEAD_BYTES

    def _close(self, sock: socket.socket, served: _Served) -> None:
        self._selector.unregister(sock)
        sock.close()
        served.connections.discard(sock)
        self._connections -= 1

    def _echo(self, served: _Served) -> Callable[[socket.socket], None]:
        name = served.pod.encode() + b" "

        def echo(sock: socket.socket) -> None:
            try:
                data, ancillary, _, client = sock.recvmsg(MAX_DATAGRAM_BYTES, _ANCILLARY_BYTES)
                # The interface index is zeroed: routing, not the arrival, picks it.
                info = [
                    (level, kind, value[:16] + bytes(4))
                    for level, kind, value in ancillary
                    if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
                ]
                sock.sendmsg([name, data], info, 0, client)
            except OSError:
                return  # an ICMP error for an earlier answer, or a client without a route

        return echo


def _content_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip() == b"content-length":
            text = value.strip()
            return int(text) if text.isdigit() and len(text) < 9 else None
    return 0


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def main() -> None:
    # The terminal's ^C is for `up`, which ends this process itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Responder(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
