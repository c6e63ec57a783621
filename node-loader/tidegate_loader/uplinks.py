"""Where packets of others come in: the node's addresses and the interfaces that carry them.

Asks the kernel by route netlink, in the calling thread's network namespace. May not live here:
what a Service does with it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tidegate_loader import addresses
from tidegate_loader.addresses import MAPPED, ZERO, Prefix
from tidegate_loader.maps import IDENTITY_MASK, Part, Uplinks, lookup_network

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR, _DONE = 2, 3
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH
_GETADDR, _GETROUTE = 22, 26
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_TABLE = 4, 15
_TABLE_MAIN = 254
_SCOPE_HOST, _SCOPE_LINK = 254, 253
_UNICAST = 1
_BUFFER = 1 << 16
_RESERVED = range(1, 256)


class Found(NamedTuple):
    interfaces: frozenset[int]
    """Those through which clients outside the node reach it."""
    uplinks: Uplinks


def look(hosts: Iterable[Part], networks: Mapping[Prefix, int]) -> Found:
    """An uplink has an address by which the cluster knows a node, or the default route. `hosts`,
    `networks`: who has which address, as the maps hold it. OSError."""
    held = list(_addresses())
    own = frozenset(address for _, address in held)
    identities: dict[bytes, int] = {}
    for part in hosts:
        identities.update((a, part[a]) for a in own if a in part)
    known = [(i, a) for i, a in held if _is_node(a, identities, networks)]
    interfaces = frozenset(i for i, _ in known) | frozenset(_default_routes())
    source = [ZERO, ZERO]
    for index, address in [*known, *((i, a) for i, a in held if i in interfaces)]:
        at = 0 if addresses.is_v4(address) else 1
        if source[at] == ZERO and index in interfaces:
            source[at] = address
    return Found(interfaces, Uplinks(own, (source[0], source[1])))


def _is_node(address: bytes, hosts: Mapping[bytes, int], networks: Mapping[Prefix, int]) -> bool:
    """Gateways of pods have a node's identity, and lie where pods' addresses do."""
    identity = hosts.get(address, 0) & IDENTITY_MASK
    return identity in _RESERVED and lookup_network(networks, address) != 0


def _addresses() -> Iterator[tuple[int, bytes]]:
    """(interface, address) of every global one."""
    for body in _dump(_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0)):
        _, _, _, scope, index = _ADDRESS.unpack_from(body)
        if scope in (_SCOPE_HOST, _SCOPE_LINK):
            continue
        found = dict(_attributes(body, _ADDRESS.size))
        raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if raw is not None:
            yield index, raw if len(raw) == len(ZERO) else MAPPED + raw


def _default_routes() -> Iterator[int]:
    for body in _dump(_GETROUTE, _ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)):
        _, bits, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
        found = dict(_attributes(body, _ROUTE.size))
        if _RTA_TABLE in found:
            (table,) = struct.unpack("=I", found[_RTA_TABLE])
        if bits == 0 and kind == _UNICAST and table == _TABLE_MAIN and _RTA_OIF in found:
            (index,) = struct.unpack("=I", found[_RTA_OIF])
            if index != 1:
                yield index


def _dump(kind: int, body: bytes) -> Iterator[bytes]:
    """The bodies of what the kernel has. OSError."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as channel:
        channel.bind((0, 0))
        channel.send(_HEADER.pack(_HEADER.size + len(body), kind, _DUMP, 1, 0) + body)
        while True:
            data = channel.recv(_BUFFER)
            at = 0
            while at < len(data):
                length, found, _, _, _ = _HEADER.unpack_from(data, at)
                if found == _DONE:
                    return
                if found == _ERROR:
                    (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-code, "route netlink")
                yield data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3


def _attributes(body: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, body[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
