"""XDP at the uplinks, where it is asked for: in the driver, else in the kernel's generic way.

Pins: links/xdp-<ifindex>-native, links/xdp-<ifindex>-generic. May not live here: what is an uplink,
and what the program does; without it tc does the same for every packet.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tidegate_bpf import BpfError, Program, attach_xdp

from tidegate_loader.attach import GONE, adopt, pin_over

OBJECT = "xdp.o"
PROGRAM = "from_wire"
DISABLED, NATIVE, BEST_EFFORT = "disabled", "native", "best-effort"
MODES = (DISABLED, NATIVE, BEST_EFFORT)
"""What `--load-balancer-acceleration` takes."""
_WAYS = {NATIVE: ("native",), BEST_EFFORT: ("native", "generic")}
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 3
_DRVINFO_BYTES = 196
_NAME = slice(4, 36)


class Found(NamedTuple):
    ways: dict[int, str]
    """Interface → "native" or "generic"."""
    problems: list[str]


def attach(links: Path, program: Program, wanted: Iterable[int], mode: str) -> Found:
    """At the `wanted` interfaces; where it hangs already, the link gets this program. A link of a
    way that `mode` does not have goes."""
    found = Found({}, [])
    here = {index for index, way, path in _pins(links) if _keep(way, mode, path)}
    for ifindex in sorted(here.union(wanted)):
        try:
            found.ways[ifindex] = _one(links, program, ifindex, mode)
        except BpfError as error:
            if error.errno not in GONE:
                found.problems.append(f"XDP cannot be attached to interface {ifindex}: {error}")
                continue
            for way in _WAYS[BEST_EFFORT]:
                _pin(links, ifindex, way).unlink(missing_ok=True)
    return found


def remove(pin_dir: Path) -> None:
    """Nothing of it stays in the kernel; harmless where there is none."""
    for _, _, path in list(_pins(pin_dir / "links")):
        path.unlink(missing_ok=True)
    (pin_dir / "progs" / PROGRAM).unlink(missing_ok=True)


def _pin(links: Path, ifindex: int, way: str) -> Path:
    return links / f"xdp-{ifindex}-{way}"


def _pins(links: Path) -> Iterator[tuple[int, str, Path]]:
    for path in links.glob("xdp-*"):
        _, index, way = path.name.split("-")[:3]
        yield int(index), way.partition("_")[0], path


def _keep(way: str, mode: str, path: Path) -> bool:
    if way in _WAYS[mode]:
        return True
    path.unlink(missing_ok=True)
    return False


def _one(links: Path, program: Program, ifindex: int, mode: str) -> str:
    for way in _WAYS[mode]:
        if adopt(program, _pin(links, ifindex, way), ifindex):
            return way
    try:
        socket.if_indextoname(ifindex)
    except OSError as error:
        # What linking says of one that is not there is EINVAL.
        raise BpfError(errno.ENODEV, f"no interface {ifindex}") from error
    # A veth runs it, but what is sent back out is lost unless the other end happens to poll.
    native = driver(ifindex) != "veth"
    trouble = BpfError(errno.EOPNOTSUPP, "no XDP of its own (veth)")
    for way in _WAYS[mode]:
        if way == "native" and not native:
            continue
        try:
            with attach_xdp(program, ifindex, native=way == "native") as link:
                pin_over(link, _pin(links, ifindex, way))
        except BpfError as error:
            if error.errno in GONE:
                raise
            trouble = error
        else:
            return way
    raise trouble


def driver(ifindex: int) -> str:
    """Name of an interface's driver, in the calling thread's network namespace; "" if it has none
    or is gone."""
    answer = array.array("B", struct.pack("=I", _ETHTOOL_GDRVINFO).ljust(_DRVINFO_BYTES, b"\0"))
    try:
        name = socket.if_indextoname(ifindex)
        request = struct.pack("16sP", name.encode(), answer.buffer_info()[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            fcntl.ioctl(asked, _SIOCETHTOOL, request)
    except OSError:
        return ""
    return bytes(answer[_NAME]).partition(b"\0")[0].decode("ascii", "replace")
