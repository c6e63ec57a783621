"""What the observer tells of real traffic, against what the test itself sent: nothing missing,
nothing twice, every policy by its name. The client knows the API's contract and no code of ours.

Faults it was seen to find: a rule set looked up under another's id; records read twice.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ca_town, waiting
from support.ca_town import Town, node, pod, policy, until
from support.hubble import Hubble
from tidegate_cli.standalone.errors import PrerequisiteError
from tidegate_cli.standalone.loaders import check

pytestmark = [pytest.mark.cluster, pytest.mark.kernel, pytest.mark.slow]

CAGE = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "cage"},
    "spec": {"podSelector": {"matchLabels": {"app": "caged"}}, "policyTypes": ["Egress"]},
}
SERVICE_IP = "10.96.7.7"
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "front"},
    "spec": {
        "clusterIP": SERVICE_IP,
        "selector": {"app": "server"},
        "ports": [{"port": 80, "targetPort": 8080}],
    },
}
SYN_OPTIONS = 8
"""A SYN's header is this much longer than what follows it: 40 bytes against 32."""
ROOT = Path(__file__).parents[2]
FIRST_PORT = 20000
EACH = 5

Told = tuple[str, str, int, int, tuple[str, ...], tuple[str, ...]]
"""source pod, destination pod, source port, destination port, egress and ingress denied by."""


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    with ca_town.town(tmp_path_factory.mktemp("observe")) as made:
        made.save("nodes", node(1), node(2))
        pods = [pod("server"), pod("ally", 2, role="ally"), pod("alien", 2), pod("stranger")]
        pods += [pod("friend", role="ally"), SERVICE]
        agent = pod("agent")
        agent["spec"] |= {"hostNetwork": True}
        made.save("pods", *pods, pod("caged", 2), agent)
        made.save("policy", policy("server", "server", "ally"), policy("lock", "server"), CAGE)
        made.up("--policy-log-allow=listed", "--policy-log-policy=default/server")
        until(lambda: made.run_dir.observer.exists(), "the observer serves")
        yield made


@pytest.fixture
def hubble(town: Town) -> Iterator[Hubble]:
    with Hubble(f"unix:{town.run_dir.observer}") as client:
        yield client


def send(town: Town, source: str, to: str, port: int, family: int, to_port: int = 8081) -> None:
    """One datagram from a port that nobody else uses."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with town.inside(source):
        sock = socket.socket(kind, socket.SOCK_DGRAM)
    address = next(a for a in town.pod(to).addresses if (":" in a) == (family == 6))
    with sock:
        sock.bind(("", port))
        sock.sendto(b"x", (address, to_port))


def told(flow: dict[str, Any]) -> Told:
    ports = flow["l4"]["UDP"]
    names = [
        tuple(p["name"] for p in flow.get(f"{d}_denied_by", ())) for d in ("egress", "ingress")
    ]
    ends = flow["source"]["pod_name"], flow["destination"]["pod_name"]
    return (*ends, ports["source_port"], ports["destination_port"], names[0], names[1])


def denied(hubble: Hubble, first: int = FIRST_PORT) -> Counter[Told]:
    """From this source port on; each test has a thousand of its own."""
    wanted = [{"verdict": ["DROPPED"], "protocol": ["udp"], "destination_port": ["8081"]}]
    found = (told(flow) for flow in hubble.flows(whitelist=wanted))
    return Counter(t for t in found if first <= t[2] < first + 1000)


def deny_some(town: Town, first: int) -> Counter[Told]:
    """Sends what must be denied, and what must not; what should be told of it."""
    expected: Counter[Told] = Counter()
    at = first
    for family in (4, 6):
        for _ in range(EACH):
            for source in ("stranger", "alien"):
                send(town, source, "server", at, family)
                expected[source, "server", at, 8081, (), ("lock", "server")] += 1
                at += 1
            send(town, "caged", "stranger", at, family)
            expected["caged", "stranger", at, 8081, ("cage",), ()] += 1
            send(town, "ally", "server", at, family)
            at += 1
    return expected


def test_every_denial_is_told_once_by_its_policies(town: Town, hubble: Hubble) -> None:
    expected = deny_some(town, FIRST_PORT)
    until(lambda: sum(denied(hubble).values()) >= sum(expected.values()), "all is told")
    assert denied(hubble) == expected


def test_a_policy_that_is_new_is_named_from_the_first_denial_on(town: Town, hubble: Hubble) -> None:
    names = {()}
    for number in range(3):
        names = {max(names), (f"fresh-{number}",)}
        town.save("fresh", policy(f"fresh-{number}", "stranger"))
        first = at = FIRST_PORT + 1000 + 200 * number
        found: set[tuple[str, ...]] = set()
        while (f"fresh-{number}",) not in found:
            send(town, "ally", "stranger", at, 4)
            at += 1
            assert at < first + 200
            found = {t[5] for t in denied(hubble, first) if t[1] == "stranger"}
        assert found <= names - {()}


def test_a_killed_observer_misses_nothing(town: Town, hubble: Hubble) -> None:
    (pid,) = observers(town)
    os.kill(pid, signal.SIGSTOP)
    # Until one thread has taken the signal, the others go on, and might read what comes now.
    until(lambda: waiting.stopped(pid), "all its threads have stopped")
    expected = deny_some(town, FIRST_PORT + 2000)
    os.kill(pid, signal.SIGKILL)
    until(lambda: observers(town) not in ([], [pid]), "another observer is there")
    with Hubble(f"unix:{town.run_dir.observer}") as client:

        def complete() -> bool:
            try:
                return sum(denied(client, FIRST_PORT + 2000).values()) >= sum(expected.values())
            except Exception:
                return False  # it does not serve yet

        until(complete, "all is told")
        assert denied(client, FIRST_PORT + 2000) == expected


@dataclass
class Made:
    """A connection as its client saw it."""

    port: int
    service: bool
    across: bool
    headers: int
    """Bytes before the data of a segment."""
    sent: int = 0
    received: int = 0
    segments: int = 0
    """That the client sent, its FIN among them."""


def converse(town: Town, source: str, family: int, made: Made, requests: int) -> None:
    """Asks, hears, closes, and hears the other end close."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with town.inside(source):
        sock = socket.socket(kind, socket.SOCK_STREAM)
    address = next(a for a in town.pod("server").addresses if (":" in a) == (family == 6))
    with sock:
        sock.settimeout(10.0)
        sock.bind(("", made.port))
        sock.connect((SERVICE_IP, 80) if made.service else (address, 8080))
        for _ in range(requests):
            sock.sendall(ca_town.REQUEST)
            made.sent += len(ca_town.REQUEST)
            made.received += len(sock.recv(4096))
        # What it still had to acknowledge goes out now, and not between the count and the FIN.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        # struct tcp_info: tcpi_segs_out
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        made.segments = struct.unpack_from("=I", info, 136)[0] + 1
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096) == b""


def counted(hubble: Hubble, flow: dict[str, Any]) -> dict[str, Any]:
    if "extensions" not in flow:
        return {}
    decode = hubble.contract.decode
    entries = decode("google.protobuf.Struct", flow["extensions"]["value"])["fields"]
    return {entry["key"]: next(iter(entry["value"].values()), 0.0) for entry in entries}


def test_every_connection_is_told_from_its_start_to_its_end(town: Town, hubble: Hubble) -> None:
    wanted = [{"destination_pod": ["default/server"], "protocol": ["tcp"]}]
    made, port = [], FIRST_PORT + 4000
    for number in range(6):
        for source, family, service in (
            ("friend", 4, False),
            ("friend", 6, False),
            ("ally", 4, False),
            ("ally", 4, True),
        ):
            one = Made(port, service, source == "ally", 66 if family == 4 else 86)
            converse(town, source, family, one, 1 + number % 3)
            made.append(one)
            port += 1
    expected = sum(4 if one.across else 2 for one in made)

    def mine() -> list[dict[str, Any]]:
        found = hubble.flows(whitelist=wanted)
        return [f for f in found if f["l4"]["TCP"]["source_port"] >= FIRST_PORT + 4000]

    until(lambda: len(mine()) >= expected, "all is told")
    told = mine()
    assert len(told) == expected
    for one in made:
        own = [f for f in told if f["l4"]["TCP"]["source_port"] == one.port]
        # Its sockets are this test's, which is in no pod's cgroup: no process is known.
        starts = [f for f in own if "extensions" not in f]
        ends = [f for f in own if "extensions" in f]
        nodes = ["node-1", "node-2"] if one.across else ["node-1"]
        assert sorted(f["node_name"] for f in starts) == nodes
        assert sorted(f["node_name"] for f in ends) == nodes
        for flow in starts:
            assert flow["verdict"] == "FORWARDED"
            assert ("destination_service" in flow) == (
                one.service and flow["node_name"] == "node-2"
            )
            by = [p["name"] for p in flow.get("ingress_allowed_by", ())]
            assert by == (["server"] if flow["node_name"] == "node-1" else [])
        for flow in ends:
            counts = counted(hubble, flow)
            assert counts["closed"] == "fin"
            assert counts["packets"] == one.segments
            assert counts["bytes"] == one.segments * one.headers + SYN_OPTIONS + one.sent
            extra = counts["replyBytes"] - counts["replyPackets"] * one.headers
            assert extra == SYN_OPTIONS + one.received


def test_a_refused_connection_ends_at_once(town: Town, hubble: Hubble) -> None:
    port = FIRST_PORT + 5000
    with town.inside("friend"):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with sock:
        sock.bind(("", port))
        with pytest.raises(ConnectionRefusedError):
            sock.connect((town.pod("server").addresses[0], 9999))
    wanted = [{"source_port": [str(port)]}]
    until(lambda: len(hubble.flows(whitelist=wanted)) == 2, "start and end")
    start, end = hubble.flows(whitelist=wanted)
    assert "extensions" not in start
    counts = counted(hubble, end)
    assert (counts["closed"], counts["packets"], counts["replyPackets"]) == ("rst", 1, 1)


def test_every_query_of_dashboard_and_alerts_names_what_a_run_emits(
    town: Town, hubble: Hubble
) -> None:
    send(town, "stranger", "server", FIRST_PORT + 6000, 4)
    one = Made(FIRST_PORT + 6001, True, True, 66)
    converse(town, "ally", 4, one, 1)
    monitoring = ROOT / "manifests" / "monitoring"
    dashboard = json.loads((monitoring / "flows.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((monitoring / "alerts.yaml").read_text())
    queries += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked = [asks(query) for query in queries]
    assert len(set().union(*(names for names, _ in asked))) >= 16
    prom = town.run_dir.path / "observer.prom"

    def missing() -> set[str]:
        """Names, and labels that nothing in a query has."""
        emitted: dict[str, set[str]] = {}
        text = prom.read_text() if prom.exists() else ""
        for name, labels in re.findall(r"^(\w+)(\{.*\})? ", text, re.M):
            emitted.setdefault(name, {"instance"}).update(re.findall(r"(\w+)=\"", labels))
        found = set()
        for names, labels in asked:
            found |= names - emitted.keys()
            found |= labels - set().union(*(emitted.get(name, set()) for name in names))
        return found

    try:
        until(lambda: not missing(), "everything is emitted")
    finally:
        assert missing() == set()


def asks(query: str) -> tuple[set[str], set[str]]:
    """(metrics, labels) that it names."""
    labels: list[str] = []
    for matchers in re.findall(r"\{([^}]*)\}", query):
        labels += re.findall(r"(\w+)\s*[=!]", matchers)
    rest = re.sub(r"\{[^}]*\}", "", query)
    for listed in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", rest):
        labels += re.findall(r"\w+", listed)
    rest = re.sub(r"\b(?:by|without)\s*\([^)]*\)", "", rest)
    # What is neither a function nor a number of seconds.
    return set(re.findall(r"\b[a-z_]\w*\b(?!\s*\()", rest)), set(labels)


SPEAK = """
import socket, sys
kind, address, port, source = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.bind(("", source))
if kind == "tcp":
    s.connect((address, port))
    s.close()
else:
    s.sendto(b"x", (address, port))
"""


def speak(town: Town, source: str, kind: str, address: str, port: int, from_port: int) -> None:
    """By a process in the pod's cgroup, which calls itself something."""
    script = town.folder.parent / "speaker\x1b"
    script.write_text(f"#!{sys.executable}\n{SPEAK}")
    script.chmod(0o755)
    words = [str(script), kind, address, str(port), str(from_port)]
    done = town.tidegate("exec", f"default/{source}", "--", *words)
    assert done.returncode == 0, done.stderr


SPEAKERS = [
    # reason, source, protocol, to the Service, port, verdict
    ("a pod's connection", "friend", "tcp", False, 8080, "FORWARDED"),
    ("a connection to a Service", "ally", "tcp", True, 80, "FORWARDED"),
    ("a datagram that is denied", "stranger", "udp", False, 8081, "DROPPED"),
    ("a pod in the node's network", "agent", "tcp", False, 8080, "FORWARDED"),
    ("a pod in the node's network, to a Service", "agent", "tcp", True, 80, "FORWARDED"),
    ("a datagram of a pod in the node's network", "agent", "udp", False, 8081, "FORWARDED"),
]


def test_who_began_it_is_named_with_its_process(town: Town, hubble: Hubble) -> None:
    """Of a pod in the node's network too, which no address tells from the node."""
    first = FIRST_PORT + 9000
    for number, (_, source, kind, service, port, _) in enumerate(SPEAKERS):
        address = SERVICE_IP if service else town.pod("server").addresses[0]
        speak(town, source, kind, address, port, first + number)

    def found() -> list[dict[str, Any]]:
        ports = [{"source_port": [str(first + n)]} for n in range(len(SPEAKERS))]
        here = [f for f in hubble.flows(whitelist=ports) if f.get("socket_cookie") or told_by(f)]
        return [f for f in here if "closed" not in counted(hubble, f)]

    def told_by(flow: dict[str, Any]) -> bool:
        return "process" in counted(hubble, flow)

    until(lambda: len(found()) >= len(SPEAKERS), "all is told, with who began it")
    seen = {f["l4"][k]["source_port"]: f for f in found() for k in f["l4"]}
    assert len(found()) == len(SPEAKERS)
    for number, (why, source, _, service, _, verdict) in enumerate(SPEAKERS):
        flow = seen[first + number]
        assert (flow["source"].get("pod_name"), flow["verdict"]) == (source, verdict), why
        assert counted(hubble, flow)["process"] == "speaker\x1b", why
        assert counted(hubble, flow)["pid"] > 1, why
        assert ("destination_service" in flow) == service, why
        assert (flow["source"]["identity"] == 1) == (source == "agent"), why
    words = ["observe", "--last", "9", "-o", "compact", "--from-pod", "default/agent"]
    shown = town.tidegate(*words).stdout
    assert "default/agent:" in shown
    assert "; by speaker\\x1b (" in shown


def test_the_policy_log_has_the_denials(town: Town) -> None:
    # A port of its own: denials of one kind are one line, whoever else's test makes them.
    for _ in range(3):
        send(town, "stranger", "server", FIRST_PORT + 7000, 4, 8099)

    def found() -> int:
        return sum(
            line["count"]
            for line in logged(town, FIRST_PORT + 7000)
            if line["src"].get("pod_name") == "stranger"
            and [p["name"] for p in line["policies"]] == ["lock", "server"]
        )

    until(lambda: found() == 3, "it is logged, counted")


def test_the_policy_log_has_what_a_named_policy_allowed(town: Town) -> None:
    """And nothing else that was allowed: `tidegate up` was told so."""
    send(town, "friend", "alien", FIRST_PORT + 7500, 4)
    send(town, "friend", "server", FIRST_PORT + 7501, 4)
    until(lambda: logged(town, FIRST_PORT + 7501), "it is logged")
    (line,) = logged(town, FIRST_PORT + 7501)
    assert (line["disposition"], line["dest"]["pod_name"]) == ("allow", "server")
    assert line["policies"] == [{"kind": "NetworkPolicy", "name": "server", "namespace": "default"}]
    assert not logged(town, FIRST_PORT + 7500)


def logged(town: Town, port: int) -> list[dict[str, Any]]:
    """Lines of the policy log of what was sent from that port."""
    path = town.run_dir.logs / "policy_action.log"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["connection"].get("src_port") == port]


def observers(town: Town) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        argv = ca_town._cmdline(entry)
        if "tidegate_observer" in argv and str(town.run_dir.path) in argv:
            found.append(int(entry.name))
    return found


def test_the_command_line_prints_them(town: Town) -> None:
    send(town, "stranger", "server", FIRST_PORT + 3000, 4)
    words = ["observe", "--last", "1", "-o", "compact", "--port", str(FIRST_PORT + 3000)]

    def shown() -> bool:
        return " Policy denied DROPPED BY lock (NetworkPolicy), server (NetworkPolicy) (UDP)" in (
            town.tidegate(*words).stdout
        )

    until(shown, "the denial is shown")


def test_the_command_line_prints_what_changed(town: Town) -> None:
    town.save("late", policy("late-comer", "stranger"))
    words = ["observe", "agent-events", "--all", "-o", "compact"]

    def shown() -> bool:
        lines = town.tidegate(*words).stdout.splitlines()
        return any("POLICY_UPDATED" in line and "=late-comer" in line for line in lines)

    until(shown, "the policy is told of")


def test_packets_are_traced_for_whom_asks(town: Town, hubble: Hubble) -> None:
    port = FIRST_PORT + 8000
    words = ["--pod", "default/ally", "--protocol", "udp", "--for", "600"]
    began = town.tidegate("trace", "start", *words)
    assert began.returncode == 0, began.stderr
    wanted = [{"event_type": [{"type": 4}], "source_port": [str(port)]}]

    def points() -> list[str]:
        return [flow["trace_observation_point"] for flow in hubble.flows(whitelist=wanted)]

    send(town, "ally", "server", port, 4)
    # The flow's own start is a trace to the stack, too.
    until(lambda: sorted(points()) == ["FROM_ENDPOINT", "TO_STACK", "TO_STACK"], "it is told")
    listed = town.tidegate("trace", "list", "-o", "json").stdout
    (row,) = next(rows for rows in json.loads(listed).values() if rows)
    assert row["protocol"] == "UDP"
    assert 0 < row["secondsLeft"] <= 600
    assert town.tidegate("trace", "stop").returncode == 0
    assert not any(json.loads(town.tidegate("trace", "list", "-o", "json").stdout).values())
