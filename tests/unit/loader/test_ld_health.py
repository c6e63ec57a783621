"""Health check ports: what they answer, over real sockets on loopback."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from contextlib import closing

import pytest
from support.waiting import until
from tidegate_loader.health import MAX_CLIENTS, Server
from tidegate_loader.services import Health


def free_port() -> int:
    with closing(socket.create_server(("", 0))) as found:
        port: int = found.getsockname()[1]
        return port


def ask(port: int, host: str = "127.0.0.1") -> tuple[int, dict[str, object], str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/any", timeout=5) as found:
            weight = found.headers["X-Load-Balancing-Endpoint-Weight"]
            return found.status, json.load(found), weight
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers["X-Load-Balancing-Endpoint-Weight"]


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_yes_no_and_gone(host: str) -> None:
    server, port = Server(), free_port()
    service = {"namespace": "ns", "name": "web"}
    for endpoints, status in ((2, 200), (0, 503)):
        assert server.serve({port: Health("ns/web", endpoints)}) == []
        body = {"service": service, "localEndpoints": endpoints, "serviceProxyHealthy": True}
        assert ask(port, host) == (status, body, str(endpoints))
    assert server.serve({}) == []
    assert refused(port)


def test_a_port_that_is_taken_is_a_problem_and_stops_no_other() -> None:
    server, port = Server(), free_port()
    with closing(socket.create_server(("", 0))) as holder:
        taken = holder.getsockname()[1]
        (text,) = server.serve({taken: Health("ns/a", 1), port: Health("ns/b", 1)})
    assert text.startswith(f"ns/a: health check port {taken}: ")
    assert ask(port)[0] == 200
    server.serve({})


def test_clients_that_say_nothing_or_too_much_stop_nobody() -> None:
    server, port = Server(), free_port()
    server.serve({port: Health("ns/web", 1)})
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_CLIENTS // 2)]
    with closing(socket.create_connection(("127.0.0.1", port))) as chatty:
        chatty.sendall(b"x" * 9000)
        until(lambda: _ended(chatty), "a request without an end is let go", 5)
    assert ask(port)[0] == 200
    for found in silent:
        found.close()
    server.serve({})


def _ended(client: socket.socket) -> bool:
    client.settimeout(1)
    try:
        return b"HTTP" in client.recv(100) or True
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
