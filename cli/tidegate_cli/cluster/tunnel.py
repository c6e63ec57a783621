"""A Unix socket here that leads to one in a container: by exec, so no port is opened anywhere.

Each connection is a process of its own there, `tidegate-cni pipe`, whose input and output are
joined to it. Who may exec in the pod may use it, and nobody else. What is said over it is not known
here.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidegate_cli.errors import CliError

CHUNK = 1 << 16
IDLE_MS = 1000
OUT, ERR = 1, 2
"""Channels of an exec."""


class Tunnel:
    """Listens until `close`."""

    def __init__(self, path: Path, start: Callable[[], Any]) -> None:
        """`start`: starts the process, see `Api.begin`; CliError."""
        self.path = path
        self.trouble = ""
        """Why the last connection could not be made, or what its process complained of."""
        self._start = start
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._accept, name=f"tunnel-{path.name}", daemon=True).start()

    def close(self) -> None:
        # Closed alone, it would still wait in accept().
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                stream = self._start()
            except CliError as error:
                self.trouble = str(error)
                return
            try:
                self._join(connection, stream)
            except (OSError, _closed()) as error:
                self.trouble = str(error)
            finally:
                with contextlib.suppress(Exception):  # it may be gone, and how is all the same
                    stream.close()

    def _join(self, connection: socket.socket, stream: Any) -> None:
        """One thread for both ways: a TLS connection is not for two."""
        poll = select.poll()
        remote = stream.sock.sock
        poll.register(remote, select.POLLIN)
        poll.register(connection, select.POLLIN)
        while stream.is_open():
            held = isinstance(remote, ssl.SSLSocket) and remote.pending()
            ready = {number for number, _ in poll.poll(0 if held else IDLE_MS)}
            if held or remote.fileno() in ready:
                stream.update(timeout=0)
            if connection.fileno() in ready:
                data = connection.recv(CHUNK)
                if not data:
                    return
                stream.write_stdin(data)
            data = stream.read_channel(OUT)
            if data:
                connection.sendall(data)
                self.trouble = ""
            said = stream.read_channel(ERR)
            if said:
                self.trouble = said.decode(errors="replace").strip()


def _closed() -> type[Exception]:
    from websocket import WebSocketException  # noqa: PLC0415 - comes with kubernetes, as slowly

    found: type[Exception] = WebSocketException
    return found
