"""What the cluster's observers tell of traffic across nodes, against what this test itself sent:
nothing missing, nothing twice, every policy by its name; by the command line and by the relay.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import waiting
from support.hubble import Hubble, contract

from kind import cluster
from kind.run import run
from rig import asking, install, pods, relay, sent, town
from rig.pods import Pod

pytestmark = pytest.mark.kind

FIRST_PORT = 30000
"""Each test has a thousand of its own."""
SYN_OPTIONS, HEADERS = 8, 66
"""Bytes: Ethernet, IPv4 and TCP with a time stamp; a SYN's header is so much longer."""

Told = tuple[str, str, str, str, int, tuple[str, ...], tuple[str, ...]]
"""node, what, source pod, destination pod, source port, allowed by, denied by."""
ALLOWED, DENIED = (f"{town.SPACE}/server",), (f"{town.SPACE}/server",)
LOGGED = {
    "apiVersion": "tidegate.dev/v1alpha1",
    "kind": "TrafficPolicy",
    "metadata": {"name": "noted", "namespace": town.SPACE},
    "spec": {
        "subject": {"podSelector": {"matchLabels": {"app": "server"}}},
        "isolates": [],
        "mode": "Enforce",
        "ingress": [
            {
                "action": "Allow",
                "log": True,
                "peers": [
                    {
                        "pods": {
                            "namespaceSelector": {"any": True},
                            "podSelector": {"matchLabels": {"role": "friend"}},
                        }
                    }
                ],
                "ports": [{"protocol": "TCP", "port": 8080}],
            }
        ],
    },
}


def started(*argv: str) -> subprocess.Popen[str]:
    """`tidegate observe` as a user runs it."""
    command = [sys.executable, "-m", "tidegate_cli", "observe", "-o", "jsonpb"]
    command += ["--kubeconfig", str(cluster.kubeconfig()), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Flows, and the nodes that did not answer."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    silent = [name for a in answers for name in a.get("node_status", {}).get("node_names", ())]
    return [a["flow"] for a in answers if "flow" in a], silent


def observe(*argv: str) -> tuple[list[dict[str, Any]], list[str]]:
    return ended(started(*argv))


def _names(flow: dict[str, Any], verdict: str) -> tuple[str, ...]:
    policies = [p for d in ("egress", "ingress") for p in flow.get(f"{d}_{verdict}_by", ())]
    return tuple(sorted(f"{p['namespace']}/{p['name']}" for p in policies))


def more(flow: dict[str, Any]) -> dict[str, Any]:
    """What is said beyond the API, of a flow as JSON or as the contract's client has it."""
    value = flow.get("extensions", {}).get("value", {})
    if isinstance(value, dict):
        return value
    entries = contract().decode("google.protobuf.Struct", value)["fields"]
    return {entry["key"]: next(iter(entry["value"].values()), 0.0) for entry in entries}


def told(flow: dict[str, Any]) -> Told:
    what = (
        "denied" if flow["verdict"] == "DROPPED" else "end" if "closed" in more(flow) else "start"
    )
    ports = next(iter(flow["l4"].values()))
    ends = flow["source"]["pod_name"], flow["destination"]["pod_name"]
    by = _names(flow, "allowed"), _names(flow, "denied")
    return (flow["node_name"], what, *ends, ports["source_port"], *by)


class Sent:
    """What was sent, and what is to be told of it."""

    def __init__(self, place: town.Town, first: int) -> None:
        self.place = place
        self.first = self._port = first
        self.since = time.time() - 1
        self.expected: Counter[Told] = Counter()
        self.connections: list[sent.Connection] = []

    def _next(self) -> int:
        self._port += 1
        return self._port

    def denied(self) -> None:
        """A datagram of each stranger: its own node lets it go."""
        server = self.place.pods["server"]
        for name in town.STRANGERS:
            stranger, port = self.place.pods[name], self._next()
            sent.datagram(stranger, server.address, 53, port)
            self.expected[server.node, "denied", name, "server", port, (), DENIED] += 1
            if stranger.node != server.node:
                self.expected[stranger.node, "start", name, "server", port, (), ()] += 1

    def connected(self, address: str) -> None:
        """A connection of each friend, which is told on both nodes where there are two."""
        server = self.place.pods["server"]
        for name in town.FRIENDS:
            friend, port = self.place.pods[name], self._next()
            self.connections.append(sent.connection(friend, address, 80, port))
            for node in {friend.node, server.node}:
                by = ALLOWED if node == server.node else ()
                self.expected[node, "start", name, "server", port, by, ()] += 1
                self.expected[node, "end", name, "server", port, by, ()] += 1

    def of(self, flows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of these."""
        ports = range(self.first, self._port + 1)
        return [f for f in flows if next(iter(f["l4"].values())).get("source_port") in ports]

    def query(self) -> list[str]:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since))
        return ["--namespace", town.SPACE, "--since", stamp]

    def is_told(self) -> bool:
        """Whether it is all there, as it was sent, now."""
        return Counter(map(told, self.of(observe(*self.query())[0]))) == self.expected

    def told(self) -> list[dict[str, Any]]:
        """By the command line, once it is all there."""
        found: list[dict[str, Any]] = []

        def complete() -> bool:
            found[:] = self.of(observe(*self.query())[0])
            return len(found) >= sum(self.expected.values())

        with contextlib.suppress(AssertionError):  # what is missing says more
            pods.eventually(complete, "all is told", 30)
        assert Counter(map(told, found)) == self.expected
        return found


@pytest.fixture(scope="module")
def shown(place: town.Town, tmp_path_factory: pytest.TempPathFactory) -> Iterator[relay.Files]:
    """What a client of the relay shows it."""
    with relay.installed(tmp_path_factory.mktemp("relay")) as made:
        yield made


@pytest.fixture
def hubble(shown: relay.Files) -> Iterator[Hubble]:
    with relay.forwarded(shown) as client:
        yield client


@pytest.fixture(scope="module")
def settled(place: town.Town) -> town.Town:
    """Every node enforces what there is to enforce, and every observer knows who is who."""
    install.wait_realised(90)
    first = itertools.count(FIRST_PORT + 5000, 10)

    def known() -> bool:
        made = Sent(place, next(first))
        made.denied()
        made.connected(place.pods["server"].address)
        with contextlib.suppress(AssertionError):
            pods.eventually(made.is_told, "all is told", 10)
            return True
        return False

    pods.eventually(known, "the observers know who is who", 120)
    return place


def observers() -> dict[str, Pod]:
    """By node."""
    found = pods.running(install.NAMESPACE, "app.kubernetes.io/name=tidegate-loader", "observer")
    return {pod.node: pod for pod in found.values()}


def test_everything_is_told_once_by_its_policies(settled: town.Town) -> None:
    place = settled
    made = Sent(place, FIRST_PORT)
    server = place.pods["server"]
    for _ in range(3):
        made.denied()
        made.connected(server.address)
        made.connected(place.service)
    flows = made.told()
    # Written with three, six or nine digits.
    times = [flow["time"].rstrip("Z") for flow in flows]
    assert times == sorted(times)
    for flow in flows:
        assert flow["source"]["namespace"] == flow["destination"]["namespace"] == town.SPACE
        assert "k8s:app=server" in flow["destination"]["labels"]
    by_port = {one.port: one for one in made.connections}
    for flow in flows:
        if "closed" in more(flow):
            one, counts = by_port[flow["l4"]["TCP"]["source_port"]], more(flow)
            assert (counts["closed"], counts["packets"]) == ("fin", one.segments)
            assert counts["bytes"] == one.segments * HEADERS + SYN_OPTIONS + one.sent
            back = counts["replyBytes"] - counts["replyPackets"] * HEADERS
            assert back == SYN_OPTIONS + one.received
    services = {f["node_name"] for f in flows if "destination_service" in f}
    assert services == {place.pods[name].node for name in town.FRIENDS}


def test_a_killed_observer_misses_nothing(settled: town.Town) -> None:
    place = settled
    server = place.pods["server"]
    before = observers()[server.node]
    number = asking.pid(before)
    os.kill(number, signal.SIGSTOP)
    pods.eventually(lambda: waiting.stopped(number), "all its threads have stopped", 30)
    made = Sent(place, FIRST_PORT + 1000)
    try:
        made.denied()
        made.connected(server.address)
    finally:
        os.kill(number, signal.SIGKILL)
    pods.eventually(
        lambda: (now := observers().get(server.node)) and now.container != before.container,
        "another observer is there",
    )
    pods.eventually(lambda: server.node not in observe("--last", "1")[1], "it can be asked", 30)
    made.told()


def test_a_pod_in_the_nodes_network_is_named_with_its_process(settled: town.Town) -> None:
    """Its address is the node's; by it nobody could be told apart there."""
    server = settled.pods["server"]
    manifest = pods.manifest("in-the-nodes", town.SPACE, {"app": "agent"}, server.node)
    manifest = pods.flooding(manifest, server.address)
    manifest["spec"]["hostNetwork"] = True
    pods.apply(manifest)
    words = ("--from-pod", f"{town.SPACE}/in-the-nodes", "--node", server.node, "--last", "1")
    found: list[dict[str, Any]] = []
    try:
        pods.eventually(lambda: found.extend(observe(*words)[0]) or found, "it is told by name")
    finally:
        cluster.kubectl("delete", "pod", "-n", town.SPACE, "in-the-nodes", "--wait=false")
    flow = found[0]
    assert flow["destination"]["pod_name"] == "server"
    assert flow["source"]["identity"] == 1
    assert {"k8s:app=agent", "reserved:host"} <= set(flow["source"]["labels"])
    assert more(flow)["process"] == "probe"


def test_a_rule_that_asks_for_it_is_logged(settled: town.Town) -> None:
    place = settled
    pods.apply(LOGGED)
    server, friend = place.pods["server"], place.pods["friend-far"]
    try:
        wanted = ("policystatus/trafficpolicy.noted", "--for=condition=Ready", "--timeout=5s")
        pods.eventually(
            # It is not there at first.
            lambda: cluster.attempt_kubectl("wait", "-n", town.SPACE, *wanted).returncode == 0,
            "the policy is in force",
        )
        # A cluster that was kept has the lines of the run before.
        port = FIRST_PORT + 2000 + int(time.time()) % 1000
        sent.connection(friend, server.address, 8080, port)
        observer = observers()[server.node]

        def lines() -> list[dict[str, Any]]:
            text = cluster.kubectl("logs", "-n", install.NAMESPACE, observer.name, "-c", "observer")
            found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
            return [f for f in found if f.get("connection", {}).get("src_port") == port]

        pods.eventually(lines, "it is logged", 30)
        (line,) = lines()
        assert line["disposition"] == "allow"
        assert line["policies"] == [
            {"kind": "TrafficPolicy", "name": "noted", "namespace": town.SPACE}
        ]
        assert (line["src"]["pod_name"], line["node_name"]) == ("friend-far", server.node)
        words = ("--port", str(port), "--node", server.node, "--last", "10")
        flows, _ = observe(*words)
        assert [f["policy_log"] for f in flows if "policy_log" in f] == [
            [f"TrafficPolicy {town.SPACE}/noted"]
        ]
    finally:
        cluster.kubectl("delete", "trafficpolicy", "-n", town.SPACE, "noted")


def test_the_relay_tells_the_same_to_who_has_a_certificate(
    settled: town.Town, hubble: Hubble
) -> None:
    place = settled
    nodes = set(cluster.nodes())

    def connected() -> bool:
        found = relay.names(hubble.ask("/observer.Observer/GetNodes"))
        return found == dict.fromkeys(nodes, "NODE_CONNECTED")

    # A Secret that comes later reaches a container within two minutes.
    pods.eventually(connected, "every observer is reached", 150)
    made = Sent(place, FIRST_PORT + 3000)
    made.denied()
    made.connected(place.service)
    made.told()
    since = {"seconds": int(made.since)}
    flows = made.of(hubble.flows(since=since, whitelist=[{"source_pod": [f"{town.SPACE}/"]}]))
    assert Counter(map(told, flows)) == made.expected
    found = hubble.ask("/observer.Observer/GetNamespaces")["namespaces"]
    assert town.SPACE in {item["namespace"] for item in found}
    status = hubble.ask("/observer.Observer/ServerStatus")
    assert status["num_connected_nodes"] == {"value": len(nodes)}


def test_a_dead_node_is_named_and_the_others_are_shown(place: town.Town, hubble: Hubble) -> None:
    (pod,) = pods.running(install.NAMESPACE, "app.kubernetes.io/name=tidegate-relay").values()
    dead = next(n for n in cluster.nodes() if "worker" in n and n != pod.node)
    alive = set(cluster.nodes()) - {dead}
    run("docker", "pause", dead)
    try:
        command_line = started("--last", "1")
        answers = list(hubble.ask("/observer.Observer/GetFlows", number=1000))
        states = [a["node_status"] for a in answers if "node_status" in a]
        assert [(s["state_change"], s["node_names"]) for s in states] == [
            ("NODE_UNAVAILABLE", [dead])
        ]
        assert dead not in {a["node_name"] for a in answers if "flow" in a}
        status = hubble.ask("/observer.Observer/ServerStatus")
        assert status["unavailable_nodes"] == [dead]
        assert status["num_connected_nodes"] == {"value": len(alive)}
        assert ended(command_line)[1] == [dead]
    finally:
        run("docker", "unpause", dead)
    pods.eventually(
        lambda: (
            set(relay.names(hubble.ask("/observer.Observer/GetNodes")).values())
            == {"NODE_CONNECTED"}
        ),
        "it is reached again",
        60,
    )
    install.wait_ready()


def test_nobody_else_is_let_in(shown: relay.Files, tmp_path: Path) -> None:
    other = relay.make_secrets(tmp_path)[relay.CLIENT]
    # Whom it trusts is right, who it says it is not.
    wrong = {**other, "ca.crt": shown["ca.crt"]}
    with relay.forwarded(wrong) as client, pytest.raises(grpc.RpcError):
        client.ask("/observer.Observer/ServerStatus")
