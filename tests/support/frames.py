"""Raw Ethernet frames: built field by field, parsed back with every checksum
verified, mutated.

The second implementation that judges the datapath's header rewriting, so it
shares nothing with it: no Tidegate package, no libpcap, no kernel help.

Builders take the payload they carry as bytes and return bytes; layers nest
from the inside out:

    eth(IPv4("10.0.0.1", "10.0.0.2", TCP, tcp("10.0.0.1", "10.0.0.2", 1000, 80)).encode())

`packet` spells that once for the common case. MAC addresses are text
("02:00:00:00:00:01"), IP addresses text, ports ints in host order.

`parse` never raises: what cannot be read is left unset, and `problem` says where
it stopped.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

ETH_IPV4, ETH_ARP, ETH_IPV6, ETH_VLAN, ETH_QINQ = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8
HOP_BY_HOP, ICMP, TCP, UDP, ROUTING, FRAGMENT = 0, 1, 6, 17, 43, 44
ESP, AH, ICMPV6, NO_NEXT, DEST_OPTS, SCTP = 50, 51, 58, 59, 60, 132
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
RS, RA, NS, NA, REDIRECT = 133, 134, 135, 136, 137

MAC_A, MAC_B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
BROADCAST = "ff:ff:ff:ff:ff:ff"

Check = Literal["ok", "bad", "none", "unknown"]
"""none: the sender left it out (UDP over IPv4); unknown: not all bytes that it
covers are here (fragments, quoted packets)."""


# ---- checksums ---------------------------------------------------------------------


def ones_sum(data: bytes) -> int:
    """RFC 1071: the 16-bit one's complement sum, not inverted."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return ones_sum(data) ^ 0xFFFF


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC32C = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Castagnoli, as SCTP uses it; stored in the header little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def ip_bytes(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def ip_text(data: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6 if len(data) == 16 else socket.AF_INET, data)


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def mac_text(data: bytes) -> str:
    return data.hex(":")


def _pseudo(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    if len(src) == 4:
        return src + dst + struct.pack("!BBH", 0, protocol, length)
    return src + dst + struct.pack("!I3xB", length, protocol)


def _l4_checksum(src: str, dst: str, protocol: int, data: bytes) -> int:
    """`dst` is the final destination, which is not the header's where a routing
    header has segments left."""
    return checksum(_pseudo(ip_bytes(src), ip_bytes(dst), protocol, len(data)) + data)


# ---- link layer ----------------------------------------------------------------------


def eth(
    payload: bytes,
    ethertype: int = 0,
    src: str = MAC_A,
    dst: str = MAC_B,
    vlans: Sequence[int] = (),
) -> bytes:
    """An Ethernet frame; `ethertype` 0 follows the payload's IP version.
    `vlans` are tag control words, outermost first; all but the last are 802.1ad."""
    ethertype = ethertype or (ETH_IPV6 if payload[:1] and payload[0] >> 4 == 6 else ETH_IPV4)
    tags = b"".join(
        struct.pack("!HH", ETH_VLAN if index == len(vlans) - 1 else ETH_QINQ, tag)
        for index, tag in enumerate(vlans)
    )
    return mac_bytes(dst) + mac_bytes(src) + tags + struct.pack("!H", ethertype) + payload


def arp(operation: int, sender_mac: str, sender_ip: str, target_mac: str, target_ip: str) -> bytes:
    """Payload for `eth(..., ETH_ARP)`; operation 1 asks, 2 answers."""
    head = struct.pack("!HHBBH", 1, ETH_IPV4, 6, 4, operation)
    sender = mac_bytes(sender_mac) + ip_bytes(sender_ip)
    return head + sender + mac_bytes(target_mac) + ip_bytes(target_ip)


# ---- network layer -------------------------------------------------------------------


@dataclass(frozen=True)
class IPv4:
    src: str
    dst: str
    protocol: int
    payload: bytes
    ttl: int = 64
    ident: int = 1
    offset: int = 0
    """Of the fragment, in bytes; a multiple of 8."""
    more: bool = False
    dont: bool = False
    options: bytes = b""
    """Padded to a multiple of 4."""
    tos: int = 0

    def encode(self) -> bytes:
        options = self.options + b"\0" * (-len(self.options) % 4)
        flags = self.offset >> 3 | self.more << 13 | self.dont << 14
        words = 5 + len(options) // 4
        head = struct.pack(
            "!BBHHHBBH4s4s",
            4 << 4 | words,
            self.tos,
            words * 4 + len(self.payload),
            self.ident,
            flags,
            self.ttl,
            self.protocol,
            0,
            ip_bytes(self.src),
            ip_bytes(self.dst),
        )
        head += options
        return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + self.payload


@dataclass(frozen=True)
class Ext:
    """One extension header. `body` is what follows the next-header byte (for
    AH and the 8-byte-unit headers: what follows the length byte); padded with
    zeros to the header's unit, which is PadN or harmless everywhere."""

    protocol: int
    body: bytes

    def encode(self, next_header: int) -> bytes:
        if self.protocol == FRAGMENT:
            return bytes([next_header]) + self.body
        data = self.body + b"\0" * (-(len(self.body) + 2) % 8)
        units = (len(data) + 2) // 4 - 2 if self.protocol == AH else (len(data) + 2) // 8 - 1
        return bytes([next_header, units]) + data


def hop_by_hop(options: bytes = b"\x01\x04\0\0\0\0") -> Ext:
    return Ext(HOP_BY_HOP, options)


def dest_opts(options: bytes = b"\x01\x04\0\0\0\0") -> Ext:
    return Ext(DEST_OPTS, options)


def routing(kind: int, segments_left: int, addresses: Sequence[str]) -> Ext:
    """Type 0 (source route) or 2 (mobile IPv6's home address)."""
    body = struct.pack("!BBI", kind, segments_left, 0) + b"".join(map(ip_bytes, addresses))
    return Ext(ROUTING, body)


def fragment_header(ident: int, offset: int, more: bool) -> Ext:
    """`offset` in bytes, a multiple of 8."""
    return Ext(FRAGMENT, struct.pack("!BHI", 0, offset | more, ident))


def auth(spi: int = 1, sequence: int = 1, icv: bytes = bytes(12)) -> Ext:
    return Ext(AH, struct.pack("!HII", 0, spi, sequence) + icv)


@dataclass(frozen=True)
class IPv6:
    src: str
    dst: str
    protocol: int
    payload: bytes
    hop_limit: int = 64
    extensions: Sequence[Ext] = ()
    flow: int = 0
    """Traffic class << 20 | flow label."""

    def encode(self) -> bytes:
        chain, next_header = self.payload, self.protocol
        for extension in reversed(self.extensions):
            chain = extension.encode(next_header) + chain
            next_header = extension.protocol
        head = struct.pack("!IHBB", 6 << 28 | self.flow, len(chain), next_header, self.hop_limit)
        return head + ip_bytes(self.src) + ip_bytes(self.dst) + chain


def ip(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    """A plain packet of the family of `src`."""
    if ":" in src:
        return IPv6(src, dst, protocol, payload).encode()
    return IPv4(src, dst, protocol, payload).encode()


def fragment4(whole: IPv4, size: int) -> list[bytes]:
    """`whole` as packets of `size` payload bytes (a multiple of 8) each."""
    pieces = [(at, whole.payload[at : at + size]) for at in range(0, len(whole.payload), size)]
    return [
        IPv4(
            whole.src,
            whole.dst,
            whole.protocol,
            piece,
            whole.ttl,
            whole.ident,
            at,
            at + size < len(whole.payload),
            False,
            whole.options,
            whole.tos,
        ).encode()
        for at, piece in pieces
    ]


def fragment6(whole: IPv6, size: int, ident: int = 1) -> list[bytes]:
    """`whole` as packets of `size` payload bytes (a multiple of 8) each; its
    extension headers count as unfragmentable."""
    data = whole.payload
    return [
        IPv6(
            whole.src,
            whole.dst,
            whole.protocol,
            data[at : at + size],
            whole.hop_limit,
            [*whole.extensions, fragment_header(ident, at, at + size < len(data))],
        ).encode()
        for at in range(0, len(data), size)
    ]


# ---- transport layer -----------------------------------------------------------------


def tcp(
    src: str, dst: str, sport: int, dport: int, flags: int = SYN, payload: bytes = b""
) -> bytes:
    return TCPSegment(src, dst, sport, dport, flags, payload).encode()


@dataclass(frozen=True)
class TCPSegment:
    src: str
    dst: str
    sport: int
    dport: int
    flags: int = SYN
    payload: bytes = b""
    seq: int = 1
    ack: int = 0
    window: int = 0xFFFF
    options: bytes = b""

    def encode(self) -> bytes:
        options = self.options + b"\0" * (-len(self.options) % 4)
        data = struct.pack(
            "!HHIIBBHHH",
            self.sport,
            self.dport,
            self.seq,
            self.ack,
            (5 + len(options) // 4) << 4,
            self.flags,
            self.window,
            0,
            0,
        )
        data += options + self.payload
        return _fill(data, 16, _l4_checksum(self.src, self.dst, TCP, data))


def udp(
    src: str, dst: str, sport: int, dport: int, payload: bytes = b"", no_checksum: bool = False
) -> bytes:
    data = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    if no_checksum:
        return data
    # A computed zero is sent as all ones: zero means "none".
    return _fill(data, 6, _l4_checksum(src, dst, UDP, data) or 0xFFFF)


def sctp(sport: int, dport: int, tag: int = 0, chunks: bytes | None = None) -> bytes:
    """Without `chunks`: an INIT."""
    if chunks is None:
        chunks = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 0x10000, 1, 1, 1)
    data = struct.pack("!HHII", sport, dport, tag, 0) + chunks
    return data[:8] + struct.pack("<I", crc32c(data)) + data[12:]


def icmp(kind: int, code: int, rest: bytes = bytes(4), payload: bytes = b"") -> bytes:
    """`rest` is the four bytes after the checksum."""
    data = struct.pack("!BBH", kind, code, 0) + rest + payload
    return _fill(data, 2, checksum(data))


def icmpv6(
    src: str, dst: str, kind: int, code: int, rest: bytes = bytes(4), payload: bytes = b""
) -> bytes:
    data = struct.pack("!BBH", kind, code, 0) + rest + payload
    return _fill(data, 2, _l4_checksum(src, dst, ICMPV6, data))


def echo(src: str, dst: str, ident: int, sequence: int = 1, reply: bool = False) -> bytes:
    """An echo request or reply of the family of `src`."""
    rest = struct.pack("!HH", ident, sequence)
    if ":" in src:
        return icmpv6(src, dst, 129 if reply else 128, 0, rest, b"tidegate")
    return icmp(0 if reply else 8, 0, rest, b"tidegate")


def icmp_error(kind: int, code: int, quoted: bytes, quote: int = 0, mtu: int = 0) -> bytes:
    """ICMP error about the IPv4 packet `quoted`; `quote` bytes of it, 0: all."""
    return icmp(kind, code, struct.pack("!HH", 0, mtu), quoted[: quote or len(quoted)])


def icmpv6_error(src: str, dst: str, kind: int, code: int, quoted: bytes, word: int = 0) -> bytes:
    """ICMPv6 error about the IPv6 packet `quoted`, cut to the minimum MTU;
    `word` is the MTU or the pointer."""
    return icmpv6(src, dst, kind, code, struct.pack("!I", word), quoted[: 1280 - 48])


def nd_option(kind: int, body: bytes) -> bytes:
    """1 and 2: source and target link-layer address (a MAC); 3 prefix; 5 MTU."""
    body += b"\0" * (-(len(body) + 2) % 8)
    return bytes([kind, (len(body) + 2) // 8]) + body


def nd(
    src: str, dst: str, kind: int, target: str = "::", options: bytes = b"", flags: int = 0
) -> bytes:
    """RS, RA, NS, NA or redirect as ICMPv6; send it with hop limit 255. `flags`
    is the word after the checksum (NA: R, S, O in its top bits). A redirect's
    destination is its target."""
    bodies = {
        RS: b"",
        RA: bytes(8),
        NS: ip_bytes(target),
        NA: ip_bytes(target),
        REDIRECT: ip_bytes(target) * 2,
    }
    return icmpv6(src, dst, kind, 0, struct.pack("!I", flags), bodies[kind] + options)


def _fill(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + struct.pack("!H", value) + data[at + 2 :]


def packet(
    src: str, dst: str, protocol: int, sport: int = 40000, dport: int = 80, payload: bytes = b""
) -> bytes:
    """The plain Ethernet frame that opens such a flow: TCP SYN, UDP datagram,
    SCTP INIT, echo request (`sport` is its identifier)."""
    if protocol == TCP:
        data = tcp(src, dst, sport, dport, SYN, payload)
    elif protocol == UDP:
        data = udp(src, dst, sport, dport, payload)
    elif protocol == SCTP:
        data = sctp(sport, dport)
    elif protocol in (ICMP, ICMPV6):
        data = echo(src, dst, sport)
    else:
        data = payload
    return eth(ip(src, dst, protocol, data))


# ---- parsing -------------------------------------------------------------------------


@dataclass
class Frame:
    """What a frame says. Unset fields were not present or not reached.

    `l3` and `l4` are offsets into the parsed bytes; for the packet quoted by an
    ICMP error they are offsets into the quote. `dst` is the header's,
    `final_dst` what a routing header with segments left ends at."""

    eth_src: str = ""
    eth_dst: str = ""
    vlans: list[int] = field(default_factory=list)
    ethertype: int = 0
    arp: ARP | None = None
    version: int = 0
    src: str = ""
    dst: str = ""
    final_dst: str = ""
    protocol: int = -1
    ttl: int = -1
    options: bytes = b""
    extensions: list[int] = field(default_factory=list)
    segments_left: int = 0
    ident: int = 0
    offset: int = 0
    more: bool = False
    l3: int = -1
    l4: int = -1
    sport: int = -1
    dport: int = -1
    tcp_flags: int = -1
    seq: int = -1
    ack: int = -1
    icmp_type: int = -1
    icmp_code: int = -1
    icmp_ident: int = -1
    target: str = ""
    nd_options: list[tuple[int, bytes]] = field(default_factory=list)
    inner: Frame | None = None
    payload: bytes = b""
    ip_check: Check = "unknown"
    l4_check: Check = "unknown"
    problem: str = ""

    @property
    def is_fragment(self) -> bool:
        return self.more or self.offset > 0

    @property
    def valid(self) -> bool:
        """Read to its end, and no checksum in it or in what it quotes is bad."""
        return (
            not self.problem
            and "bad" not in (self.ip_check, self.l4_check)
            and (self.inner is None or self.inner.valid)
        )


@dataclass(frozen=True)
class ARP:
    operation: int
    sender_mac: str
    sender_ip: str
    target_mac: str
    target_ip: str


def parse(data: bytes) -> Frame:
    """An Ethernet frame. Bytes beyond the IP packet's length are ignored, as
    Ethernet's padding is."""
    frame = Frame()
    if len(data) < 14:
        frame.problem = "ethernet"
        return frame
    frame.eth_dst, frame.eth_src = mac_text(data[:6]), mac_text(data[6:12])
    at = 12
    frame.ethertype = _u16(data, at)
    while frame.ethertype in (ETH_VLAN, ETH_QINQ):
        if len(data) < at + 6:
            frame.problem = "vlan"
            return frame
        frame.vlans.append(_u16(data, at + 2))
        at += 4
        frame.ethertype = _u16(data, at)
    at += 2
    if frame.ethertype == ETH_ARP:
        _parse_arp(frame, data[at:])
    elif frame.ethertype in (ETH_IPV4, ETH_IPV6):
        _parse_ip(frame, data, at, 4 if frame.ethertype == ETH_IPV4 else 6)
    else:
        frame.payload = data[at:]
    return frame


def parse_ip(data: bytes, quoted: bool = False) -> Frame:
    """An IP packet without Ethernet. `quoted`: it may be cut short, as in an
    ICMP error; then checksums that cover missing bytes are unknown."""
    frame = Frame()
    _parse_ip(frame, data, 0, data[0] >> 4 if data else 0, quoted)
    return frame


def _u16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _parse_arp(frame: Frame, data: bytes) -> None:
    if len(data) < 28 or data[:6] != b"\0\1\x08\0\6\4":
        frame.problem = "arp"
        return
    frame.arp = ARP(
        _u16(data, 6),
        mac_text(data[8:14]),
        ip_text(data[14:18]),
        mac_text(data[18:24]),
        ip_text(data[24:28]),
    )


def _parse_ip(frame: Frame, data: bytes, at: int, version: int, quoted: bool = False) -> None:
    frame.l3 = at
    if version == 4:
        end = _parse_ipv4(frame, data, at)
    elif version == 6:
        end = _parse_ipv6(frame, data, at)
    else:
        frame.problem = "ip version"
        return
    if frame.problem:
        return
    cut = len(data) < end
    if cut and not quoted:
        frame.problem = "ip length"
        return
    if version == 6 and not _walk_extensions(frame, data, end):
        return
    if frame.offset:
        frame.payload = data[frame.l4 : end]
        return
    _parse_l4(frame, data[frame.l4 : end], whole=not (cut or frame.more), quoted=quoted)


def _parse_ipv4(frame: Frame, data: bytes, at: int) -> int:
    """Where the packet ends, by its own length."""
    if len(data) < at + 20 or data[at] >> 4 != 4:
        frame.problem = "ipv4"
        return 0
    size, total = (data[at] & 15) * 4, _u16(data, at + 2)
    if size < 20 or len(data) < at + size or total < size:
        frame.problem = "ipv4 header"
        return 0
    head = data[at : at + size]
    frame.version = 4
    frame.src, frame.dst = ip_text(head[12:16]), ip_text(head[16:20])
    frame.final_dst = frame.dst
    frame.ttl, frame.protocol, frame.options = head[8], head[9], head[20:]
    frame.ident = _u16(head, 4)
    flags = _u16(head, 6)
    frame.more, frame.offset = bool(flags & 0x2000), (flags & 0x1FFF) * 8
    frame.ip_check = "ok" if ones_sum(head) == 0xFFFF else "bad"
    frame.l4 = at + size
    return at + total


def _parse_ipv6(frame: Frame, data: bytes, at: int) -> int:
    if len(data) < at + 40 or data[at] >> 4 != 6:
        frame.problem = "ipv6"
        return 0
    frame.version = 6
    frame.src, frame.dst = ip_text(data[at + 8 : at + 24]), ip_text(data[at + 24 : at + 40])
    frame.final_dst = frame.dst
    frame.protocol, frame.ttl = data[at + 6], data[at + 7]
    frame.ip_check = "none"
    frame.l4 = at + 40
    return at + 40 + _u16(data, at + 4)


def _walk_extensions(frame: Frame, data: bytes, end: int) -> bool:
    """Steps `l4` and `protocol` past the chain; False with `problem` if it
    runs out, or if what is left is a later fragment (`payload` holds it)."""
    end = min(end, len(data))
    while frame.protocol in (HOP_BY_HOP, ROUTING, FRAGMENT, AH, DEST_OPTS):
        kind, at = frame.protocol, frame.l4
        if end < at + 8:
            frame.problem = "extension header"
            return False
        size = 8
        if kind == AH:
            size = (data[at + 1] + 2) * 4
        elif kind != FRAGMENT:
            size = (data[at + 1] + 1) * 8
        if end < at + size:
            frame.problem = "extension header"
            return False
        if kind == FRAGMENT:
            word = _u16(data, at + 2)
            frame.offset, frame.more = word & 0xFFF8, bool(word & 1)
            frame.ident = int.from_bytes(data[at + 4 : at + 8], "big")
        elif kind == ROUTING:
            frame.segments_left = data[at + 3]
            if frame.segments_left and data[at + 2] in (0, 2) and size >= 24:
                frame.final_dst = ip_text(data[at + size - 16 : at + size])
        frame.extensions.append(kind)
        frame.protocol, frame.l4 = data[at], at + size
        if frame.offset:
            break
    return True


_MINIMUM = {TCP: 20, UDP: 8, SCTP: 12, ICMP: 8, ICMPV6: 8}


def _parse_l4(frame: Frame, data: bytes, whole: bool, quoted: bool) -> None:
    frame.payload = data
    if frame.protocol not in _MINIMUM:
        return
    # A quote of eight bytes (RFC 792) still has the ports.
    if len(data) < (8 if quoted else _MINIMUM[frame.protocol]):
        frame.problem = "transport header"
        return
    if frame.protocol in (TCP, UDP, SCTP):
        frame.sport, frame.dport = _u16(data, 0), _u16(data, 2)
    if frame.protocol == TCP:
        whole = _parse_tcp(frame, data) and whole
    elif frame.protocol == UDP:
        length = _u16(data, 4)
        if whole and not 8 <= length <= len(data):
            frame.problem = "udp length"
            return
        data = data[:length] if whole else data
        frame.payload = data[8:]
    elif frame.protocol == SCTP:
        frame.payload = data[12:]
    else:
        frame.icmp_type, frame.icmp_code = data[0], data[1]
        _parse_icmp(frame, data)
    if whole:
        frame.l4_check = _verify(frame, data)


def _parse_tcp(frame: Frame, data: bytes) -> bool:
    """False: the header is not all here, or is no header."""
    frame.seq = int.from_bytes(data[4:8], "big")
    if len(data) < 20:
        return False
    frame.ack = int.from_bytes(data[8:12], "big")
    frame.tcp_flags = data[13]
    size = (data[12] >> 4) * 4
    if not 20 <= size <= len(data):
        frame.problem = "tcp header"
        return False
    frame.payload = data[size:]
    return True


def _parse_icmp(frame: Frame, data: bytes) -> None:
    kind, v6 = frame.icmp_type, frame.protocol == ICMPV6
    frame.payload = data[8:]
    if kind in ((128, 129) if v6 else (0, 8)):
        frame.icmp_ident = _u16(data, 4)
    elif kind in ((1, 2, 3, 4) if v6 else (3, 4, 5, 11, 12)):
        frame.inner = parse_ip(data[8:], quoted=True)
    elif v6 and RS <= kind <= REDIRECT:
        at = {RS: 8, RA: 16, NS: 24, NA: 24, REDIRECT: 40}[kind]
        if len(data) < at:
            frame.problem = "neighbour discovery"
            return
        if kind >= NS:
            frame.target = ip_text(data[8:24])
        while at + 2 <= len(data) and data[at + 1] and at + data[at + 1] * 8 <= len(data):
            size = data[at + 1] * 8
            frame.nd_options.append((data[at], data[at + 2 : at + size]))
            at += size
        if at != len(data):
            frame.problem = "neighbour discovery option"


def _verify(frame: Frame, data: bytes) -> Check:
    """The transport checksum over all of `data`."""
    if frame.protocol == SCTP:
        bare = data[:8] + bytes(4) + data[12:]
        return "ok" if struct.pack("<I", crc32c(bare)) == data[8:12] else "bad"
    if frame.protocol == ICMP:
        return "ok" if ones_sum(data) == 0xFFFF else "bad"
    if frame.protocol == UDP and data[6:8] == b"\0\0":
        # RFC 8200: over IPv6 the checksum is not optional.
        return "none" if frame.version == 4 else "bad"
    pseudo = _pseudo(ip_bytes(frame.src), ip_bytes(frame.final_dst), frame.protocol, len(data))
    return "ok" if ones_sum(pseudo + data) == 0xFFFF else "bad"


# ---- truncation and mutation -----------------------------------------------------------


def true_length(data: bytes) -> bytes:
    """With the IP length that the frame has: the datapath leaves a wrong one to the stack, which
    drops, and reads what is there."""
    if data[12:14] == b"\x08\0" and len(data) >= 34:
        return data[:16] + (len(data) - 14).to_bytes(2, "big") + data[18:]
    if data[12:14] == b"\x86\xdd" and len(data) >= 54:
        return data[:18] + (len(data) - 54).to_bytes(2, "big") + data[20:]
    return data


def truncations(frame: bytes) -> Iterator[bytes]:
    """Every proper prefix, longest first."""
    for length in range(len(frame) - 1, -1, -1):
        yield frame[:length]


HEADER_BYTES = 120
"""Mutations fall within these first bytes: deeper lies payload."""
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 4, 5, 6, 17, 43, 44, 45, 50, 51, 58, 59, 60, 132, 135)
_INTERESTING16 = (0, 1, 7, 8, 20, 0x1FFF, 0x2000, 0x3FFF, 0x7FFF, 0x8000, 0xFFFF, 0x0800, 0x86DD)
_LENGTH_LIMIT = 2048


def mutate(frame: bytes, rng: random.Random) -> bytes:
    """`frame` with one to four things wrong; sometimes with the IPv4 header's
    checksum put right again, so that the damage gets past it. Equal `rng`
    states give equal results. At most 2,048 bytes."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(_MUTATIONS)(data, rng)
        if not data:
            return b""
    if rng.random() < 0.5:
        _repair_ipv4(data)
    return bytes(data[:_LENGTH_LIMIT])


def _repair_ipv4(data: bytearray) -> None:
    size = (data[14] & 15) * 4 if len(data) > 34 else 0
    if size >= 20 and len(data) >= 14 + size and data[12:14] == b"\x08\0":
        data[24:26] = b"\0\0"
        data[24:26] = struct.pack("!H", checksum(bytes(data[14 : 14 + size])))


def _position(data: bytearray, rng: random.Random) -> int:
    return int(rng.random() * min(len(data), HEADER_BYTES))


def _flip(data: bytearray, rng: random.Random) -> None:
    data[_position(data, rng)] ^= 1 << int(rng.random() * 8)


def _byte(data: bytearray, rng: random.Random) -> None:
    data[_position(data, rng)] = rng.choice(_INTERESTING)


def _word(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng) & ~1
    data[at : at + 2] = struct.pack("!H", rng.choice(_INTERESTING16))[: len(data) - at]


def _any_byte(data: bytearray, rng: random.Random) -> None:
    data[_position(data, rng)] = int(rng.random() * 256)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[int(rng.random() * len(data)) :]


def _grow(data: bytearray, rng: random.Random) -> None:
    data += bytes(int(rng.random() * 64))


def _drop_slice(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng)
    del data[at : at + 1 + int(rng.random() * 16)]


def _repeat_slice(data: bytearray, rng: random.Random) -> None:
    at = _position(data, rng)
    data[at:at] = data[at : at + 1 + int(rng.random() * 40)]


def _swap_type(data: bytearray, rng: random.Random) -> None:
    """Another ethertype, or the other IP version in the same place."""
    data[12:14] = struct.pack("!H", rng.choice((ETH_IPV4, ETH_IPV6, ETH_ARP, ETH_VLAN, ETH_QINQ)))


def _ip_field(data: bytearray, rng: random.Random) -> None:
    """A field that decides how the rest is read: version and header length,
    total length, fragment word, protocol, next header."""
    at = rng.choice((14, 16, 17, 18, 19, 20, 21, 23, 54, 55))
    if at < len(data):
        data[at] = int(rng.random() * 256)


_MUTATIONS = (
    _flip,
    _flip,
    _byte,
    _word,
    _any_byte,
    _cut,
    _grow,
    _drop_slice,
    _repeat_slice,
    _swap_type,
    _ip_field,
    _ip_field,
)
