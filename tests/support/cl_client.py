"""Clients of `cl_server`: `cl_client.py ADDRESS PORT LONG SHORT`, until standard input ends.

LONG of them keep one connection each and make another only when they are told to; SHORT make one
for each request; each makes one more request when it is to end. Prints a line when each has had an
answer, and at the end {"answered": {server: requests}, "failed": [in words]}.
"""

from __future__ import annotations

import collections
import json
import socket
import sys
import threading
import time

PAUSE = 0.005
SECONDS = 20.0
"""For one request: a request that is lost for good, not one on a busy machine."""


class Client(threading.Thread):
    def __init__(self, to: tuple[str, int], keeps: bool, ends: threading.Event) -> None:
        super().__init__()
        self.answered: collections.Counter[str] = collections.Counter()
        self.failed = ""
        self.begun = threading.Event()
        """An answer has come, or none will."""
        self._to, self._keeps, self._ends = to, keeps, ends
        self._socket: socket.socket | None = None

    def run(self) -> None:
        number, last = 0, False
        while not last and not self.failed:
            number, last = number + 1, self._ends.is_set()
            try:
                self._request(f"{number}")
            except (OSError, ValueError) as error:
                kind = "long" if self._keeps else "short"
                how = "connected" if self._socket else "connecting"
                self.failed = f"{kind}, request {number}, {how}: {error!r}, {self.answered}"
            self.begun.set()
            time.sleep(PAUSE)
        self._drop()

    def _request(self, text: str) -> None:
        if self._socket is None:
            self._socket = socket.create_connection(self._to, SECONDS)
        self._socket.sendall(text.encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            more = self._socket.recv(4096)
            if not more:
                raise ValueError(f"the connection ended after {data!r}")
            data += more
        word, server, back = data.decode().split()
        if back != text:
            raise ValueError(f"{back} for {text}")
        self.answered[server] += 1
        if word == "last" or not self._keeps:
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def main(address: str, port: str, long: str, short: str) -> None:
    ends = threading.Event()
    kinds = [True] * int(long) + [False] * int(short)
    clients = [Client((address, int(port)), keeps, ends) for keeps in kinds]
    for client in clients:
        client.start()
    for client in clients:
        client.begun.wait()
    print("begun", flush=True)
    sys.stdin.read()
    ends.set()
    answered: collections.Counter[str] = collections.Counter()
    for client in clients:
        client.join()
        answered += client.answered
    failed = [client.failed for client in clients if client.failed]
    print(json.dumps({"answered": answered, "failed": failed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
