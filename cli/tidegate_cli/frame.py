"""The synthetic packet that `explain` shows the program: an Ethernet frame that opens a flow.

Bytes only; no policy, no kernel.
"""

from __future__ import annotations

import socket
import struct

ETH_IPV4, ETH_IPV6 = 0x0800, 0x86DD
TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
SOURCE_PORT = 61000
"""Above Linux' default ephemeral range, so that no flow of a pod is met by chance."""
ECHO_ID = 61000
_TTL = 64
_SYN = 0x02


def opening(
    macs: tuple[bytes, bytes],
    src: str,
    dst: str,
    protocol: int,
    port: int,
    *,
    sport: int = SOURCE_PORT,
) -> bytes:
    """The first packet of a flow: TCP SYN, UDP of 8 bytes, SCTP INIT, ICMP or ICMPv6 (then `port`
    is type << 8 | code). `macs`: (source, destination), 6 bytes each."""
    six = ":" in src
    family = socket.AF_INET6 if six else socket.AF_INET
    a, b = socket.inet_pton(family, src), socket.inet_pton(family, dst)
    body = _transport(a, b, protocol, (SOURCE_PORT, port))
    ether = macs[1] + macs[0] + struct.pack("!H", ETH_IPV6 if six else ETH_IPV4)
    if six:
        return ether + struct.pack("!IHBB", 6 << 28, len(body), protocol, _TTL) + a + b + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, _TTL, protocol, 0) + a + b
    return ether + head[:10] + struct.pack("!H", _sum(head)) + head[12:] + body


def destination(frame: bytes, protocol: int) -> tuple[str, int]:
    """(address, port) that a frame made by `opening` is bound for now."""
    six = struct.unpack_from("!H", frame, 12)[0] == ETH_IPV6
    at, size = (38, 16) if six else (30, 4)
    text = socket.inet_ntop(socket.AF_INET6 if six else socket.AF_INET, frame[at : at + size])
    ported = protocol in (TCP, UDP, SCTP)
    return text, struct.unpack_from("!H", frame, at + size + 2)[0] if ported else 0


def _transport(a: bytes, b: bytes, protocol: int, ports: tuple[int, int]) -> bytes:
    if protocol == TCP:
        data = struct.pack("!HHIIBBHHH", *ports, 1, 0, 0x50, _SYN, 65535, 0, 0)
        return _checked(a, b, protocol, data, 16)
    if protocol == UDP:
        return _checked(a, b, protocol, struct.pack("!HHHH", *ports, 16, 0) + bytes(8), 6)
    if protocol == SCTP:
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 1, 1, 1)
        packet = struct.pack("!HHII", *ports, 0, 0) + init
        return packet[:8] + struct.pack("<I", _crc32c(packet)) + packet[12:]
    if protocol == ICMP:
        data = struct.pack("!HHHH", ports[1], 0, ECHO_ID, 1)
        return data[:2] + struct.pack("!H", _sum(data)) + data[4:]
    if protocol == ICMPV6:
        return _checked(a, b, protocol, struct.pack("!HHHH", ports[1], 0, ECHO_ID, 1), 2)
    raise ValueError(f"protocol {protocol}")


def _checked(a: bytes, b: bytes, protocol: int, data: bytes, at: int) -> bytes:
    """`data` with its checksum over the pseudo header put in at `at`."""
    pseudo = a + b + struct.pack("!II", len(data), protocol)
    return data[:at] + struct.pack("!H", _sum(pseudo + data) or 0xFFFF) + data[at + 2 :]


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
