"""One node's maps as text: stable, readable, without ids, slots and interface numbers.

Text only; what is there is `ca_maps`'s to say. Identities are shown as what they stand for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from support.ca_maps import (
    ADDR,
    ANY_WORD,
    CLASS_WORD,
    FRONTEND,
    ID_MASK,
    LOCAL,
    PEER,
    NodeMaps,
    Prefix,
)

RESERVED = {0: "unknown", 2: "world", 4: "remote-node"}
PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}
FLAGS = {LOCAL: "local", PEER: "peer", FRONTEND: "frontend"}


def text(found: NodeMaps, identities: Mapping[int, str], pods: Mapping[str, str]) -> str:
    """`identities`: number -> what it stands for; `pods`: address -> pod."""
    names = RESERVED | dict(identities)
    lines: list[str] = []
    endpoints = {pods[ip(k[1])]: row for k, row in found.node.items() if k[0] == ADDR}
    for pod, row in sorted(endpoints.items()):
        addresses = " ".join(ip(a) for a in (row.ip4, row.ip6) if any(a))
        lines.append(f"endpoint {pod} {names[row.identity]} {addresses}")
        for direction in ("ingress", "egress"):
            lines += _policy(direction, found.rules_of(getattr(row, direction)), names)
    lines += sorted(
        f"ipcache {ip(key)} {names[word & ID_MASK]}{_flags(word)}"
        for key, word in found.ipcache.items()
    )
    lines += sorted(f"network {cidr(key)} {names[n]}" for key, n in found.networks.items())
    lines += sorted(
        f"frontend {ip(address)} {port}/{PROTOCOLS[protocol]} -> "
        + (", ".join(f"{ip(a)} {p}" for a, p in backends) or "nobody")
        for (address, port, protocol), backends in found.frontends.items()
    )
    return "\n".join(lines) + "\n"


def _policy(direction: str, rules: Any, names: Mapping[int, str]) -> Iterable[str]:
    if rules is None:
        return [f"  {direction}: any"]
    _, _, entries, classes = rules
    lines = [f"  {direction}: isolated"]
    lines += sorted(
        f"    {_peer(key.peer, names)} {_ports(key)}: "
        f"{'allow' if rule.action else 'deny'} rule {rule.rule} precedence {rule.precedence}"
        for key, rule in entries.items()
    )
    lines += sorted(f"    {cidr(key)} is class {n}" for key, n in (classes or {}).items())
    return lines


def _peer(word: int, names: Mapping[int, str]) -> str:
    if word == ANY_WORD:
        return "any"
    if word & CLASS_WORD:
        return f"class {word & ID_MASK}"
    return names[word]


def _ports(key: Any) -> str:
    if key.prefix == 0:
        return "any"
    protocol = PROTOCOLS[key.protocol]
    return protocol if key.prefix == 8 else f"{protocol} {key.port}/{key.prefix - 8}"


def _flags(word: int) -> str:
    return "".join(f" {name}" for bit, name in FLAGS.items() if word & bit)


def ip(address: bytes) -> str:
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or found)


def cidr(prefix: Prefix) -> str:
    bits, network = prefix
    address = ipaddress.IPv6Address(network)
    if bits >= 96 and address.ipv4_mapped:
        return f"{address.ipv4_mapped}/{bits - 96}"
    return f"{address}/{bits}"
