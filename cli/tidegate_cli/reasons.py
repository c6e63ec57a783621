"""A text for every reason a packet is counted under (enum tg_reason); see docs/drop-reasons.md.

Where the number is one that people know from Cilium, so is the text. A test compares with the
object's BTF.
"""

from __future__ import annotations

TEXT: dict[int, str] = {
    0: "Success",
    132: "Invalid source ip",
    133: "Policy denied",
    134: "Invalid packet",
    135: "CT: Truncated or invalid header",
    140: "Unsupported L2 protocol",
    142: "Error while rewriting the packet",
    155: "CT: Map insertion failed",
    156: "Invalid IPv6 extension header",
    158: "Service backend not found",
    169: "FIB lookup failed",
    177: "Denied by LB src range check",
    181: "Policy denied by denylist",
    196: "TTL exceeded",
    203: "Endpoint policy program not available",
    220: "VLAN tag from a pod",
    221: "Router advertisement or redirect from a pod, or a forged neighbour message",
    222: "Rule set is not in the map",
    223: "Fragment without its first one",
    224: "ICMP error about an unknown flow",
    225: "SCTP port cannot be translated",
    226: "Source routed packet",
    227: "No node table is in force",
    228: "Forged ARP or neighbour sender",
    229: "No free port to send on with the node's address",
    230: "Answer whose translation was forgotten",
    231: "Masqueraded",
    252: "Event aggregated",
    253: "Policy denied in audit mode",
    254: "Events lost",
}
"""TG_REASON_MAX is a bound, not a reason."""

DIRECTIONS = ("INGRESS", "EGRESS")
"""By enum tg_direction; the pod's."""


def text(reason: int) -> str:
    return TEXT.get(reason, f"reason {reason}")
