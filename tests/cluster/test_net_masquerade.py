"""Pods reach what is outside with their node's address: real packets, real sockets.

"Outside" is a network namespace on the nodes' network that has no route to any pod, so nothing
that a pod sends with its own address is ever answered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.harness import until
from tidegate_cli.standalone import teardown
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check
from tidegate_cli.standalone.rundir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

OUTSIDE = {4: "172.18.0.200", 6: "fc00:f853:ccd:e793::200"}
LEFT_OUT = {4: "172.18.0.201", 6: "fc00:f853:ccd:e793::201"}
NODES = {
    "one": {4: "172.18.0.2", 6: "fc00:f853:ccd:e793::2"},
    "two": {4: "172.18.0.3", 6: "fc00:f853:ccd:e793::3"},
}
PORT, CLOSED, BYTES = 7000, 7001, 3_000_000
FOLDER = """
apiVersion: v1
kind: Pod
metadata: {name: one, labels: {app: x}}
spec: {nodeName: node-1, containers: [{name: main, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two, labels: {app: x}}
spec: {nodeName: node-2, containers: [{name: main, image: x}]}
"""
SERVE = """
import socket, socketserver, sys, threading
log = open(sys.argv[1], "a", buffering=1)
class TCP(socketserver.BaseRequestHandler):
    def handle(self):
        print(self.client_address[0].removeprefix("::ffff:"), file=log)
        left = int(self.request.recv(16, socket.MSG_WAITALL))
        self.request.sendall(self.client_address[0].ljust(64).encode())
        while left:
            data = self.request.recv(min(left, 65536))
            self.request.sendall(data)
            left -= len(data)
class Server(socketserver.ThreadingTCPServer):
    address_family, allow_reuse_address, daemon_threads = socket.AF_INET6, True, True
threading.Thread(target=Server(("::", int(sys.argv[2])), TCP).serve_forever).start()
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IPV6, 49, 1)  # IPV6_RECVPKTINFO: answered from where it was asked
udp.bind(("::", int(sys.argv[2])))
print("ready", flush=True)
while True:
    data, info, _, who = udp.recvmsg(65536, 1024)
    print(who[0].removeprefix("::ffff:"), file=log)
    udp.sendmsg([who[0].ljust(64).encode() + data], [(l, t, d) for l, t, d in info], 0, who)
"""
ASK = """
import json, socket, sys, threading, zlib
family, kind, host, port, size = sys.argv[1:]
s = socket.socket(int(family), int(kind))
s.settimeout(3)
sent = bytes(range(256)) * (int(size) // 256)
found = b""
try:
    s.connect((host, int(port)))
    if s.type == socket.SOCK_STREAM:
        s.settimeout(30)
        s.sendall(str(len(sent)).zfill(16).encode())
        threading.Thread(target=s.sendall, args=(sent,)).start()
        while len(found) < 64 + len(sent):
            data = s.recv(65536)
            if not data:
                break
            found += data
    else:
        s.send(sent)
        found = s.recv(65536)
    seen = found[:64].decode().strip().removeprefix("::ffff:")
    print(json.dumps([seen, found[64:] == sent]))
except OSError as error:
    print(json.dumps([type(error).__name__, False]))
"""


ECHO = """
import socket, sys
host, size = sys.argv[1:]
v6 = ":" in host
family, protocol = (socket.AF_INET6, 58) if v6 else (socket.AF_INET, 1)
s = socket.socket(family, socket.SOCK_DGRAM, protocol)
s.settimeout(5)
s.connect((host, 0))
for sequence in range(2):
    sent = bytes([128 if v6 else 8, 0, 0, 0, 0, 0, 0, sequence]) + bytes(range(256)) * int(size)
    s.send(sent)
    assert s.recv(65536)[6:] == sent[6:]
"""


@dataclass
class Cluster:
    run_dir: RunDir
    outside: str
    seen: Path
    """Who asked, one line each."""

    def tidegate(self, *argv: str) -> str:
        command = [sys.executable, "-m", "tidegate_cli", *argv]
        environment = os.environ | {"TIDEGATE_RUN_DIR": str(self.run_dir.path)}
        found = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def ask(
        self, pod: str, host: str, size: int = 256, udp: bool = False, port: int = PORT
    ) -> tuple[str, bool]:
        """(whom the server saw, whether it sent all back), or (what went wrong, False)."""
        family, kind = ("10" if ":" in host else "2"), ("2" if udp else "1")
        argv = [sys.executable, "-c", ASK, family, kind, host, str(port), str(size)]
        seen, whole = json.loads(self.tidegate("exec", pod, "--", *argv))
        return seen, whole


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("masquerade")
    found = Cluster(RunDir.at(base / "run"), f"tgm-{os.getpid()}", base / "seen")
    folder = base / "manifests"
    folder.mkdir()
    (folder / "all.yaml").write_text(FOLDER)
    server = None
    ip("netns", "add", found.outside)
    try:
        left_out = ",".join(f"{a}/{32 if v == 4 else 128}" for v, a in LEFT_OUT.items())
        options = ("--masquerade", "--non-masquerade-cidrs", left_out)
        found.tidegate("up", str(folder), "--detach", "--nodes", "2", "--no-observer", *options)
        fabric, out = f"{found.run_dir.netns_prefix}_fabric", found.outside
        peer = ("type", "veth", "peer", "eth0", "netns", out)
        ip("-n", fabric, "link", "add", "out", *peer)
        ip("-n", fabric, "link", "set", "out", "master", "br0", "up")
        ip("-n", out, "link", "set", "lo", "up")
        ip("-n", out, "link", "set", "eth0", "up")
        for of in (OUTSIDE, LEFT_OUT):
            ip("-n", out, "addr", "add", f"{of[4]}/16", "dev", "eth0")
            ip("-n", out, "addr", "add", f"{of[6]}/64", "dev", "eth0", "nodad")
        argv = [sys.executable, "-c", SERVE, str(found.seen), str(PORT)]
        server = subprocess.Popen(
            ["ip", "netns", "exec", out, *argv], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield found
    finally:
        if server is not None:
            server.kill()
            server.communicate()
        ip("netns", "del", found.outside)
        teardown.down(found.run_dir)


@pytest.mark.parametrize(("pod", "version"), [("one", 4), ("two", 6)])
def test_the_world_sees_the_node(cluster: Cluster, pod: str, version: int) -> None:
    """Much both ways at once, in segments as large as the devices make them."""
    node, world = NODES[pod][version], OUTSIDE[version]
    assert cluster.ask(pod, world, BYTES) == (node, True)
    assert cluster.ask(pod, world, udp=True) == (node, True)
    assert cluster.ask(pod, world, 8192, udp=True) == (node, True), "in fragments"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", ["1", "16"])
def test_echo(cluster: Cluster, version: int, size: str) -> None:
    """Whole, and in fragments."""
    cluster.tidegate("exec", "one", "--", sys.executable, "-c", ECHO, OUTSIDE[version], size)


@pytest.mark.parametrize("version", [4, 6])
def test_a_closed_port_is_heard_of(cluster: Cluster, version: int) -> None:
    """By a reset, and by an ICMP error about a datagram."""
    for udp in (False, True):
        found = cluster.ask("one", OUTSIDE[version], udp=udp, port=CLOSED)
        assert found == ("ConnectionRefusedError", False)


@pytest.mark.parametrize("version", [4, 6])
def test_a_network_that_is_left_out_sees_the_pod(cluster: Cluster, version: int) -> None:
    assert cluster.ask("one", LEFT_OUT[version], udp=True) == ("TimeoutError", False)
    prefix = "10.244." if version == 4 else "fd00:10:244:"
    until(
        lambda: any(x.startswith(prefix) for x in cluster.seen.read_text().split()),
        "the datagram is there, with the pod's address",
    )


def test_pods_and_nodes_see_the_pod(cluster: Cluster) -> None:
    code = (
        "import socket,sys; s = socket.create_server(('', 7100)); print('up', flush=True); "
        "print(s.accept()[1][0])"
    )
    state = cluster.run_dir.read()
    assert state is not None
    pods = {p.name: p for p in state.pods}
    (node,) = (n for n in state.nodes if n.name == "node-2")
    for netns, address in (
        (pods["two"].netns, pods["two"].addresses[0]),
        (node.netns, NODES["two"][4]),
    ):
        enter = ["ip", "netns", "exec", Path(netns).name]
        server = subprocess.Popen(
            [*enter, sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
            ask = f"import socket; socket.create_connection(('{address}', 7100), 5)"
            cluster.tidegate("exec", "one", "--", sys.executable, "-c", ask)
            assert server.communicate(timeout=20)[0].strip() == pods["one"].addresses[0]
        finally:
            server.kill()
            server.wait()


def test_it_is_counted(cluster: Cluster) -> None:
    cluster.ask("one", OUTSIDE[4])
    rows = [
        line.split()[:2]
        for line in cluster.tidegate("metrics", "list", "--node", "node-1").splitlines()
    ]
    assert ["Masqueraded", "EGRESS"] in rows
    assert ["Masqueraded", "INGRESS"] in rows
