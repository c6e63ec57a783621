"""The CNI step as a container runtime runs it, and pods made as its main plugins make them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.loader_node import Node, ip
from support.loader_world import ROOT

STEP = ROOT / "node-loader" / "cni" / "build" / "tidegate-cni"
GATEWAY = "169.254.1.1"


@dataclass
class Pod:
    """A network namespace with `eth0`; the other end is in the node's, routed or on a bridge."""

    node: Node
    number: int
    bridge: str = ""
    uid: str = ""
    netns: str = ""
    host: str = ""
    address: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.uid = self.uid or f"uid-{self.number}"
        self.netns = f"{self.node.namespace}-p{self.number}"
        self.host = f"veth{self.number}"
        self.address = f"10.0.0.{self.number}"

    def make(self) -> None:
        outside, inside = ("-n", self.node.namespace), ("-n", self.netns)
        ip("netns", "add", self.netns)
        peer = ("peer", "name", "eth0", "netns", self.netns)
        ip(*outside, "link", "add", self.host, "type", "veth", *peer)
        ip(*outside, "link", "set", self.host, "up")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "address", "add", f"{self.address}/32", "dev", "eth0")
        if self.bridge:
            ip(*outside, "link", "set", self.host, "master", self.bridge)
            ip(*inside, "route", "add", "10.0.0.0/24", "dev", "eth0")
        else:
            ip(*outside, "address", "add", f"{GATEWAY}/32", "dev", self.host)
            ip(*outside, "route", "add", self.address, "dev", self.host)
            ip(*inside, "route", "add", GATEWAY, "dev", "eth0")
            ip(*inside, "route", "add", "default", "via", GATEWAY)
        self.result = self._result()

    def _result(self) -> dict[str, Any]:
        sandbox = f"/run/netns/{self.netns}"
        host = {"name": self.host, "mac": self.mac(self.node.namespace, self.host)}
        pod = {"name": "eth0", "mac": self.mac(self.netns, "eth0"), "sandbox": sandbox}
        bridge = [{"name": self.bridge}] if self.bridge else []
        interfaces = [*bridge, host, pod]
        ips = [{"address": f"{self.address}/24", "interface": len(interfaces) - 1}]
        return {"cniVersion": "1.0.0", "interfaces": interfaces, "ips": ips, "dns": {}}

    def mac(self, namespace: str, name: str) -> str:
        return str(show(namespace, name)["address"])

    @property
    def ifindex(self) -> int:
        return int(show(self.node.namespace, self.host)["ifindex"])

    def unmake(self) -> None:
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True, check=False)
        # The pair goes with the namespace, which the kernel takes down when it has time.
        quiet = ["ip", "-n", self.node.namespace, "link", "del", self.host]
        subprocess.run(quiet, capture_output=True, check=False)

    def run(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        entered = ["ip", "netns", "exec", self.netns, *command]
        return subprocess.Popen(
            entered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
        )


def show(namespace: str, name: str) -> dict[str, Any]:
    shown = subprocess.run(
        ["ip", "-n", namespace, "-j", "link", "show", name], check=True, capture_output=True
    )
    return dict(json.loads(shown.stdout)[0])


@contextlib.contextmanager
def pod(node: Node, number: int, bridge: str = "", uid: str = "") -> Iterator[Pod]:
    found = Pod(node, number, bridge, uid)
    try:
        found.make()
        yield found
    finally:
        found.unmake()


def config(node: Node, **more: Any) -> dict[str, Any]:
    """What a runtime sends: the entry of the list, with what it adds."""
    return {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "tidegate-cni",
        "pinDir": str(node.pin_dir),
        "socket": str(node.run_dir / "cni.sock"),
        "timeoutSeconds": 5,
    } | more


def environment(command: str, found: Pod | None, **more: str) -> dict[str, str]:
    settled = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c1", "CNI_PATH": "/opt/cni/bin"}
    if found is not None:
        settled |= {
            "CNI_NETNS": f"/run/netns/{found.netns}",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;"
            f"K8S_POD_NAME=pod-{found.number};K8S_POD_UID={found.uid}",
        }
    return settled | more


def start(
    command: str, given: dict[str, Any] | str, found: Pod | None = None, **more: str
) -> subprocess.Popen[str]:
    """In the node's network namespace, where a pod is given."""
    entered: Sequence[str] = ()
    if found is not None:
        entered = ("nsenter", f"--net=/run/netns/{found.node.namespace}")
    process = subprocess.Popen(
        [*entered, str(STEP)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"]} | environment(command, found, **more),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(given if isinstance(given, str) else json.dumps(given))
        process.stdin.close()
    process.stdin = None
    return process


@dataclass
class Answer:
    code: int
    output: dict[str, Any]
    seconds: float

    @property
    def message(self) -> str:
        return str(self.output.get("msg", ""))


def finish(process: subprocess.Popen[str], seconds: float = 30.0) -> Answer:
    began = time.monotonic()
    out, _ = process.communicate(timeout=seconds)
    output = json.loads(out) if out.strip() else {}
    return Answer(process.returncode, output, time.monotonic() - began)


def call(
    command: str, given: dict[str, Any] | str, found: Pod | None = None, **more: str
) -> Answer:
    return finish(start(command, given, found, **more))
