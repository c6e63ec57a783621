"""The frame builder and parser: against published vectors, against each other,
and against the kernel, which both makes and judges frames on a TAP device."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import frames as f

A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"


# ---- vectors ----------------------------------------------------------------------


def test_published_checksums() -> None:
    # RFC 1071, section 3; a textbook IPv4 header; the CRC-32C check value.
    assert f.ones_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert f.checksum(bytes.fromhex("45000073000040004011 0000 c0a80001c0a800c7")) == 0xB861
    assert f.crc32c(b"123456789") == 0xE3069283
    assert f.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_arp_by_hand() -> None:
    frame = f.eth(f.arp(1, f.MAC_A, A4, "00:00:00:00:00:00", B4), f.ETH_ARP, dst=f.BROADCAST)
    expected = "ffffffffffff 02000000000a 0806 0001 0800 06 04 0001"
    expected += "02000000000a 0a000001 000000000000 0a000002"
    assert bytes.fromhex(expected) == frame
    assert f.parse(frame).arp == f.ARP(1, f.MAC_A, A4, "00:00:00:00:00:00", B4)


def test_udp_by_hand() -> None:
    """10.0.0.1:1 -> 10.0.0.2:2, no payload: pseudo-header and header sum to
    0a00+0001+0a00+0002+0011+0008 + 0001+0002+0008 = 1427."""
    expected = "4500001c00010000401166ce0a0000010a000002" + "000100020008" + "ebd8"
    assert bytes.fromhex(expected) == f.ip(A4, B4, f.UDP, f.udp(A4, B4, 1, 2))


# ---- round trips --------------------------------------------------------------------

QUOTED4 = f.ip(A4, B4, f.TCP, f.tcp(A4, B4, 1000, 80))
QUOTED6 = f.ip(A6, B6, f.UDP, f.udp(A6, B6, 1000, 53, b"query"))
TCP6 = f.tcp(A6, B6, 1000, 80)
SEGMENT = f.TCPSegment(A4, B4, 1, 2, f.SYN | f.ACK, b"x", 7, 9, options=b"\2\4\5\xb4")
MCAST = "ff02::1:ff00:2"
SLLA = f.nd_option(1, f.mac_bytes(f.MAC_A))

ROWS: list[tuple[str, bytes, dict[str, Any]]] = [
    (
        "tcp",
        f.packet(A4, B4, f.TCP),
        {"sport": 40000, "dport": 80, "tcp_flags": f.SYN, "version": 4},
    ),
    ("tcp odd payload", f.packet(A4, B4, f.TCP, payload=b"odd"), {"payload": b"odd"}),
    ("tcp6", f.packet(A6, B6, f.TCP), {"src": A6, "dst": B6, "ip_check": "none", "ttl": 64}),
    (
        "tcp options",
        f.eth(f.ip(A4, B4, f.TCP, SEGMENT.encode())),
        {"tcp_flags": 18, "seq": 7, "ack": 9, "payload": b"x"},
    ),
    ("udp", f.packet(A4, B4, f.UDP, 5, 53, b"hello"), {"protocol": f.UDP, "payload": b"hello"}),
    ("udp6", f.packet(A6, B6, f.UDP, 5, 53), {"dport": 53}),
    ("sctp", f.packet(A4, B4, f.SCTP), {"protocol": f.SCTP, "dport": 80}),
    ("sctp6", f.packet(A6, B6, f.SCTP), {"protocol": f.SCTP, "sport": 40000}),
    ("echo", f.packet(A4, B4, f.ICMP, 77), {"icmp_type": 8, "icmp_ident": 77}),
    ("echo6", f.packet(A6, B6, f.ICMPV6, 77), {"icmp_type": 128, "icmp_ident": 77}),
    ("echo reply", f.eth(f.ip(A4, B4, f.ICMP, f.echo(A4, B4, 5, reply=True))), {"icmp_type": 0}),
    (
        "other protocol",
        f.packet(A4, B4, 47, payload=b"gre"),
        {"protocol": 47, "payload": b"gre", "l4_check": "unknown"},
    ),
    ("vlan", f.eth(QUOTED4, vlans=[5]), {"vlans": [5], "dport": 80}),
    ("q in q", f.eth(QUOTED4, vlans=[5, 6]), {"vlans": [5, 6], "dport": 80}),
    (
        "other ethertype",
        f.eth(b"abc", 0x88CC),
        {"ethertype": 0x88CC, "payload": b"abc", "l4_check": "unknown"},
    ),
    ("padding", f.packet(A4, B4, f.UDP) + bytes(18), {"payload": b""}),
    (
        "ip options",
        f.eth(f.IPv4(A4, B4, f.TCP, f.tcp(A4, B4, 1, 2), options=b"\x07\x07\x04\1\2\3\4").encode()),
        {"options": b"\x07\x07\x04\1\2\3\4\0", "dport": 2},
    ),
    (
        "extension headers",
        f.eth(f.IPv6(A6, B6, f.TCP, TCP6, 64, [f.hop_by_hop(), f.dest_opts(), f.auth()]).encode()),
        {"extensions": [0, 60, 51], "protocol": f.TCP, "dport": 80, "l4": 14 + 40 + 8 + 8 + 24},
    ),
    (
        "source route: the checksum is to the last hop",
        f.eth(f.IPv6(A6, "fd00::9", f.TCP, TCP6, 64, [f.routing(0, 1, [B6])]).encode()),
        {"dst": "fd00::9", "final_dst": B6, "segments_left": 1},
    ),
    (
        "source route, used up",
        f.eth(f.IPv6(A6, B6, f.TCP, TCP6, 64, [f.routing(2, 0, ["fd00::9"])]).encode()),
        {"final_dst": B6, "segments_left": 0},
    ),
    (
        "unknown next header",
        f.eth(f.IPv6(A6, B6, 200, b"?" * 8).encode()),
        {"protocol": 200, "l4_check": "unknown"},
    ),
    (
        "atomic fragment",
        f.eth(f.IPv6(A6, B6, f.TCP, TCP6, 64, [f.fragment_header(9, 0, False)]).encode()),
        {"ident": 9, "is_fragment": False, "dport": 80},
    ),
    (
        "icmp error",
        f.eth(f.ip(B4, A4, f.ICMP, f.icmp_error(3, 3, QUOTED4))),
        {
            "icmp_type": 3,
            "icmp_code": 3,
            "inner.sport": 1000,
            "inner.src": A4,
            "inner.l4_check": "ok",
        },
    ),
    (
        "icmp error, eight bytes quoted",
        f.eth(f.ip(B4, A4, f.ICMP, f.icmp_error(3, 4, QUOTED4, 28, 1400))),
        {"inner.dport": 80, "inner.l4_check": "unknown", "inner.ip_check": "ok"},
    ),
    (
        "icmpv6 error",
        f.eth(f.ip(B6, A6, f.ICMPV6, f.icmpv6_error(B6, A6, 2, 0, QUOTED6, 1400))),
        {"icmp_type": 2, "inner.dport": 53, "inner.l4_check": "ok"},
    ),
    (
        "ns",
        f.eth(f.IPv6(A6, MCAST, f.ICMPV6, f.nd(A6, MCAST, f.NS, B6, SLLA), 255).encode()),
        {"icmp_type": 135, "target": B6, "nd_options": [(1, f.mac_bytes(f.MAC_A))], "ttl": 255},
    ),
    (
        "na",
        f.eth(f.ip(A6, B6, f.ICMPV6, f.nd(A6, B6, f.NA, A6, b"", 0x60000000))),
        {"icmp_type": 136, "target": A6},
    ),
    ("rs", f.eth(f.ip(A6, "ff02::2", f.ICMPV6, f.nd(A6, "ff02::2", f.RS))), {"icmp_type": 133}),
    (
        "ra",
        f.eth(f.ip(A6, B6, f.ICMPV6, f.nd(A6, B6, f.RA, options=f.nd_option(5, bytes(6))))),
        {"nd_options": [(5, bytes(6))]},
    ),
    ("redirect", f.eth(f.ip(A6, B6, f.ICMPV6, f.nd(A6, B6, f.REDIRECT, B6))), {"target": B6}),
]


def read(frame: f.Frame, path: str) -> Any:
    value: Any = frame
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("frame", "expected"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_round_trip(frame: bytes, expected: dict[str, Any]) -> None:
    parsed = f.parse(frame)
    assert parsed.valid, parsed
    assert {"l4_check": "ok", **expected} == {
        path: read(parsed, path) for path in ({"l4_check": "ok"} | expected)
    }


def test_udp_without_checksum() -> None:
    assert f.parse(f.eth(f.ip(A4, B4, f.UDP, f.udp(A4, B4, 1, 2, b"", True)))).l4_check == "none"
    assert f.parse(f.eth(f.ip(A6, B6, f.UDP, f.udp(A6, B6, 1, 2, b"", True)))).l4_check == "bad"


def test_a_udp_checksum_is_never_zero() -> None:
    payload = struct.pack(
        "!H", f.checksum(f._pseudo(f.ip_bytes(A4), f.ip_bytes(B4), 17, 10) + b"\0\1\0\2\0\x0a\0\0")
    )
    datagram = f.udp(A4, B4, 1, 2, payload)
    assert datagram[6:8] == b"\xff\xff"
    assert f.parse(f.eth(f.ip(A4, B4, f.UDP, datagram))).l4_check == "ok"


CHECKED = [
    "tcp",
    "tcp6",
    "udp",
    "udp6",
    "sctp",
    "echo",
    "echo6",
    "icmp error",
    "icmpv6 error",
    "ns",
]


@pytest.mark.parametrize("name", CHECKED)
def test_every_single_bit_error_is_seen(name: str) -> None:
    """A flipped bit past the Ethernet header is a bad checksum or a parse
    problem, except in IPv6's fields that nothing covers."""
    frame = next(row[1] for row in ROWS if row[0] == name)
    v6 = frame[12:14] == b"\x86\xdd"
    uncovered = {14, 15, 16, 17, 21} if v6 else set()
    for at in range(14, len(frame)):
        if at in uncovered:
            continue
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[at] ^= 1 << bit
            parsed = f.parse(bytes(damaged))
            # Another protocol has no checksum that we know of; a longer IPv6
            # length field is a problem, a shorter one cuts what is summed.
            unread = parsed.protocol not in (f.TCP, f.UDP, f.SCTP, f.ICMP, f.ICMPV6)
            assert not parsed.valid or unread, (at, bit, parsed)


@pytest.mark.parametrize("version", [4, 6])
def test_fragments(version: int) -> None:
    payload = bytes(range(256)) * 4
    if version == 4:
        whole4 = f.IPv4(A4, B4, f.UDP, f.udp(A4, B4, 7, 8, payload), ident=99)
        pieces, whole = f.fragment4(whole4, 512), whole4.payload
    else:
        whole6 = f.IPv6(A6, B6, f.UDP, f.udp(A6, B6, 7, 8, payload))
        pieces, whole = f.fragment6(whole6, 512, 99), whole6.payload
    parsed = [f.parse(f.eth(piece)) for piece in pieces]
    assert [(p.offset, p.more, p.dport) for p in parsed] == [
        (0, True, 8),
        (512, True, -1),
        (1024, False, -1),
    ]
    assert all(p.ident == 99 and p.is_fragment and p.valid for p in parsed)
    assert all(p.l4_check == "unknown" for p in parsed)
    frames = [f.eth(piece) for piece in pieces]
    assert whole == b"".join(frame[p.l4 :] for frame, p in zip(frames, parsed, strict=True))


SHORTER_IS_WHOLE = ["padding", "other ethertype"]


@pytest.mark.parametrize("name", [row[0] for row in ROWS if row[0] not in SHORTER_IS_WHOLE])
def test_no_truncation_is_valid_or_raises(name: str) -> None:
    frame = next(row[1] for row in ROWS if row[0] == name)
    assert all(not f.parse(cut).valid for cut in f.truncations(frame))


def test_mutations_are_deterministic_varied_and_parseable() -> None:
    rng, again = random.Random(1), random.Random(1)
    seeds = [row[1] for row in ROWS]
    made = [f.mutate(seeds[i % len(seeds)], rng) for i in range(20_000)]
    assert made == [f.mutate(seeds[i % len(seeds)], again) for i in range(20_000)]
    parsed = [f.parse(frame) for frame in made]
    assert len(set(made)) > 15_000
    assert max(map(len, made)) <= 2048
    # Enough get past the first checks to reach the deep ones.
    assert sum(p.valid for p in parsed) > 1_000
    assert {p.problem for p in parsed} >= {
        "", "ethernet", "vlan", "arp", "ipv4", "ipv6", "ipv4 header", "ip length",
        "extension header", "transport header", "udp length", "tcp header",
        "neighbour discovery option",
    }  # fmt: skip


# ---- the kernel as the third opinion --------------------------------------------------

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
K4, K6 = "10.99.0.1", "fd99::1"
"""The kernel's addresses on the TAP device; ours are .2 and ::2."""
U4, U6 = "10.99.0.2", "fd99::2"


class Tap:
    """A TAP device in a network namespace that lives as long as this thread.
    Without offloads asked for, the kernel computes and checks every checksum."""

    mac = "02:00:00:00:00:0c"

    def __init__(self, device: int) -> None:
        self._device = device
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"su0", IFF_TAP | IFF_NO_PI))
        for command in (
            "addr add 10.99.0.1/24 dev su0",
            "-6 addr add fd99::1/64 dev su0 nodad",
            f"link set su0 address {self.mac} up",
            f"neigh add {U4} lladdr {f.MAC_B} dev su0",
            f"-6 neigh add {U6} lladdr {f.MAC_B} dev su0",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    def send(self, payload: bytes, dst: str = mac, ethertype: int = 0) -> None:
        os.write(self._device, f.eth(payload, ethertype, f.MAC_B, dst))

    def ask(self, payload: bytes, wanted: Callable[[f.Frame], bool]) -> f.Frame:
        """Asks until it is answered: a device is not ready at once when it is up."""
        for _ in range(30):
            self.send(payload)
            with contextlib.suppress(TimeoutError):
                return self.receive(wanted, 1)
        raise AssertionError("the kernel does not answer")

    def receive(self, wanted: Callable[[f.Frame], bool], seconds: float = 30) -> f.Frame:
        """Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._device], [], [], left)[0]:
                break
            frame = f.parse(os.read(self._device, 4096))
            if wanted(frame):
                return frame
        raise TimeoutError("the kernel did not send it")


def in_namespace(body: Callable[[Tap], None]) -> None:
    """Runs `body` on a thread with a network namespace of its own, which goes
    with the thread; skips where the kernel does not let us."""
    outcome: list[BaseException | str] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            outcome.append("no network namespace: " + os.strerror(ctypes.get_errno()))
            return
        try:
            device = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            outcome.append(f"no TAP device: {error}")
            return
        try:
            body(Tap(device))
        except BaseException as error:
            outcome.append(error)
        finally:
            os.close(device)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for what in outcome:
        if isinstance(what, str):
            pytest.skip(what)
        raise what


@contextlib.contextmanager
def udp_socket(address: str) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 7))
        sock.settimeout(5)
        yield sock


@pytest.mark.cluster
@pytest.mark.parametrize(("kernel", "we"), [(K4, U4), (K6, U6)])
def test_the_kernel_accepts_our_frames_and_we_accept_its(kernel: str, we: str) -> None:
    v6 = ":" in kernel
    icmp_protocol, fragment = (f.ICMPV6, 1280 - 56) if v6 else (f.ICMP, 512)

    def body(tap: Tap) -> None:
        # Echo: its reply proves our checksum, and we check its.
        echo = f.ip(we, kernel, icmp_protocol, f.echo(we, kernel, 321))
        reply = tap.ask(echo, lambda p: p.icmp_ident == 321 and p.src == kernel)
        assert (reply.valid, reply.l4_check, reply.src) == (True, "ok", kernel)
        # TCP to a closed port: the kernel resets only what it could verify.
        tap.send(f.ip(we, kernel, f.TCP, f.tcp(we, kernel, 1234, 9)))
        reset = tap.receive(lambda p: p.dport == 1234)
        assert (reset.tcp_flags, reset.ack, reset.l4_check) == (f.RST | f.ACK, 2, "ok")
        # UDP to a closed port: an ICMP error that quotes our packet whole.
        tap.send(f.ip(we, kernel, f.UDP, f.udp(we, kernel, 1234, 9, b"quoted")))
        error = tap.receive(lambda p: p.inner is not None)
        assert error.inner is not None
        assert (error.valid, error.l4_check, error.inner.l4_check) == (True, "ok", "ok")
        assert (error.inner.sport, error.inner.payload) == (1234, b"quoted")
        # UDP both ways, then in fragments, which the kernel reassembles and checks.
        with udp_socket(kernel) as sock:
            sock.sendto(b"from the kernel", (we, 4321))
            sent = tap.receive(lambda p: p.dport == 4321)
            assert (sent.l4_check, sent.payload) == ("ok", b"from the kernel")
            long = os.urandom(2000)
            data = f.udp(we, kernel, 4321, 7, long)
            pieces = (
                f.fragment6(f.IPv6(we, kernel, f.UDP, data), fragment)
                if v6
                else f.fragment4(f.IPv4(we, kernel, f.UDP, data), fragment)
            )
            for piece in reversed(pieces):
                tap.send(piece)
            assert long == sock.recv(4096)
            # And fragments of its own.
            sock.sendto(long, (we, 4321))
            first = tap.receive(lambda p: p.is_fragment)
            rest = tap.receive(lambda p: p.is_fragment)
            assert (first.more, first.dport, rest.more) == (True, 4321, False)
            assert first.valid
            assert rest.valid

    in_namespace(body)


@pytest.mark.cluster
def test_the_kernel_walks_our_extension_headers() -> None:
    def body(tap: Tap) -> None:
        echo = f.echo(U6, K6, 55)
        chain = [f.hop_by_hop(), f.dest_opts(), f.routing(2, 0, [K6])]
        tap.send(f.IPv6(U6, K6, f.ICMPV6, echo, 64, chain).encode())
        assert tap.receive(lambda p: p.icmp_ident == 55).valid

    in_namespace(body)


@pytest.mark.cluster
def test_the_kernel_answers_our_neighbour_discovery_and_arp() -> None:
    def body(tap: Tap) -> None:
        option = f.nd_option(1, f.mac_bytes(f.MAC_B))
        all_of_k6 = "ff02::1:ff00:1"
        question = f.nd(U6, all_of_k6, f.NS, K6, option)
        packet = f.IPv6(U6, all_of_k6, f.ICMPV6, question, 255).encode()
        tap.send(packet, "33:33:ff:00:00:01")
        answer = tap.receive(lambda p: p.icmp_type == f.NA)
        assert (answer.valid, answer.l4_check, answer.target) == (True, "ok", K6)
        assert (2, f.mac_bytes(tap.mac)) in answer.nd_options
        question = f.arp(1, f.MAC_B, U4, "00:00:00:00:00:00", K4)
        tap.send(question, f.BROADCAST, f.ETH_ARP)
        reply = tap.receive(lambda p: p.arp is not None)
        assert reply.arp == f.ARP(2, tap.mac, K4, f.MAC_B, U4)

    in_namespace(body)
