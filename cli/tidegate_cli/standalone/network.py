"""Links, addresses and routes of nodes and pods, as kind's plain CNI makes them.

    fabric: br0 ── n0, n1, …                            one bridge, the "data centre"
    node:   eth0 (node addresses), one veth a pod       routes; forwards
    pod:    eth0 (pod address /32, /128)                default route by the gateway

The gateway is the first address of the node's pod CIDR, on every host-side
veth. A pod's host side is made DOWN: `connect_pod` brings it up once the
node's loader has put its programs there. Nothing here knows policy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from tidegate_operator.objects import gateways

from tidegate_cli.standalone import netns
from tidegate_cli.standalone.errors import NetworkError
from tidegate_cli.standalone.netlink import Batch
from tidegate_cli.standalone.rundir import Node, Pod

# IPv4 and IPv6 prefix lengths of the network that nodes share, as in kind.
NODE_PREFIX_BITS = {4: 16, 6: 64}
POD_INTERFACE = "eth0"
BRIDGE = "br0"

_IFA_F_NODAD = 0x02
_SCOPE_LINK = 253

_BASE_SYSCTLS = {
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
    "ipv4/conf/all/accept_redirects": "0",
    "ipv4/conf/default/accept_redirects": "0",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/default/accept_redirects": "0",
    # A command in a pod may ping without privileges, as in a container.
    "ipv4/ping_group_range": "0 2147483647",
}
_POD_SYSCTLS = _BASE_SYSCTLS
_NODE_SYSCTLS = _BASE_SYSCTLS | {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
_FABRIC_SYSCTLS = {"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"}


def mac(*words: str) -> str:
    """A stable, locally administered unicast address."""
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return ":".join(f"{byte:02x}" for byte in b"\x02" + digest[:5])


def create_fabric(name: str) -> Path:
    namespace = netns.create(name, _FABRIC_SYSCTLS)
    batch = Batch()
    batch.link("add", ifname=BRIDGE, kind="bridge")
    batch.run(namespace)
    batch = Batch()
    batch.link("set", index=index_of(namespace, BRIDGE), state="up")
    batch.run(namespace)
    return namespace


def create_nodes(fabric: Path, nodes: list[Node]) -> None:
    """Makes the nodes' namespaces, their links to the fabric and the routes
    between their pod CIDRs."""
    links = Batch()
    with contextlib.ExitStack() as stack:
        for index, node in enumerate(nodes):
            namespace = netns.create(Path(node.netns).name, _NODE_SYSCTLS)
            peer = {
                "ifname": POD_INTERFACE,
                "address": mac(node.netns, "eth0"),
                "net_ns_fd": _opened(stack, namespace),
            }
            links.link("add", ifname=f"n{index}", kind="veth", peer=peer)
        links.run(fabric)
    bridge = index_of(fabric, BRIDGE)
    ports = Batch()
    for index, _ in enumerate(nodes):
        ports.link("set", index=index_of(fabric, f"n{index}"), master=bridge)
        ports.link("set", index=index_of(fabric, f"n{index}"), state="up")
    ports.run(fabric)
    for node in nodes:
        _configure_node(node, [other for other in nodes if other is not node])


def _configure_node(node: Node, others: Iterable[Node]) -> None:
    namespace = Path(node.netns)
    eth0 = index_of(namespace, POD_INTERFACE)
    batch = Batch()
    batch.link("set", index=1, state="up")
    batch.link("set", index=eth0, state="up")
    for address in node.addresses:
        _add_address(batch, eth0, address, NODE_PREFIX_BITS[_family(address)])
    for other in others:
        by_family = {_family(address): address for address in other.addresses}
        for cidr in other.pod_cidrs:
            via = by_family.get(_family(cidr))
            if via is not None:
                batch.route("add", dst=cidr, gateway=via, oif=eth0)
    batch.run(namespace)


def create_pods(node: Node, pods: list[Pod]) -> None:
    """Makes the pods' namespaces and interfaces; the host sides stay DOWN."""
    links = Batch()
    with contextlib.ExitStack() as stack:
        for pod in pods:
            namespace = netns.create(Path(pod.netns).name, _POD_SYSCTLS)
            peer = {
                "ifname": POD_INTERFACE,
                "address": pod_mac(pod),
                "net_ns_fd": _opened(stack, namespace),
            }
            links.link("add", ifname=pod.ifname, kind="veth", address=host_mac(pod), peer=peer)
        links.run(Path(node.netns))
    host_sides = Batch()
    for pod in pods:
        _configure_pod(node, pod)
        for gateway in gateways(node.pod_cidrs):
            host = index_of(Path(node.netns), pod.ifname)
            _add_address(host_sides, host, gateway, _host_bits(gateway))
    host_sides.run(Path(node.netns))


def _configure_pod(node: Node, pod: Pod) -> None:
    namespace = Path(pod.netns)
    eth0 = index_of(namespace, POD_INTERFACE)
    batch = Batch()
    batch.link("set", index=1, state="up")
    batch.link("set", index=eth0, state="up")
    for address in pod.addresses:
        _add_address(batch, eth0, address, _host_bits(address))
    families = {_family(address) for address in pod.addresses}
    for gateway in gateways(node.pod_cidrs):
        if _family(gateway) not in families:
            continue
        batch.route("add", dst=_host_route(gateway), oif=eth0, scope=_SCOPE_LINK)
        everything = "0.0.0.0/0" if _family(gateway) == 4 else "::/0"
        batch.route("add", dst=everything, gateway=gateway, oif=eth0)
    batch.run(namespace)


def connect_pods(node: Node, pods: Iterable[Pod]) -> None:
    """Brings the host sides up and routes the pods' addresses to them."""
    namespace = Path(node.netns)
    batch = Batch()
    for pod in pods:
        index = index_of(namespace, pod.ifname)
        batch.link("set", index=index, state="up")
        for address in pod.addresses:
            batch.route("add", dst=_host_route(address), oif=index, scope=_SCOPE_LINK)
    batch.run(namespace)


def delete_pod(node: Node, pod: Pod) -> None:
    """The link goes first: the kernel frees a namespace some time later, and
    its veth pair only then."""
    try:
        index = index_of(Path(node.netns), pod.ifname)
    except NetworkError:
        pass
    else:
        batch = Batch()
        batch.link("del", index=index)
        batch.run(Path(node.netns))
    netns.delete(Path(pod.netns).name)


def pod_mac(pod: Pod) -> str:
    return mac(pod.netns, pod.uid, "pod")


def host_mac(pod: Pod) -> str:
    return mac(pod.netns, pod.uid, "host")


def index_of(namespace: Path, ifname: str) -> int:
    """Raises NetworkError."""
    try:
        with netns.inside(namespace):
            return socket.if_nametoindex(ifname)
    except OSError as error:
        raise NetworkError(f"{namespace.name}: no interface {ifname}") from error


def _opened(stack: contextlib.ExitStack, namespace: Path) -> int:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _add_address(batch: Batch, index: int, address: str, bits: int) -> None:
    flags = {} if _family(address) == 4 else {"flags": _IFA_F_NODAD}
    batch.addr("add", index=index, address=address, prefixlen=bits, **flags)


def _family(text: str) -> int:
    return 6 if ":" in text else 4


def _host_bits(address: str) -> int:
    return 128 if _family(address) == 6 else 32


def _host_route(address: str) -> str:
    return f"{address}/{_host_bits(address)}"
