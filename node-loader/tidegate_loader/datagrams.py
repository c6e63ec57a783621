"""Sockets of the node's own processes that are connected to a backend which is the Service's no
more: they are destroyed, and so connect again.

Only sockets for datagrams: those of pods are translated to another backend at the pod's interface
(`tg_steer`), and streams notice by themselves. Asks the kernel by sock_diag(7), in the calling
thread's network namespace; without CONFIG_INET_DIAG_DESTROY such sockets stay as they are. May not
live here: which backends are gone.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tidegate_loader.addresses import MAPPED
from tidegate_loader.services import BackendAddress

if TYPE_CHECKING:  # a loader never asks
    from tidegate_bpf.features import Probe

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_HEADER = struct.Struct("=IHHII")
_ASK = struct.Struct("=BBxxI")
"""struct inet_diag_req_v2 up to its id: family, protocol, states."""
_ID = struct.Struct("!HH16s16s4x8s")
"""struct inet_diag_sockid: ports, addresses, interface, cookie."""
_CONNECTED = 1 << 1
"""TCP_ESTABLISHED, which a connected socket for datagrams is, too."""
_ANSWER_SECONDS = 1.0
_BUFFER = 1 << 16


class _Socket(NamedTuple):
    family: int
    id: bytes
    peer: BackendAddress
    cookie: int


def destroy(gone: Collection[BackendAddress], asked: Callable[[int, BackendAddress], bool]) -> int:
    """How many sockets were destroyed: receiving fails with ECONNABORTED, sending with EDESTADDRREQ
    until they connect again. `asked`: whether the socket with this cookie has that backend because
    it asked for a Service. OSError."""
    wanted, count = frozenset(gone), 0
    with _channel() as channel:
        for family in (socket.AF_INET, socket.AF_INET6):
            for found in list(_connected(channel, family)):
                if found.peer in wanted and asked(found.cookie, found.peer):
                    code = _destroy(channel, found.family, found.id)
                    if code and code != errno.ENOENT:  # it may have gone by itself
                        raise OSError(code, os.strerror(code))
                    count += not code
    return count


def supported() -> Probe:
    """Asked about a socket that there is not. OSError."""
    from tidegate_bpf.features import Probe  # noqa: PLC0415

    name = "socket destruction"
    nobody = _ID.pack(1, 1, bytes(16), bytes(16), b"\xff" * 8)
    with _channel() as channel:
        try:
            list(_connected(channel, socket.AF_INET))
            code = _destroy(channel, socket.AF_INET, nobody)
        except OSError as error:
            if error.errno != errno.ENOENT:  # nobody answers about such sockets
                raise
            code = errno.EOPNOTSUPP
    if code == errno.ENOENT:
        return Probe(name, True, "supported")
    if code == errno.EOPNOTSUPP:
        detail = "not in this kernel: connected UDP sockets of the node stay with a dead backend"
        return Probe(
            name, False, detail, "a kernel with CONFIG_INET_UDP_DIAG and CONFIG_INET_DIAG_DESTROY"
        )
    raise OSError(code, os.strerror(code))


def _channel() -> socket.socket:
    made = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    )
    made.settimeout(_ANSWER_SECONDS)
    return made


def _ask(channel: socket.socket, kind: int, flags: int, family: int, key: bytes) -> None:
    body = _ASK.pack(family, socket.IPPROTO_UDP, _CONNECTED) + key
    channel.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 0, 0) + body)


def _connected(channel: socket.socket, family: int) -> Iterator[_Socket]:
    _ask(channel, _BY_FAMILY, _DUMP, family, bytes(_ID.size))
    while True:
        data = channel.recv(_BUFFER)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError(_code(data, at), "sock_diag")
            key = data[at + _HEADER.size + 4 : at + _HEADER.size + 4 + _ID.size]
            _, port, _, peer, cookie = _ID.unpack(key)
            if family == socket.AF_INET:
                peer = MAPPED + peer[:4]
            low, high = struct.unpack("=II", cookie)
            yield _Socket(family, key, (peer, port), high << 32 | low)
            at += (length + 3) & ~3


def _destroy(channel: socket.socket, family: int, key: bytes) -> int:
    """0, or an errno."""
    _ask(channel, _DESTROY, _ACK, family, key)
    return _code(channel.recv(_BUFFER), 0)


def _code(data: bytes, at: int) -> int:
    (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
    return -int(code)
