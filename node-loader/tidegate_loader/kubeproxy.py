"""Whether kube-proxy serves Services in this network namespace too: its rules are looked for, not
its process, which may have gone and left them.

Asks the kernel for four names over netlink (linux/netfilter/nf_tables.h), whatever their number.
Tables of the old iptables (`iptables-legacy`) cannot be asked so: they are not seen.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

NETLINK_NETFILTER = 12
NFT = 10 << 8
"""NFNL_SUBSYS_NFTABLES, in a message's type."""
GET_TABLE, GET_CHAIN = NFT | 1, NFT | 4
TABLE_NAME, CHAIN_TABLE, CHAIN_NAME = 1, 1, 3
IPV4, IPV6 = 2, 10
REQUEST = 1
ERROR = 2
"""NLMSG_ERROR."""
DEVICE = "kube-ipvs0"
ANSWER_BYTES = 8192
ANSWER_SECONDS = 1.0


class Asked(NamedTuple):
    """One name to look for, and what is said if it is there."""

    message: int
    family: int
    attributes: tuple[tuple[int, str], ...]
    words: str


_CHAIN = ((CHAIN_TABLE, "nat"), (CHAIN_NAME, "KUBE-SERVICES"))
_TABLE = ((TABLE_NAME, "kube-proxy"),)
NAMES = (
    Asked(GET_TABLE, IPV4, _TABLE, "nftables table ip kube-proxy"),
    Asked(GET_TABLE, IPV6, _TABLE, "nftables table ip6 kube-proxy"),
    Asked(GET_CHAIN, IPV4, _CHAIN, "iptables chain KUBE-SERVICES"),
    Asked(GET_CHAIN, IPV6, _CHAIN, "ip6tables chain KUBE-SERVICES"),
)


def traces() -> list[str]:
    """What of kube-proxy is there, in words; [] also where nobody may ask."""
    found = [DEVICE] if os.path.exists(f"/sys/class/net/{DEVICE}") else []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
            link.settimeout(ANSWER_SECONDS)
            found += [asked.words for asked in NAMES if _is_there(link, asked)]
    except OSError:  # no netfilter in this kernel, or no right to it
        return found
    return found


def _is_there(link: socket.socket, asked: Asked) -> bool:
    link.send(_request(asked))
    answer = link.recv(ANSWER_BYTES)
    (kind,) = struct.unpack_from("=H", answer, 4)
    return bool(kind != ERROR)


def _request(asked: Asked) -> bytes:
    body = struct.pack("=BBH", asked.family, 0, 0)
    for kind, text in asked.attributes:
        data = text.encode() + b"\0"
        body += struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
    return struct.pack("=IHHII", 16 + len(body), asked.message, REQUEST, 0, 0) + body
