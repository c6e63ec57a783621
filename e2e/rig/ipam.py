"""Which address the next pod of a node gets: host-local hands them out one after the other."""

from __future__ import annotations

import contextlib
import ipaddress
import shlex
from collections.abc import Iterator

from kind import cluster

LAST = "/run/cni-ipam-state/ptp/last_reserved_ip.0"
FLAG = "/run/tidegate-pin"
SECONDS = 0.05


@contextlib.contextmanager
def pinned(node: str, address: str) -> Iterator[None]:
    """While in it, the node's next pod gets this IPv4 address, if it is free; also at its next
    try, where the first fails."""
    before = ipaddress.ip_address(address) - 1
    loop = f"while [ -e {FLAG} ]; do echo -n {before} > {LAST}; sleep {SECONDS}; done"
    cluster.inside(node, "touch", FLAG)
    cluster.inside(node, "sh", "-c", f"nohup sh -c {shlex.quote(loop)} >/dev/null 2>&1 &")
    try:
        yield
    finally:
        cluster.inside(node, "rm", "-f", FLAG)
