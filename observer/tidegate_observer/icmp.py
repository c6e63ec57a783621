"""Type and code of an ICMP flow, and their names. Pure.

A flow of ICMP has no ports; the programs put into their place what tells flows apart (`parse.h`):
of an echo the identifier, on the side that asked, of anything else type and code on its source's.
"""

from __future__ import annotations

from tidegate_observer.flow import ICMP, ICMPV6, Flow

_V4 = {
    0: "EchoReply",
    3: "DestinationUnreachable",
    4: "SourceQuench",
    5: "Redirect",
    8: "EchoRequest",
    9: "RouterAdvertisement",
    10: "RouterSolicitation",
    11: "TimeExceeded",
    12: "ParameterProblem",
    13: "TimestampRequest",
    14: "TimestampReply",
    15: "InfoRequest",
    16: "InfoReply",
    17: "AddressMaskRequest",
    18: "AddressMaskReply",
}
"""RFC 792, 950, 1256."""
_V6 = {
    1: "DestinationUnreachable",
    2: "PacketTooBig",
    3: "TimeExceeded",
    4: "ParameterProblem",
    128: "EchoRequest",
    129: "EchoReply",
    130: "MLDv1MulticastListenerQueryMessage",
    131: "MLDv1MulticastListenerReportMessage",
    132: "MLDv1MulticastListenerDoneMessage",
    133: "RouterSolicitation",
    134: "RouterAdvertisement",
    135: "NeighborSolicitation",
    136: "NeighborAdvertisement",
    137: "Redirect",
    143: "MLDv2MulticastListenerReportMessageV2",
}
"""RFC 4443, 4861, 2710, 3810, in the words of Hubble's library."""

OTHER = "other"
_ZERO = 1
"""The other port of type 0 code 0 of ICMPv6, `TG_ICMP_ZERO`."""


def is_icmp(flow: Flow) -> bool:
    return flow.protocol in (ICMP, ICMPV6)


def type_code(flow: Flow) -> tuple[int, int]:
    """As `tg_policy_port` has it: the code of an echo counts as 0, and an answer whose identifier
    is 0 as a request."""
    v4 = flow.protocol == ICMP
    if flow.source_port and flow.destination_port == _ZERO:
        return 0, 0
    if flow.source_port and flow.destination_port:
        return flow.source_port >> 8, flow.source_port & 0xFF
    if flow.destination_port:
        return (0 if v4 else 129), 0
    return (8 if v4 else 128), 0


def name(protocol: int, kind: int) -> str:
    """Of a type; OTHER: it has none here."""
    return (_V4 if protocol == ICMP else _V6).get(kind, OTHER)


def text(flow: Flow) -> str:
    """`EchoRequest`, `DestinationUnreachable(3)`, `40(1)`."""
    kind, code = type_code(flow)
    found = name(flow.protocol, kind)
    if found == OTHER:
        return f"{kind}({code})"
    return f"{found}({code})" if code else found
