"""Where load balancers ask whether this node has an endpoint of a Service (`healthCheckNodePort`).

HTTP, any path, in the network namespace of the thread that calls `serve`. The answer is 200 while
there is one and 503 while there is none, with a body as other proxies give it. Off the datapath:
when the loader is down nobody answers, and a load balancer that asks leaves the node out.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping

from tidegate_loader.services import Health

MAX_CLIENTS = 256
"""Connections at one time; what comes beyond waits in the listeners' queues."""
CLIENT_SECONDS = 5.0
MAX_REQUEST = 8192
"""Bytes of a request that are read before it is let go."""
_END = b"\r\n\r\n"


class Server:
    """One thread for all ports; there is none until a Service asks."""

    def __init__(self) -> None:
        self._answers: Mapping[int, Health] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, tuple[int, bytes, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def serve(self, answers: Mapping[int, Health]) -> list[str]:
        """Answer at these ports and no others; what went wrong."""
        problems = []
        with self._lock:
            self._answers = answers
            for port in self._listeners.keys() - answers.keys():
                listener = self._listeners.pop(port)
                self._selector.unregister(listener)
                listener.close()
            for port in sorted(answers.keys() - self._listeners.keys()):
                try:
                    listener = _listen(port)
                except OSError as error:
                    name = answers[port].service
                    problems.append(f"{name}: health check port {port}: {error.strerror}")
                    continue
                self._listeners[port] = listener
                self._selector.register(listener, selectors.EVENT_READ)
            if self._listeners and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="health", daemon=True)
                self._thread.start()
        return problems

    def _run(self) -> None:
        while True:
            # The lock is not held while nothing happens.
            ready = self._selector.select(1.0)
            with self._lock:
                for key, _ in ready:
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    if found in self._clients:
                        self._read(found)
                    elif found.fileno() >= 0 and len(self._clients) < MAX_CLIENTS:
                        self._accept(found)
                late = time.monotonic() - CLIENT_SECONDS
                for client, (_, _, since) in list(self._clients.items()):
                    if since < late:
                        self._close(client)

    def _accept(self, listener: socket.socket) -> None:
        try:
            port = listener.getsockname()[1]
            client, _ = listener.accept()
        except OSError:
            return
        client.setblocking(False)
        self._clients[client] = (port, b"", time.monotonic())
        self._selector.register(client, selectors.EVENT_READ)

    def _read(self, client: socket.socket) -> None:
        port, data, since = self._clients[client]
        try:
            more = client.recv(MAX_REQUEST)
            data += more
            if more and _END not in data and len(data) < MAX_REQUEST:
                self._clients[client] = (port, data, since)
                return
            if more and port in self._answers:
                client.send(_response(self._answers[port]))
        except OSError:
            pass
        self._close(client)

    def _close(self, client: socket.socket) -> None:
        del self._clients[client]
        self._selector.unregister(client)
        client.close()


def _listen(port: int) -> socket.socket:
    """For both families; IPv4 alone where there is no other. OSError."""
    listener = socket.create_server(
        ("", port),
        family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
        dualstack_ipv6=socket.has_dualstack_ipv6(),
        backlog=128,
    )
    listener.setblocking(False)
    return listener


def _response(health: Health) -> bytes:
    namespace, _, name = health.service.partition("/")
    body = json.dumps(
        {
            "service": {"namespace": namespace, "name": name},
            "localEndpoints": health.endpoints,
            "serviceProxyHealthy": True,
        }
    ).encode()
    status = "200 OK" if health.endpoints else "503 Service Unavailable"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"X-Load-Balancing-Endpoint-Weight: {health.endpoints}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
