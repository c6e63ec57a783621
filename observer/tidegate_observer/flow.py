"""One observed flow event, and what it points to. Values only.

A hundred thousand of them are held at once: what many share (an end, a decision, a Service) is one
object for all of them, and nothing here is seen by the garbage collector.
"""

from __future__ import annotations

import ipaddress
from enum import IntEnum

import msgspec

MAPPED = bytes(10) + b"\xff\xff"
"""What an IPv4 address begins with in the kernel's 128 bits."""

NOBODY = bytes(16)
"""No address."""

TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58


class Kind(IntEnum):
    """What happened."""

    START = 0
    """A flow was judged and let through."""
    END = 1
    DENIED = 2
    """A packet was dropped; `reason` says why."""
    AUDITED = 3
    """Let through, but denied by policies in audit mode."""
    TRACED = 4
    """A packet that somebody asked for, seen at `point`."""


FrontendKey = tuple[bytes, int, int]
"""Address, port, protocol number."""


class End(msgspec.Struct, frozen=True, gc=False):
    """One side of a flow: a pod, or whoever an identity number stands for."""

    identity: int
    """Tidegate's number."""
    id: int = 0
    """Of the endpoint, on this node; 0: it does not live here."""
    namespace: str = ""
    pod: str = ""
    labels: tuple[str, ...] = ()
    """`source:key[=value]`, sorted."""
    workload: str = ""
    workload_kind: str = ""


class Policy(msgspec.Struct, frozen=True, order=True, gc=False):
    """The object that decided."""

    kind: str
    namespace: str
    name: str


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What one direction's policy said of a flow."""

    policies: tuple[Policy, ...]
    """That allowed or denied it; of a default deny every policy that isolates the subject."""
    rule: int
    """Index in the RuleSet's rules; -1: no rule matched."""
    match: int = 0
    """What the rule names: a number of `policy_match_type`."""
    log: bool = False
    """The rule asks for a line in the policy log."""


class Service(msgspec.Struct, frozen=True, gc=False):
    namespace: str
    name: str


class Counts(msgspec.Struct, frozen=True, gc=False):
    """How a flow ended."""

    packets: int
    bytes: int
    reply_packets: int
    reply_bytes: int
    nanoseconds: int
    """From its first packet to its last."""
    closed: str
    """"fin", "rst", "idle", or "unknown": its entry had to make room for another."""
    handshake: int = 0
    """Nanoseconds from its first packet to the first answer, within a sixteenth; 0: unknown."""
    first_byte: int = 0
    """To the first byte of TCP that came back; 0: none came, or unknown."""


class Process(msgspec.Struct, frozen=True, gc=False):
    """Who connected, or sent a datagram first."""

    pid: int
    """As the node numbers it."""
    name: str
    """Of the thread; whatever it calls itself."""


class Flow(msgspec.Struct, gc=False):
    node: str
    """Where it was seen."""
    time: int
    """Nanoseconds since 1970."""
    kind: int
    reason: int
    """enum tg_reason; 0 unless denied or audited."""
    direction: int
    """enum tg_direction: of the subject whose policy decided, else of the pod that saw it."""
    source_address: bytes
    destination_address: bytes
    """16 bytes each, IPv4 mapped; the destination after translation to a backend."""
    source_port: int
    destination_port: int
    """Of ICMP: what tells its flows apart (`icmp`)."""
    protocol: int
    tcp_flags: int
    interface: int
    source: End
    destination: End
    egress: Decision | None = None
    """What the source's policy said; None: it has none, or does not live here."""
    ingress: Decision | None = None
    service: Service | None = None
    """That the client asked for."""
    counts: Counts | None = None
    cookie: int = 0
    cgroup: int = 0
    point: int = 0
    """Of a traced packet: enum tg_trace_point."""
    how: int = 0
    """Of a traced packet: enum tg_trace_how."""
    more: int = 0
    """Other than 0: this stands for so many denials like it that were not told one by one."""
    process: Process | None = None
    """That it began in; None: it is not known."""
    asked: FrontendKey | None = None
    """Of `service`: where its client asked for it."""
    interface_name: str = ""
    """"": it is not known."""


class Lost(msgspec.Struct, frozen=True, gc=False):
    """Events that were not seen."""

    node: str
    time: int
    count: int
    first: int
    """When losses were last looked for before; nanoseconds since 1970, as `time`."""
    queued: bool = False
    """An observer that was killed had read them, and told nobody; else they found a ring full."""


Entry = Flow | Lost


def address_text(raw: bytes) -> str:
    """Canonical text of a 16-byte address."""
    if raw[:12] == MAPPED:
        return f"{raw[12]}.{raw[13]}.{raw[14]}.{raw[15]}"
    return str(ipaddress.IPv6Address(raw))


def address_bytes(text: str) -> bytes:
    """16 bytes of an address. ValueError."""
    address = ipaddress.ip_address(text)
    return MAPPED + address.packed if address.version == 4 else address.packed
