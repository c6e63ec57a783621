"""What a node does where the cluster ends, as values of the chart ask for it: masquerading, direct
server return and XDP at the uplinks, with a host that is no node.

The nodes' own masquerading by iptables is taken away meanwhile. A veth's driver has no XDP that
sends back out, so it is the kernel's generic one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from kind import cluster
from rig import api, asking, install, outside, pods
from rig.asking import Answer, Asker, Question
from rig.pods import Pod

pytestmark = pytest.mark.kind

SPACE = "edge"
PORT = 30390
VALUES = (
    "masquerade.enabled=true",
    "loadBalancer.mode=dsr",
    "loadBalancer.acceleration=best-effort",
)
LINKS = "/sys/fs/bpf/tidegate/links"
SECONDS = 90.0


@dataclass(frozen=True)
class Place:
    client: Pod
    """On the node that is asked; the Service's one pod is on another."""
    nodes: dict[str, tuple[str, str]]
    """Their addresses, IPv4 and IPv6."""
    host: outside.Host
    asker: Asker
    """At the host outside."""

    @property
    def asked(self) -> tuple[str, str]:
        return self.nodes[self.client.node]

    def service(self, count: int = 5) -> list[Answer]:
        """The host outside asks for the NodePort, in both families."""
        return self.asker.ask([Question(a, PORT) for a in self.asked for _ in range(count)])


def service() -> pods.Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": SPACE},
        "spec": {
            "type": "NodePort",
            "ipFamilyPolicy": "RequireDualStack",
            "selector": {"app": "web"},
            "ports": [{"port": 80, "nodePort": PORT}],
        },
    }


@contextlib.contextmanager
def without_iptables() -> Iterator[None]:
    """No node masquerades by rules of the cluster's network."""
    for node in cluster.nodes():
        for command in ("iptables", "ip6tables"):
            for rule in cluster.inside(
                node, command, "-t", "nat", "-S", "POSTROUTING"
            ).splitlines():
                if rule.startswith("-A") and rule.endswith("-j MASQUERADE"):
                    words = rule.replace("-A", "-D", 1).split()
                    cluster.inside(node, command, "-t", "nat", *words)
    try:
        yield
    finally:
        for node in cluster.nodes():
            cluster.inside(node, "systemctl", "restart", "cni-routes.service")


@pytest.fixture
def place(tidegate: None) -> Iterator[Place]:
    pods.remove_namespaces(SPACE)
    near, far = [n for n in cluster.nodes() if "worker" in n][:2]
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        service(),
        pods.manifest("web", SPACE, {"app": "web"}, far),
        pods.manifest("client", SPACE, node=near),
    )
    client = pods.wait_ready(SPACE)[f"{SPACE}/client"]
    items = api.items("nodes")
    with outside.host() as host, without_iptables(), contextlib.closing(host.asker()) as asker:
        yield Place(client, {i["metadata"]["name"]: addresses(i) for i in items}, host, asker)
    pods.remove_namespaces(SPACE, wait=False)


def addresses(node: pods.Manifest) -> tuple[str, str]:
    found = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
    four, six = sorted(found, key=lambda a: ":" in a)
    return four, six


def clients(answers: Sequence[Answer]) -> set[str]:
    """Whom the Service's pod saw; or why there was no answer."""
    return {answer.detail or answer.client for answer in answers}


def hears(place: Place) -> set[str]:
    """Whom the host outside sees when the client asks it; or why it did not answer."""
    asker = asking.in_pod(place.client)
    with contextlib.closing(asker):
        return clients(
            asker.ask([Question(a, 8080) for a in (place.host.address, place.host.address6)])
        )


def xdp_links(node: str) -> list[str]:
    return [n for n in cluster.inside(node, "ls", LINKS).split() if n.startswith("xdp-")]


def until_seen(place: Place, expected: set[str], what: str) -> None:
    pods.eventually(lambda: clients(place.service()) == expected, what, SECONDS)


def test_masquerading_dsr_and_xdp_as_values_say(place: Place) -> None:
    """Off, on, and off again, under a connection from outside that nobody cuts."""
    until_seen(place, set(place.asked), "the asked node's address is the client's")
    assert hears(place).isdisjoint(place.asked), "pods' addresses lead nowhere outside"
    assert not any(map(xdp_links, place.nodes))
    stream = place.asker.begin_stream(Question(place.asked[0], PORT, seconds=0.05))
    with install.with_values(*VALUES):
        own = {place.host.address, place.host.address6}
        until_seen(place, own, "the client's address is its own")
        pods.eventually(lambda: hears(place) == set(place.asked), "masqueraded", SECONDS)
        for node in place.nodes:
            pods.eventually(
                lambda n=node: any(x.endswith("-generic") for x in xdp_links(n)), f"XDP of {node}"
            )
            assert "xdpgeneric" in cluster.inside(node, "ip", "link", "show", "eth0")
        assert clients(place.service(20)) == own, "with XDP at every uplink"
    until_seen(place, set(place.asked), "again with the asked node's address")
    pods.eventually(lambda: not any(map(xdp_links, place.nodes)), "no XDP any more", SECONDS)
    pods.eventually(lambda: hears(place).isdisjoint(place.asked), "none masqueraded", SECONDS)
    assert place.asker.end_stream(stream).detail == ""
