"""Figures by HTTP, and as a file for those who scrape none."""

from __future__ import annotations

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tidegate_observer.metrics import Metrics

WRITE_SECONDS = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class Exposition:
    """A context manager. `address` "HOST:PORT", or "" for no HTTP. OSError."""

    def __init__(self, figures: Metrics, address: str) -> None:
        self._figures = figures
        self._due = 0.0
        self._server: ThreadingHTTPServer | None = None
        if address:
            host, _, port = address.rpartition(":")
            kind = _Server6 if ":" in host else ThreadingHTTPServer
            self._server = kind((host.strip("[]"), int(port)), _handler(figures))

    def __enter__(self) -> Exposition:
        if self._server is not None:
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def write(self, path: Path | None) -> None:
        """By rename, so that no reader sees half of it; now and then."""
        if path is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + WRITE_SECONDS
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(self._figures.text())
        os.replace(temporary, path)


def _handler(figures: Metrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            data = figures.text() if found else b"/metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """A scrape is no event."""

    return Handler
