"""Programs that people run, through Services that change all the time: none notices.

iperf3, the C library's resolver against CoreDNS, HTTP, and clients that keep connections as those
of gRPC do; in a pod whose sockets are translated, in a plain one by packet, and from outside.
Loaders are killed meanwhile. With TIDEGATE_SOAK=1 for a minute, and 50 of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import apiserver, sites, waiting
from support.ca_soak import campaign, scaled
from support.sites import ending, ready, service
from tidegate_bpf import netns
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check

pytestmark = [pytest.mark.cluster, pytest.mark.kernel]

SUPPORT = Path(__file__).parents[1] / "support"
WAIT_SECONDS = 30.0
NEAR, FAR = (sites.PODS[name][1] for name in ("near", "far"))
GONE = [f"10.244.1.{n}" for n in range(100, 108)]
"""Endpoints that come and go. Nobody is there."""
ESTABLISHED = "01"
NAMES, NAMES_PORT = "10.96.1.53", 53
CALLS, CALLS_PORT, CALLS_NODE_PORT = "10.96.1.1", 9000, 30202
SECONDS = scaled(10, 60)
CHANGES = 1000
KILLS = scaled(5, 50)


@dataclass
class Place:
    site: sites.Site
    tidegate: sites.Tidegate
    loaders: dict[str, subprocess.Popen[bytes]]
    trees: dict[str, list[sites.Tree]] = field(default_factory=dict)
    """Service name → it and its endpoints: what is published."""

    def serve(self, *services: list[sites.Tree]) -> None:
        """Beside those that are served already."""
        self.trees |= {trees[0]["metadata"]["name"]: trees for trees in services}
        self.tidegate.publish([tree for trees in self.trees.values() for tree in trees])

    def until_led(self, vip: str, *addresses: str) -> None:
        """Sockets on every node that ask for it get one of these, and no other."""
        for node in sites.NODES:
            until(
                lambda n=node: self.tidegate.backends(n, vip) == set(addresses),
                f"{node} leads {vip} to {addresses}",
            )

    def kill(self, node: str) -> None:
        """SIGKILL for its loader, and another one starts."""
        self.loaders[node].kill()
        self.loaders[node].wait()
        self.loaders[node] = self.tidegate.start(node)

    @contextlib.contextmanager
    def running(
        self, who: str, command: Sequence[str], group: Path | None = None, **how: Any
    ) -> Iterator[subprocess.Popen[Any]]:
        with self.site.start(who, command, group, **how) as process:
            try:
                yield process
            finally:
                process.kill()


def until(condition: Callable[[], object], what: str) -> None:
    waiting.until(condition, what, WAIT_SECONDS)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    with sites.made(f"tgv{os.getpid()}") as site, sites.tidegate(site) as tidegate:
        tidegate.publish([])
        tidegate.realise()
        made = Place(site, tidegate, {node: tidegate.start(node) for node in sites.NODES})
        try:
            yield made
        finally:
            for loader in made.loaders.values():
                loader.kill()
                loader.wait()


def connections(place: Place, who: str, port: int, state: str) -> int:
    """Of a pod's, from its port."""
    with netns.inside(place.site.space(who)):
        texts = [Path("/proc/thread-self/net", name).read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for text in texts for line in text.splitlines()[1:]]
    return sum(row[3] == state and int(row[1].split(":")[1], 16) == port for row in rows)


def listens(place: Place, who: str, port: int) -> None:
    until(lambda: connections(place, who, port, "0A"), f"{who} listens on {port}")


# ---- names ---------------------------------------------------------------------------------


ZONE = """
.:53 {
    hosts {
        192.0.2.7 name.example
    }
}
"""


@pytest.mark.parametrize("where", ["socket", "packets"])
@pytest.mark.parametrize("how", ["UDP", "TCP"])
def test_names_of_coredns(place: Place, tmp_path: Path, how: str, where: str) -> None:
    """The C library asks, as every program does; over TCP if resolv.conf says so."""
    coredns = apiserver.binary("coredns")
    (tmp_path / "Corefile").write_text(ZONE)
    options = "options use-vc\n" if how == "TCP" else ""
    (tmp_path / "resolv.conf").write_text(f"nameserver {NAMES}\n{options}")
    script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf; "
    script += "for i in 1 2 3 4 5; do getent ahostsv4 name.example || exit 1; done"
    command = [str(coredns), "-conf", str(tmp_path / "Corefile")]
    place.serve(service("names", NAMES, [ready(FAR)], port=53, target=53, protocols=("UDP", "TCP")))
    quiet = {"stdout": subprocess.DEVNULL}
    with place.running("far", command, **quiet):
        listens(place, "far", NAMES_PORT)
        until(lambda: place.tidegate.backends("node-1", NAMES, 53) == {FAR}, "the Service is there")
        who, group = ("client", place.tidegate.group) if where == "socket" else ("plain", None)
        argv = ["unshare", "-m", "sh", "-c", script]
        asked = place.site.start(who, argv, group, stdout=subprocess.PIPE, text=True)
        said, _ = asked.communicate()
    assert asked.returncode == 0
    assert said.count("192.0.2.7") >= 5, said


# ---- clients that keep connections ---------------------------------------------------------


@contextlib.contextmanager
def calls(place: Place, endpoints: list[sites.Tree]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Clients of `cl_server`, translated by socket and by packet, and from outside: what they
    say at their end, which the call is."""
    outside = sites.NODES["node-1"]
    ways = (
        ("client", CALLS, 80, place.tidegate.group),
        ("plain", CALLS, 80, None),
        ("outside", outside, CALLS_NODE_PORT, None),
    )
    place.serve(calls_service(endpoints))
    place.until_led(CALLS, *(e["addresses"][0] for e in endpoints))
    with contextlib.ExitStack() as stack:
        clients = []
        for who, address, port, group in ways:
            argv = [sys.executable, str(SUPPORT / "cl_client.py"), address, str(port), "4", "2"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            clients.append(stack.enter_context(place.running(who, argv, group, **pipes)))
        for client in clients:
            assert client.stdout.readline() == "begun\n"

        def end() -> dict[str, Any]:
            said = [json.loads(client.communicate()[0]) for client in clients]
            return {
                "answered": [one["answered"] for one in said],
                "failed": [
                    f"{way[0]} to {way[1]}: {failure}"
                    for way, one in zip(ways, said, strict=True)
                    for failure in one["failed"]
                ],
            }

        yield end


def calls_service(endpoints: list[sites.Tree]) -> list[sites.Tree]:
    return service("calls", CALLS, endpoints, CALLS_NODE_PORT, CALLS_PORT)


@contextlib.contextmanager
def server(place: Place, who: str) -> Iterator[subprocess.Popen[Any]]:
    address = sites.PODS[who][1]
    argv = [sys.executable, str(SUPPORT / "cl_server.py"), who, address, str(CALLS_PORT)]
    with place.running(who, argv) as process:
        listens(place, who, CALLS_PORT)
        yield process


def test_a_rolling_update_fails_no_request(place: Place) -> None:
    """As Kubernetes does it: the new pod is ready, the old one ends, is told to when no node leads
    to it any more, answers what it has, and is gone."""
    old, new, there = NEAR, FAR, ("near", "far")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server(place, "near"))
        end = stack.enter_context(calls(place, [ready(old)]))
        stack.enter_context(server(place, "far"))
        for endpoints in ([ready(old), ready(new)], [ending(old), ready(new)]):
            place.serve(calls_service(endpoints))
            used = {e["addresses"][0] for e in endpoints if e["conditions"]["ready"]}
            place.until_led(CALLS, *used)
        first.send_signal(signal.SIGTERM)
        assert first.wait(WAIT_SECONDS) == 0
        place.serve(calls_service([ready(new)]))
        said = end()
    assert said["failed"] == []
    for answered in said["answered"]:
        assert answered.keys() == set(there), "each client had both"


# ---- changes and kills ------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """An iperf3 of its own, with a Service of its own."""

    name: str
    who: str
    port: int
    vip: str
    node_port: int = 0
    translated: bool = False

    def service(self, endpoints: list[sites.Tree]) -> list[sites.Tree]:
        return service(self.name, self.vip, endpoints, self.node_port, self.port)

    @property
    def to(self) -> tuple[str, str]:
        if self.node_port:
            return sites.NODES["node-1"], str(self.node_port)
        return self.vip, "80"


STREAMS = (
    Stream("socket", "client", 5201, "10.96.2.1", translated=True),
    Stream("packets", "plain", 5202, "10.96.2.2"),
    Stream("outside", "outside", 5203, "10.96.2.3", 30203),
)


@pytest.fixture
def iperf3(place: Place) -> Iterator[str]:
    """The program; a server of each stream runs."""
    program = shutil.which("iperf3")
    if program is None:
        pytest.skip("there is no iperf3: `make test` installs it")
    with contextlib.ExitStack() as stack:
        for stream in STREAMS:
            argv = [program, "-s", "-p", str(stream.port)]
            stack.enter_context(place.running("near", argv, stdout=subprocess.DEVNULL))
            listens(place, "near", stream.port)
        yield program


def started(
    place: Place, iperf3: str, stack: contextlib.ExitStack
) -> dict[str, subprocess.Popen[Any]]:
    """A client of each stream, that is connected."""
    place.serve(*(stream.service([ready(NEAR)]) for stream in STREAMS))
    clients = {}
    for stream in STREAMS:
        place.until_led(stream.vip, NEAR)
        address, port = stream.to
        argv = [iperf3, "-c", address, "-p", port, "-t", str(SECONDS), "-J"]
        group = place.tidegate.group if stream.translated else None
        client = place.running(stream.who, argv, group, stdout=subprocess.PIPE, text=True)
        clients[stream.name] = stack.enter_context(client)
    for stream in STREAMS:
        # One connection to speak of it, and the one that is measured.
        until(
            lambda s=stream: connections(place, "near", s.port, ESTABLISHED) == 2,
            f"iperf3 is connected: {stream.name}",
        )
    return clients


def test_changes_and_killed_loaders_cut_nothing(place: Place, iperf3: str) -> None:
    """The endpoint of flows under way is ready, ends, or is not listed any more; others come and
    go beside it, and so do loaders."""
    nodes, turn, kills = list(sites.NODES), 0, 0
    with contextlib.ExitStack() as stack, campaign("clients", "changed Services") as figures:
        stack.enter_context(server(place, "far"))
        end = stack.enter_context(calls(place, [ready(FAR)]))
        while figures.count < CHANGES:
            clients = started(place, iperf3, stack)
            while all(client.poll() is None for client in clients.values()):
                own = ([ready(NEAR)], [ending(NEAR)], [])[turn % 3]
                others = [ready(a) for a in GONE[: turn % len(GONE) + 1]]
                place.serve(*(stream.service(own + others) for stream in STREAMS))
                turn += 1
                figures.count += len(STREAMS)
                if figures.count // (CHANGES // KILLS) > kills:
                    place.kill(nodes[kills % 2])
                    kills += 1
                time.sleep(SECONDS / CHANGES)
            for name, client in clients.items():
                said = json.loads(client.communicate()[0])
                if "error" in said or not said["end"]["sum_received"]["bytes"]:
                    figures.failures.append(f"{name}: {said.get('error', 'nothing came')}")
        for stream in STREAMS:
            place.serve(stream.service([ready(NEAR)]))
            place.until_led(stream.vip, NEAR)
        said = end()
        figures.failures += said["failed"]
        assert kills >= KILLS
        assert all(answered["far"] > 100 for answered in said["answered"])
