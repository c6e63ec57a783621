"""kube-proxy beside us: its rules are found, whatever mode it has, and it is said."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import loader_node
from support import loader_world as world
from support.loader_node import Node, ip, poll
from tidegate_bpf import netns
from tidegate_loader import kubeproxy

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with loader_node.made(tmp_path) as found:
        yield found


def chain(node: Node, program: str, name: str) -> None:
    command = ["ip", "netns", "exec", node.namespace, program, "-t", "nat", "-N", name]
    subprocess.run(command, check=True, capture_output=True)


def table(name: str, family: int) -> None:
    """Make an nftables table: NFT_MSG_NEWTABLE in a batch."""

    def message(kind: int, flags: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body

    text = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(text), kubeproxy.TABLE_NAME) + text
    new = struct.pack("=BBH", family, 0, 0) + attribute + bytes(-len(text) % 4)
    bounds = struct.pack(">BBH", 0, 0, 10)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, kubeproxy.NETLINK_NETFILTER) as link:
        link.send(
            message(0x10, 1, bounds)
            + message(kubeproxy.NFT, 1 | 4 | 0x400, new)
            + message(0x11, 1, bounds)
        )
        answer = link.recv(4096)
    assert struct.unpack_from("=Hxxxxxxxxxxi", answer, 4)[1] == 0


def traces(node: Node) -> list[str]:
    with netns.inside(f"/run/netns/{node.namespace}"):
        return kubeproxy.traces()


def test_rules_of_every_mode(node: Node) -> None:
    chain(node, "iptables", "OTHER-SERVICES")
    assert traces(node) == []
    chain(node, "iptables", "KUBE-SERVICES")
    assert traces(node) == ["iptables chain KUBE-SERVICES"]
    chain(node, "ip6tables", "KUBE-SERVICES")
    with netns.inside(f"/run/netns/{node.namespace}"):
        table("kube-proxy", kubeproxy.IPV4)
        table("kube-proxy", kubeproxy.IPV6)
    assert traces(node) == [asked.words for asked in kubeproxy.NAMES]


def test_it_is_said_while_it_is_so(node: Node) -> None:
    def said() -> list[str]:
        return [c.message for c in node.realised().status.conditions if c.type == "KubeProxy"]

    node.write(world.example())
    node.start()
    node.wait_for(world.example(), 0)
    assert said() == []
    chain(node, "iptables", "KUBE-SERVICES")
    assert node.process is not None
    node.process.send_signal(signal.SIGUSR1)
    poll("a word of it", said)
    assert "iptables chain KUBE-SERVICES" in said()[0]
    ready = [c.status for c in node.realised().status.conditions if c.type == "Ready"]
    assert ready == ["True"]
    ip("netns", "exec", node.namespace, "iptables", "-t", "nat", "-X", "KUBE-SERVICES")
    node.process.send_signal(signal.SIGUSR1)
    poll("nothing of it", lambda: not said())
