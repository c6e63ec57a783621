"""What may stand between a client and an API server, and go wrong: an HTTP proxy with faults.

Speaks plain HTTP on loopback, or TLS where it is told to, and is to the server whoever `upstream`'s
access says, or whom a request's token says. Knows lists and
watches just well enough to break them in the ways that networks, load balancers and servers
do. While `rate` is 0 it only passes on; it adds a bookmark to a watch that has been quiet for
BOOKMARK_SECONDS, as a server may, so that a client with short patience is not confused.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import random
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import urllib3

BOOKMARK_SECONDS = 0.4
HALF_OPEN_SECONDS = 30.0
"""As long the proxy says nothing on a connection; the client should have gone by then."""

REQUEST_FAULTS = ("429", "429-later", "500", "503", "504", "closed", "page", "cut", "slow", "mute")
"""Of requests that are no watch, and of the beginning of watches. `page` answers with HTML."""
WATCH_FAULTS = ("410", "error", "twice", "again", "swapped", "lost", "cut", "torn", "garbage",
                "slow", "mute")  # fmt: skip
"""Of one line of a watch. `again`: a line from long ago; `lost`: it and all after it, as the
connection goes down; `torn`: half of it, as the connection goes down; `mute`: nothing comes
any more, but the connection stays. No order or loss that the client could not notice."""

ALL_FAULTS = frozenset(REQUEST_FAULTS + WATCH_FAULTS)


class _Access(Protocol):
    def tls(self) -> ssl.SSLContext: ...


class Upstream(Protocol):
    """An API server at 127.0.0.1."""

    @property
    def port(self) -> int: ...

    @property
    def access(self) -> _Access: ...


class _Cut(Exception):
    """Close the connection now."""


class FaultProxy:
    """`rate`: probability of a fault per request and per line; `faults`: those made, by kind."""

    def __init__(
        self,
        upstream: Upstream,
        seed: int,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: what it shows to clients; None: it speaks plain HTTP."""
        access = upstream.access
        self.rate = 0.0
        self.kinds = ALL_FAULTS
        self.blocked = False
        """As if the server could not be reached."""
        self.mute_all = False
        """Nothing passes any more, and nothing is closed."""
        self.swallow = 0
        """So many lines of watches are dropped in silence: nobody can notice."""
        self.faults: Counter[str] = Counter()
        self.lists = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self.pool = urllib3.HTTPSConnectionPool(
            "127.0.0.1", upstream.port, ssl_context=access.tls(), maxsize=32
        )
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = http.server.ThreadingHTTPServer((host, 0), Handler)
        self._scheme = "http" if tls is None else "https"
        if tls is not None:
            # In the handler's thread, not in the one that accepts.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}"

    @property
    def count(self) -> int:
        with self._lock:
            return sum(self.faults.values())

    def draw(self, among: tuple[str, ...], scope: str) -> str:
        """A fault to make, counted, or "" for none."""
        with self._lock:
            possible = [fault for fault in among if fault in self.kinds]
            if not possible or self._random.random() >= self.rate:
                return ""
            fault = self._random.choice(possible)
            self.faults[f"{scope} {fault}"] += 1
            return fault

    def swallows(self) -> bool:
        with self._lock:
            self.swallow, before = max(0, self.swallow - 1), self.swallow
            return before > 0

    def number(self, most: float) -> float:
        with self._lock:
            return self._random.uniform(0.0, most)

    def wait(self, seconds: float) -> None:
        """A pause that ends early with the proxy."""
        self._ended.wait(seconds)

    def cut_all(self) -> None:
        """Every connection goes down."""
        with self._lock:
            held = list(self._open)
        for each in held:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self.cut_all()
        self._thread.join()
        self._server.server_close()
        self.pool.close()


@contextlib.contextmanager
def proxied(
    upstream: Upstream, seed: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream, seed, host, tls)
    try:
        yield proxy
    finally:
        proxy.close()


def _status(code: int, reason: str, message: str) -> bytes:
    return json.dumps(
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }
    ).encode()


_REASONS = {
    "429": "TooManyRequests",
    "500": "InternalError",
    "503": "ServiceUnavailable",
    "504": "Timeout",
}


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.owner.opened(self.connection)

    def finish(self) -> None:
        self.owner.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _handle(self) -> None:
        try:
            if self.owner.blocked:
                raise _Cut
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            query = parse_qs(urlsplit(self.path).query)
            if query.get("watch") == ["true"]:
                self._watch(query["resourceVersion"][0])
            else:
                self._request(body)
        except (_Cut, OSError, urllib3.exceptions.HTTPError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    # ---- one answer ----

    def _request(self, body: bytes | None) -> None:
        fault = self.owner.draw(REQUEST_FAULTS, "request")
        if self._instead(fault):
            return
        answer = self._forward(body)
        data = answer.read()
        answer.release_conn()
        if self.command == "GET" and "limit=" in self.path:
            self.owner.lists += 1
        if fault == "cut":
            self._head(answer.status, len(data))
            self.wfile.write(data[: int(self.owner.number(len(data)))])
            raise _Cut
        self._whole(answer.status, data, answer.headers.get("Retry-After"))

    def _instead(self, fault: str) -> bool:
        """Whether the fault was an answer. _Cut: it was none."""
        if fault in ("429", "429-later"):
            message = _status(429, _REASONS["429"], "too many requests, please try again")
            self._whole(429, message, "1" if fault == "429-later" else None)
        elif fault in _REASONS:
            self._whole(int(fault), _status(int(fault), _REASONS[fault], "a fault"))
        elif fault == "page":
            self._whole(200, b"<html><body>Service temporarily unavailable</body></html>")
        elif fault == "closed":
            raise _Cut
        elif fault == "mute":
            self._mute()
        else:
            if fault == "slow":
                self.owner.wait(self.owner.number(0.3))
            return False
        return True

    def _mute(self) -> None:
        """Until the client hangs up, or far too late."""
        self.connection.settimeout(HALF_OPEN_SECONDS)
        with contextlib.suppress(OSError):
            self.connection.recv(1)
        raise _Cut

    def _forward(self, body: bytes | None, read: float = 30.0) -> urllib3.BaseHTTPResponse:
        kept = ("Content-Type", "Accept", "User-Agent", "Authorization")
        headers = {name: self.headers[name] for name in kept if name in self.headers}
        return self.owner.pool.urlopen(
            self.command,
            self.path,
            body=body,
            headers=headers,
            preload_content=False,
            retries=False,
            timeout=urllib3.Timeout(connect=5.0, read=read),
        )

    def _head(self, status: int, length: int | None, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _whole(self, status: int, data: bytes, retry_after: str | None = None) -> None:
        self._head(status, len(data), retry_after)
        self.wfile.write(data)

    # ---- a watch ----

    def _watch(self, version: str) -> None:
        fault = self.owner.draw(REQUEST_FAULTS, "watch request")
        if self._instead(fault):
            return
        answer = self._forward(None, read=120.0)
        if answer.status != 200:
            self._whole(answer.status, answer.read())
            return
        self._head(200, None)
        if fault == "cut":
            raise _Cut
        lines: queue.Queue[bytes | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(answer, lines), daemon=True)
        reader.start()
        try:
            self._lines(lines, version)
        finally:
            with contextlib.suppress(Exception):
                answer.shutdown()
            reader.join(5.0)
            answer.close()

    def _lines(self, lines: queue.Queue[bytes | None], version: str) -> None:
        past: list[bytes] = []
        while True:
            try:
                line = lines.get(timeout=BOOKMARK_SECONDS)
            except queue.Empty:
                if not self.owner.mute_all:
                    self._chunk(_bookmark(version))
                continue
            if line is None:
                self.wfile.write(b"0\r\n\r\n")
                return
            if self.owner.mute_all:
                self._mute()
            if self.owner.swallows():
                continue
            sent = self._line(line, past, lines)
            past.append(line)
            version = _version(sent) or version

    def _line(self, line: bytes, past: list[bytes], lines: queue.Queue[bytes | None]) -> bytes:
        """Passes it on, or what a fault makes of it; the last line that was sent."""
        fault = self.owner.draw(WATCH_FAULTS, "line")
        if fault == "410":
            status = _status(410, "Expired", "too old resource version")
            self._chunk(b'{"type":"ERROR","object":' + status + b"}\n")
            raise _Cut
        if fault == "error":
            status = _status(500, "InternalError", "a fault")
            self._chunk(b'{"type":"ERROR","object":' + status + b"}\n")
            raise _Cut
        if fault in ("lost", "cut", "torn", "garbage"):
            self._chunk({"lost": b"", "cut": line, "torn": line[: len(line) // 2],
                         "garbage": b'{"type":"ADDED","object":[]}\n'}[fault])  # fmt: skip
            raise _Cut
        if fault == "mute":
            self._mute()
        if fault == "swapped":
            with contextlib.suppress(queue.Empty):
                following = lines.get(timeout=0.2)
                if following is None:
                    raise _Cut
                self._chunk(following)
                self._chunk(line)
                return following
        if fault == "again" and past:
            # Mostly of the near past: where objects were that have gone since.
            self._chunk(past[-1 - int(min(self.owner.number(8.0), len(past) - 1))])
        if fault == "slow":
            self.owner.wait(self.owner.number(0.3))
        self._chunk(line * 2 if fault == "twice" else line)
        return line

    def _chunk(self, data: bytes) -> None:
        """In pieces that have nothing to do with lines."""
        while data:
            size = max(1, int(self.owner.number(2 * len(data))))
            piece, data = data[:size], data[size:]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))


def _read_lines(answer: urllib3.BaseHTTPResponse, lines: queue.Queue[bytes | None]) -> None:
    rest = b""
    with contextlib.suppress(urllib3.exceptions.HTTPError, OSError, ValueError):
        for chunk in answer.read_chunked():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line + b"\n")
    lines.put(None)


def _version(line: bytes) -> str:
    return str(json.loads(line)["object"]["metadata"].get("resourceVersion", ""))


def _bookmark(version: str) -> bytes:
    bookmark = {
        "type": "BOOKMARK",
        "object": {
            "kind": "ConfigMap",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": version},
        },
    }
    return json.dumps(bookmark).encode() + b"\n"
