"""Sends SYNs, each of a flow of its own, as raw frames from the pod it runs in.

    python ca_flood.py POD_MAC HOST_MAC SOURCE DESTINATION COUNT

Prints how many were sent.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import frames

SPORTS = range(1024, 65536)
FIRST_DPORT = 8080


def main() -> None:
    pod_mac, host_mac, src, dst, count = sys.argv[1:]
    name = next(name for _, name in socket.if_nameindex() if name != "lo")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((name, 0))
        sent = 0
        while sent < int(count):
            sent += _port(sock, (pod_mac, host_mac, src, dst), sent, int(count) - sent)
    print(sent)


def _port(sock: socket.socket, ends: tuple[str, str, str, str], sent: int, left: int) -> int:
    """One SYN from each source port to the next destination port."""
    pod_mac, host_mac, src, dst = ends
    dport = FIRST_DPORT + sent // len(SPORTS)
    tcp = frames.tcp(src, dst, 0, dport)
    frame = bytearray(frames.eth(frames.ip(src, dst, frames.TCP, tcp), src=pod_mac, dst=host_mac))
    at, check = len(frame) - len(tcp), struct.unpack("!H", tcp[16:18])[0] ^ 0xFFFF
    ports = SPORTS[:left]
    for sport in ports:
        struct.pack_into("!H", frame, at, sport)
        total = check + sport
        struct.pack_into("!H", frame, at + 16, ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF)
        sock.send(frame)
    return len(ports)


if __name__ == "__main__":
    main()
