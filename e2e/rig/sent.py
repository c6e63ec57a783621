"""Packets sent from pods' networks by this process, which knows each of them.

Their source ports are chosen here, so every flow that is told of them can be named."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from tidegate_bpf import netns

from rig import asking
from rig.pods import Pod

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
SECONDS = 10.0
# struct tcp_info: tcpi_segs_out, and how long it may be.
SEGMENTS_OUT, TCP_INFO_BYTES = 136, 256


@dataclass(frozen=True)
class Connection:
    """As its client saw it."""

    port: int
    sent: int
    """Bytes, without headers."""
    received: int
    segments: int
    """That the client sent, its FIN among them."""


def _socket(pod: Pod, kind: socket.SocketKind, port: int) -> socket.socket:
    with netns.inside(f"/proc/{asking.pid(pod)}/ns/net"):
        made = socket.socket(socket.AF_INET, kind)
    made.settimeout(SECONDS)
    made.bind(("", port))
    return made


def datagram(source: Pod, address: str, port: int, own_port: int) -> None:
    with _socket(source, socket.SOCK_DGRAM, own_port) as sock:
        sock.sendto(b"x", (address, port))


def connection(source: Pod, address: str, port: int, own_port: int) -> Connection:
    """Asks a pod of the test image, hears the answer, closes, and hears it close."""
    received = b""
    with _socket(source, socket.SOCK_STREAM, own_port) as sock:
        sock.connect((address, port))
        sock.sendall(REQUEST)
        while not _whole(received):
            data = sock.recv(65536)
            assert data, received
            received += data
        # What it still had to acknowledge goes out now, and not between the count and the FIN.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        segments = struct.unpack_from("=I", info, SEGMENTS_OUT)[0] + 1
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096) == b""
    return Connection(own_port, len(REQUEST), len(received), segments)


def _whole(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    sizes = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
    assert not found or sizes, answer
    return bool(found) and len(body) >= sizes[0]
