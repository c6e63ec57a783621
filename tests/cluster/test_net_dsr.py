"""Direct server return with real packets: who sees whom, and which way the answers take.

Each frame that the asked node's uplink and the client's interface carry is read, so that an answer
by way of the asked node would be seen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.harness import until
from cluster.outside import NODES, OUTSIDE, Cluster, pod, service, up
from support import frames as f
from support.ca_town import Town
from tidegate_bpf import netns

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

FOLDER = "---".join(
    [
        pod("one", "node-1", "near"),
        pod("two", "node-2", "far"),
        service("near", 30090, app="near"),
        service("far", 30080, app="far"),
        service(
            "balanced",
            30100,
            app="far",
            status="status: {loadBalancer: {ingress: [{ip: 198.51.100.9, ipMode: VIP}]}}",
        ),
    ]
)
TALK = """
import json, socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
s.settimeout(1.5)
for line in sys.stdin:
    try:
        s.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
        data = b""
        while not data.endswith(b"}\\n"):
            data += s.recv(4096)
        body = json.loads(data.split(b"\\r\\n\\r\\n", 1)[1])
        print(body["pod"].split("/")[1], body["client"], flush=True)
    except TimeoutError:
        print("timeout", flush=True)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with up(tmp_path_factory.mktemp("dsr"), FOLDER, "--load-balancer-mode", "dsr") as found:
        yield found


@dataclass
class Tap:
    """What `eth0` of a network namespace carries, from now on."""

    sock: socket.socket
    mac: str

    def read(self) -> list[f.Frame]:
        """Frames of this interface's own since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = f.parse(self.sock.recv(65536))
                if self.mac in (frame.eth_src, frame.eth_dst):
                    found.append(frame)
        return found


@contextlib.contextmanager
def tap(namespace: str) -> Iterator[Tap]:
    with netns.inside(f"/run/netns/{namespace}"):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
    with sock:
        sock.bind(("eth0", 3))
        sock.setblocking(False)
        yield Tap(sock, f.mac_text(sock.getsockname()[4]))


def node_netns(cluster: Cluster, name: str) -> str:
    state = cluster.run_dir.read()
    assert state is not None
    return next(Path(n.netns).name for n in state.nodes if n.name == name)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("udp", [False, True])
def test_the_backends_node_answers_the_client(cluster: Cluster, udp: bool, version: int) -> None:
    asked, port = NODES["node-1"][version], 30080 + udp
    with (
        tap(cluster.client) as client,
        tap(node_netns(cluster, "node-1")) as first,
        tap(node_netns(cluster, "node-2")) as second,
    ):
        seen = set(cluster.ask("", asked, port, 3, udp=udp))
        here, there, beyond = client.read(), first.read(), second.read()
    # Over TCP the pod says whom it saw, over UDP the client who answered.
    assert seen == {("two", asked if udp else OUTSIDE[version])}
    answers = [x for x in here if x.eth_dst == client.mac and (x.src, x.sport) == (asked, port)]
    assert answers
    assert {x.eth_src for x in answers} == {second.mac}
    passed = {(x.src, x.dst) for x in there if x.protocol in (f.TCP, f.UDP)}
    assert (OUTSIDE[version], asked) in passed
    assert [pair for pair in passed if pair[1] == OUTSIDE[version]] == [], "none by way of node-1"
    carried = {x.src for x in beyond if x.eth_dst == second.mac and x.dport == 6081}
    assert carried == {asked}


def test_a_backend_of_the_asked_node_and_a_client_of_the_cluster(cluster: Cluster) -> None:
    assert set(cluster.ask("", NODES["node-1"][4], 30090, 3)) == {("one", OUTSIDE[4])}
    # A pod asks another node, whose backend is on the pod's own: as without the option.
    assert set(cluster.ask("default/one", NODES["node-2"][4], 30090, 3)) == {
        ("one", NODES["node-2"][4])
    }


def test_a_load_balancers_address(cluster: Cluster) -> None:
    """The client's route for it leads to node-1."""
    assert set(cluster.ask("", "198.51.100.9", 80, 3)) == {("two", OUTSIDE[4])}


def test_flows_outlive_loaders_and_policies_cut_them(cluster: Cluster) -> None:
    town = Town(cluster.run_dir, cluster.folder)
    command = ["ip", "netns", "exec", cluster.client, sys.executable, "-c", TALK]
    with subprocess.Popen(
        [*command, NODES["node-1"][4], "30080"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as talk:

        def said() -> str:
            assert talk.stdin is not None
            assert talk.stdout is not None
            talk.stdin.write("\n")
            talk.stdin.flush()
            return talk.stdout.readline().strip()

        try:
            assert said() == f"two {OUTSIDE[4]}"
            before = town.loaders()
            for pid in before.values():
                os.kill(pid, signal.SIGKILL)
            assert said() == f"two {OUTSIDE[4]}", "while there is no loader"
            until(
                lambda: (
                    len(town.loaders()) == 2
                    and not set(before.values()) & set(town.loaders().values())
                ),
                "other loaders",
            )
            assert said() == f"two {OUTSIDE[4]}"
            (cluster.folder / "policy.yaml").write_text("""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: far}
spec:
  podSelector: {matchLabels: {app: far}}
  ingress: [{from: [{ipBlock: {cidr: 172.18.0.2/32}}]}]
""")
            until(lambda: said() == "timeout", "the node that was asked opens nothing")
        finally:
            (cluster.folder / "policy.yaml").unlink(missing_ok=True)
            talk.kill()
    until(
        lambda: cluster.ask("", NODES["node-1"][4], 30080) == [("two", OUTSIDE[4])],
        "nobody is isolated",
    )
