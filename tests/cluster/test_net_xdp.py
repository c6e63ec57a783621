"""XDP at the nodes' uplinks, with real packets: the same answers with and without tc's program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.harness import until
from cluster.outside import NODES, Cluster, pod, service, up
from tidegate_bpf import Link

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

FOLDER = "---".join(
    [
        pod("near", "node-1", "near"),
        pod("far", "node-2", "far"),
        service("far", 30080, app="far"),
        service("near", 30090, app="near"),
    ]
)
FINISH = """
import array, fcntl, socket, struct, sys
value = array.array("B", struct.pack("=II", 0x17, 0))  # ETHTOOL_STXCSUM
request = struct.pack("16sP", b"eth0", value.buffer_info()[0])
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ("--load-balancer-acceleration", "best-effort")
    with up(tmp_path_factory.mktemp("xdp"), FOLDER, *options) as found:
        yield found


def finish_checksums(cluster: Cluster) -> None:
    """As cards do: what a veth's stack leaves unfinished XDP leaves to tc."""
    state = cluster.run_dir.read()
    assert state is not None
    for netns in (cluster.client, *(Path(p.netns).name for p in state.pods)):
        command = ["ip", "netns", "exec", netns, sys.executable, "-c", FINISH]
        subprocess.run(command, check=True)


def answers(cluster: Cluster, port: int) -> set[str]:
    return {
        who
        for version in (4, 6)
        for udp in (False, True)
        for who, _ in cluster.ask("", NODES["node-1"][version], port + udp, 3, udp=udp)
    }


def test_the_same_answers_and_then_without_tc(cluster: Cluster) -> None:
    links = cluster.run_dir.bpf / "node-1" / "links"
    until(lambda: list(links.glob("xdp-*-generic")), "XDP at node-1's uplink")
    assert answers(cluster, 30080) == {"far"}, "left to tc"
    assert answers(cluster, 30090) == {"near"}
    finish_checksums(cluster)
    assert answers(cluster, 30080) == {"far"}
    assert answers(cluster, 30090) == {"near"}, "a backend here is tc's"
    (uplink,) = links.glob("uplink-*-ingress")
    with Link.open_pinned(str(uplink)) as link:
        link.detach()
    assert answers(cluster, 30080) == {"far"}, "both ways of each flow"
    (seen,) = set(cluster.ask("", NODES["node-1"][4], 30080, 3))
    assert seen == ("far", NODES["node-1"][4])
