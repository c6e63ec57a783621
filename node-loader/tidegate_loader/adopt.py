"""Pods that ran before Tidegate did, from what libcni remembers of them.

libcni keeps the result of every ADD below /var/lib/cni/results until the DEL: whose pod it
was, the host side of its interface, its addresses. Reads only; nothing is asked of a runtime,
and no pod's namespace is entered.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from array import array
from pathlib import Path

import msgspec
from tidegate_api.state import encode

from tidegate_loader.local import LocalInterface, write_atomic

_SIOCGIFHWADDR, _SIOCETHTOOL, _GET_DRIVER = 0x8927, 0x8946, 3
_DRIVER_INFO_BYTES = 196
"""sizeof(struct ethtool_drvinfo); the driver's name is at 4, 32 bytes long."""


class _Interface(msgspec.Struct):
    name: str
    mac: str = ""
    sandbox: str = ""


class _Address(msgspec.Struct):
    address: str
    interface: int | None = None


class _Result(msgspec.Struct):
    interfaces: list[_Interface] = []
    ips: list[_Address] = []


class _Cached(msgspec.Struct, rename="camel"):
    network_name: str = ""
    if_name: str = msgspec.field(default="", name="ifName")
    cni_args: list[list[str]] | None = None
    result: _Result = msgspec.field(default_factory=_Result)


_decoder = msgspec.json.Decoder(_Cached)


def adopt(results: Path, network: str, interfaces: Path) -> tuple[list[str], list[str]]:
    """Write a LocalInterface for each running pod of `network` that has none yet.

    `results`: libcni's directory; `interfaces`: ours. (namespace/name of those written, what
    could not be made sense of). In the calling thread's network namespace. OSError: ours
    cannot be written."""
    written, problems = [], []
    for path in sorted(results.glob("*")) if results.is_dir() else ():
        try:
            found = _interface(_decoder.decode(path.read_bytes()), network)
        except FileNotFoundError:
            continue  # taken down meanwhile
        except (msgspec.MsgspecError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        if found is None or _is_known(interfaces / f"{found.uid}.json"):
            continue
        write_atomic(interfaces / f"{found.uid}.json", encode(found))
        written.append(f"{found.namespace}/{found.name}")
    return written, problems


def _is_known(path: Path) -> bool:
    """Whether there is a file for this pod already, and of an interface that is there."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        held = msgspec.json.decode(path.read_bytes(), type=LocalInterface)
        return socket.if_nametoindex(held.ifname) == held.ifindex
    return False


def _interface(cached: _Cached, network: str) -> LocalInterface | None:
    """None: not a pod's, another network's, or gone. ValueError: not to be made sense of."""
    known = {pair[0]: pair[1] for pair in cached.cni_args or () if len(pair) == 2}
    uid, namespace, name = (known.get(f"K8S_POD_{k}", "") for k in ("UID", "NAMESPACE", "NAME"))
    if cached.network_name != network or not (uid and namespace and name):
        return None
    if os.sep in uid or uid.startswith("."):
        raise ValueError(f"{uid!r} is no pod UID")
    result = cached.result
    hosts = [i.name for i in result.interfaces if not i.sandbox and _driver(i.name) == "veth"]
    if not hosts:
        return None  # an earlier boot's
    pod = [n for n, i in enumerate(result.interfaces) if i.sandbox and i.name == cached.if_name]
    if len(hosts) > 1 or len(pod) != 1 or not result.interfaces[pod[0]].mac:
        raise ValueError(f"pod {namespace}/{name}: its veth pair cannot be told from the result")
    ips = [a.address for a in result.ips if a.interface is None or a.interface == pod[0]]
    return LocalInterface(
        uid=uid,
        namespace=namespace,
        name=name,
        ifname=hosts[0],
        ifindex=socket.if_nametoindex(hosts[0]),
        pod_mac=result.interfaces[pod[0]].mac.lower(),
        host_mac=_mac(hosts[0]),
        addresses=sorted(str(ipaddress.ip_interface(ip).ip) for ip in ips),
        adopted=True,
    )


def _driver(name: str) -> str:
    """ "veth", "bridge", …; "" where there is no such interface."""
    info = array("B", struct.pack("=I", _GET_DRIVER).ljust(_DRIVER_INFO_BYTES, b"\0"))
    request = struct.pack("16sP", name.encode(), info.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            fcntl.ioctl(asked, _SIOCETHTOOL, request)
        except OSError:
            return ""
    return info.tobytes()[4:36].partition(b"\0")[0].decode()


def _mac(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, _SIOCGIFHWADDR, struct.pack("40s", name.encode()))
    return answer[18:24].hex(":")
