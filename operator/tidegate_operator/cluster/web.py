"""/healthz, /readyz and /metrics, on a thread of their own.

May not live here: what healthy means.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

READ_SECONDS = 5.0
"""How long one client may take to send its request."""

Answer = tuple[bool, str, bytes]
"""(good, content type, body)"""


class Web:
    """`pages`: path -> what to answer. A page that raises answers 500."""

    def __init__(self, address: tuple[str, int], pages: dict[str, Callable[[], Answer]]) -> None:
        """OSError: the address cannot be had."""

        class Handler(BaseHTTPRequestHandler):
            timeout = READ_SECONDS

            def do_GET(self) -> None:
                page = pages.get(self.path.partition("?")[0])
                if page is None:
                    self.send_error(404)
                    return
                try:
                    good, kind, body = page()
                except Exception as error:
                    good, kind, body = False, "text/plain", f"{error!r}\n".encode()
                self.send_response(200 if good else 500)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every few seconds: nothing worth a line."""

        ThreadingHTTPServer.daemon_threads = True
        self._server = ThreadingHTTPServer(address, Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def verdict(faults: list[str]) -> Answer:
    """Good without faults, else it says them."""
    text = "".join(f"{fault}\n" for fault in faults) or "ok\n"
    return not faults, "text/plain; charset=utf-8", text.encode()
