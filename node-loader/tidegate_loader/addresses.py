"""Address text to the 16 bytes that every map uses, and the proofs over them.

IPv4 is the mapped form ::ffff:a.b.c.d, a prefix of n bits is 96 + n. Pure: the
socket module is used for parsing only. No map, file or policy here.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable
from itertools import repeat
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

MAPPED = bytes(10) + b"\xff\xff"
"""The first 12 bytes of every IPv4 address."""
MAPPED_BITS = 96
ZERO = bytes(16)

Prefix = tuple[int, bytes]
"""(bits of 128, 16 address bytes)."""

_WORD = 0xFFFFFFFF
_K0, _K1, _K2, _KPORT = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F
_words = struct.Struct("=IIII").unpack
_port_word = struct.Struct("=H").unpack
_be16 = struct.Struct(">H").pack


def pack(text: str) -> bytes:
    """16 bytes of an address in text form; ValueError when it is not one."""
    try:
        if ":" in text:
            return inet_pton(AF_INET6, text)
        return MAPPED + inet_pton(AF_INET, text)
    except OSError:
        raise ValueError(f"not an address: {text!r}") from None


def all_hosts4(cidrs: list[str]) -> bool:
    """Whether all look like "a.b.c.d/32"; of many at once."""
    joined = "\n".join(cidrs) + "\n"
    return ":" not in joined and joined.count("/32\n") == len(cidrs) == joined.count("\n")


def pack_hosts4(cidrs: Iterable[str]) -> list[bytes]:
    """`pack` of many "a.b.c.d/32"; ValueError when one is not."""
    try:
        found = map(inet_pton, repeat(AF_INET), [cidr[:-3] for cidr in cidrs])
        return [MAPPED + address for address in found]
    except OSError:
        raise ValueError("not an IPv4 host prefix") from None


def parse_prefix(cidr: str) -> Prefix:
    """ "10.0.0.0/8" -> (104, 16 bytes). ValueError: not a prefix, or host bits are set."""
    text, slash, length = cidr.partition("/")
    address = pack(text)
    offset = 0 if ":" in text else MAPPED_BITS
    if not slash or not length.isascii() or not length.isdigit():
        raise ValueError(f"not a prefix: {cidr!r}")
    bits = int(length) + offset
    if bits > 128 or mask(address, bits) != address:
        raise ValueError(f"not a prefix, or one with host bits: {cidr!r}")
    return bits, address


def mask(address: bytes, bits: int) -> bytes:
    """`address` with all but its first `bits` bits cleared."""
    if bits >= 128:
        return address
    keep = (1 << 128) - (1 << (128 - bits))
    return (int.from_bytes(address, "big") & keep).to_bytes(16, "big")


def is_v4(address: bytes) -> bool:
    return address.startswith(MAPPED)


def text(address: bytes) -> str:
    """16 bytes -> canonical text, IPv4 without the mapping."""
    if is_v4(address):
        return inet_ntop(AF_INET, address[12:])
    return inet_ntop(AF_INET6, address)


def prefix_text(prefix: Prefix) -> str:
    bits, address = prefix
    if bits >= MAPPED_BITS and is_v4(address):
        return f"{text(address)}/{bits - MAPPED_BITS}"
    return f"{inet_ntop(AF_INET6, address)}/{bits}"


def addr_proof(address: bytes) -> int:
    """docs/architecture.md, "Proofs"; the datapath's tg_addr_proof."""
    w0, w1, w2, w3 = _words(address)
    return int(((w0 * _K0) ^ (w1 * _K1) ^ (w2 * _K2) ^ w3) & _WORD)


def addr_proofs(packed: bytes) -> bytes:
    """`addr_proof` of each of the 16-byte addresses that `packed` concatenates, 4 bytes each
    as the machine stores them. A hundred thousand IPv4 addresses without a Python loop."""
    words, count = memoryview(packed).cast("I"), len(packed) // 16
    if words[2::4].tobytes() == MAPPED[8:] * count and not (
        (words[0::4].tobytes() + words[1::4].tobytes()).strip(b"\0")
    ):
        # The proofs differ from the last words by what all IPv4 addresses share.
        fixed = addr_proof(MAPPED + bytes(4)).to_bytes(4, sys.byteorder) * count
        last = int.from_bytes(words[3::4].tobytes(), "little")
        return (last ^ int.from_bytes(fixed, "little")).to_bytes(4 * count, "little")
    rows = iter(words.tolist())
    return array(
        "I",
        [
            ((w0 * _K0) ^ (w1 * _K1) ^ (w2 * _K2) ^ w3) & _WORD
            for w0, w1, w2, w3 in zip(rows, rows, rows, rows, strict=True)
        ],
    ).tobytes()


def frontend_proof(address: bytes, port: int, protocol: int) -> int:
    """The datapath's tg_frontend_proof: 16 bits."""
    word: int = _port_word(_be16(port))[0]
    x = addr_proof(address) ^ (((word | protocol << 16) * _KPORT) & _WORD)
    return (x ^ (x >> 16)) & 0xFFFF
