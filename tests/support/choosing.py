"""Which backend a new flow to a Service is led to: by a socket, or by packets through a node's
programs run by hand (`ca_rig.Node`). IPv4."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections.abc import Callable, Iterator

from support import ca_rig, frames
from support.cgroup import joined
from support.lab import DROP, REDIRECT
from tidegate_bpf import AttachType, SkbContext, attach_cgroup

Ask = Callable[[str, int], str]
"""(address, port) → the backend's address, "refused" or "dropped"."""
REFUSED, DROPPED = "refused", "dropped"


def by_packet(
    node: ca_rig.Node, program: str, clients: list[str], ifindex: int, protocol: int = frames.UDP
) -> Ask:
    """A packet of one client after the other that comes in there, from a port of its own. Its
    checksum is not that of its port: nobody asks."""
    run, context = node.programs[program].test_run, SkbContext(ifindex=ifindex, ingress_ifindex=1)
    sources = itertools.cycle(clients)
    ports = itertools.cycle(range(1024, 65536))

    def ask(address: str, port: int) -> str:
        client = next(sources)
        data = bytearray(frames.packet(client, address, protocol, 1, port))
        struct.pack_into("!H", data, 34, next(ports))
        result = run(bytes(data), context, data_out_size=256)
        if result.retval == DROP:
            return DROPPED
        to = socket.inet_ntoa(result.data_out[30:34])
        # Who is refused gets an answer.
        return REFUSED if result.retval == REDIRECT and to == client else to

    return ask


@contextlib.contextmanager
def by_socket(node: ca_rig.Node, group: str) -> Iterator[Ask]:
    """This process's datagram sockets, in a cgroup of that name. Only connecting is translated, so
    a socket's peer is the backend."""

    def ask(address: str, port: int) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            try:
                made.connect((address, port))
            except ConnectionRefusedError:
                return REFUSED
            peer = str(made.getpeername()[0])
        # What nobody here serves is dropped where it leaves.
        return DROPPED if peer == address else peer

    with (
        joined(group) as held,
        attach_cgroup(node.programs["connect4"], held, AttachType.INET4_CONNECT),
    ):
        yield ask
