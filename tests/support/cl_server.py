"""A server of long connections: `cl_server.py NAME ADDRESS PORT`, a line there and a line back.

On SIGTERM it ends as a gRPC server does that is told to: it answers what comes, tells each client
with that answer that it was the last, takes no new connections once none has come for a while,
and goes when all have.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading

QUIET_SECONDS = 0.5


def serve(connection: socket.socket, name: bytes, ends: threading.Event) -> None:
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            last = ends.is_set()
            connection.sendall((b"last " if last else b"more ") + name + b" " + line)
            if last:
                return


def main(name: str, address: str, port: str) -> None:
    ends = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ends.set())
    listener = socket.create_server((address, int(port)), backlog=1024)
    listener.settimeout(QUIET_SECONDS)
    threads: list[threading.Thread] = []
    while True:
        told = ends.is_set()
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if told:
                break
            continue
        connection.settimeout(None)
        threads.append(threading.Thread(target=serve, args=(connection, name.encode(), ends)))
        threads[-1].start()
    listener.close()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
