"""Connected sockets for datagrams whose backend is gone, in a network namespace of their own."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from tidegate_bpf import netns
from tidegate_loader import addresses, datagrams

pytestmark = pytest.mark.kernel
SO_COOKIE = 57


@pytest.fixture(scope="module", autouse=True)
def namespace() -> Iterator[None]:
    name = f"tgt-udp-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        with netns.inside(f"/run/netns/{name}"):
            found = datagrams.supported()
            if not found.ok:
                pytest.skip(found.detail)
            yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def cookie(of: socket.socket) -> int:
    return int.from_bytes(of.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


@pytest.mark.parametrize(
    ("family", "host"), [(2, "127.0.0.1"), (10, "::1"), (10, "::ffff:127.0.0.1")]
)
def test_who_is_told(family: int, host: str) -> None:
    """Of the sockets connected to what is gone, those that asked for a Service; nobody else."""
    with ExitStack() as stack:

        def made(kind: int = socket.SOCK_DGRAM) -> socket.socket:
            return stack.enter_context(closing(socket.socket(family, kind)))

        first, second = made(), made()
        for server in (first, second):
            server.bind((host, 0))
        asked, direct, other, free = made(), made(), made(), made()
        for client, server in ((asked, first), (direct, first), (other, second)):
            client.connect(server.getsockname())
        free.bind((host, 0))
        text = host.removeprefix("::ffff:")
        gone = (addresses.pack(text), first.getsockname()[1])
        seen = []

        def by_service(number: int, backend: datagrams.BackendAddress) -> bool:
            seen.append((number, backend))
            return number == cookie(asked)

        assert datagrams.destroy([gone], by_service) == 1
        assert sorted(seen) == sorted((cookie(c), gone) for c in (asked, direct))
        with pytest.raises(OSError, match="Destination address") as caught:
            asked.send(b"x")
        assert caught.value.errno == errno.EDESTADDRREQ
        asked.settimeout(10)
        with pytest.raises(ConnectionAbortedError):
            asked.recv(1)
        for client in (direct, other):
            client.send(b"x")
        free.sendto(b"x", second.getsockname())
        asked.connect(second.getsockname())
        asked.send(b"x")
        assert datagrams.destroy([gone], lambda _number, _backend: False) == 0
