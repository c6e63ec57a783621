"""Policies of every kind with real packets: a truth table, on one node and across two, v4 and v6;
then what changes mean for connections that are there."""

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

ASK = """
import json, socket, sys
found = {}
for host, port, kind in json.loads(sys.argv[1]):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM)
    s.settimeout(0.7)
    try:
        s.connect((host, port))
        if kind == "UDP":
            s.send(b"x")
            s.recv(100)
        found[f"{host} {port} {kind}"] = True
    except OSError:
        found[f"{host} {port} {kind}"] = False
    s.close()
print(json.dumps(found))
"""
PING = """
import os, socket, struct, sys
kind, dst = int(sys.argv[1]), sys.argv[2]
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.settimeout(0.7)
data = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xffff, 1) + bytes(12)
total = sum(struct.unpack("!10H", data))
total = (total & 0xffff) + (total >> 16)
s.sendto(data[:2] + struct.pack("!H", ~total & 0xffff) + data[4:], (dst, 0))
while True:
    if s.recv(100)[20] in (0, 14):
        break
"""
HOLD = """
import socket, sys, time
conns = []
for port in map(int, sys.argv[3:]):
    s = socket.create_connection((sys.argv[1], port), 5)
    s.settimeout(0.7)
    conns.append((port, s))
deadline = time.monotonic() + float(sys.argv[2])
alive = {port: True for port, _ in conns}
print("open", flush=True)
while time.monotonic() < deadline:
    for port, s in conns:
        if not alive[port]:
            continue
        try:
            s.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            alive[port] = bool(s.recv(4096))
        except OSError:
            alive[port] = False
        if not alive[port]:
            print("cut", port, flush=True)
    time.sleep(0.05)
print("alive", *(port for port, held in alive.items() if held), flush=True)
"""


def pod(name: str, node: str, labels: str, http: int) -> str:
    numbers = sorted({7000, 7001, 7002, 7003, 8080, 9090} - {http})
    rest = ", ".join(f"{{containerPort: {n}}}" for n in numbers)
    ports = f"{{name: http, containerPort: {http}}}, {rest}, {{containerPort: 5353, protocol: UDP}}"
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {labels}}}
spec: {{nodeName: {node}, containers: [{{name: main, image: x, ports: [{ports}]}}]}}
"""


PODS = [
    pod("one", "node-1", "{app: server}", 8080),
    pod("two", "node-2", "{app: server}", 9090),
    pod("client", "node-1", "{app: client}", 8080),
    pod("banned", "node-1", "{app: client, banned: yes-it-is}", 8080),
    pod("vip", "node-1", "{app: vip}", 8080),
    pod("stranger", "node-1", "{app: stranger}", 8080),
    pod("quiet", "node-2", "{app: quiet}", 8080),
]
NETWORK_POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: http}, {port: 7000, endPort: 7002}]
"""
TRAFFIC_POLICY = """
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: no-7002}
spec:
  subject: {podSelector: {matchLabels: {app: server}}}
  isolates: []
  mode: Enforce
  ingress:
  - action: Deny
    peers: [{any: true}]
    ports: [{protocol: TCP, port: 7002}]
  - action: Allow
    peers: [{entities: [cluster]}]
    ports: [{icmp: {family: IPv4, type: 8, code: 0}}]
"""
AUDIT = """
apiVersion: tidegate.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: try-out}
spec:
  subject: {podSelector: {matchLabels: {app: server}}}
  isolates: []
  mode: Audit
  ingress:
  - action: Deny
    peers: [{any: true}]
    ports: [{protocol: TCP, port: 7001}]
"""
ADMIN = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: gate}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {podSelector: {matchLabels: {app: server}}}}
  ingress:
  - action: Deny
    from: [{pods: {podSelector: {matchExpressions: [{key: banned, operator: Exists}]}}}]
  - {action: Pass, from: [{pods: {podSelector: {matchLabels: {app: client}}}}]}
  - action: Accept
    from: [{pods: {podSelector: {matchLabels: {app: vip}}}}]
    protocols: [{tcp: {destinationPort: {number: 7003}}}]
  - {action: Deny, from: [{pods: {podSelector: {matchLabels: {app: client}}}}]}
"""
BASELINE = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: base}
spec:
  tier: Baseline
  priority: 1
  subject: {namespaces: {}}
  ingress:
  - {action: Deny, from: [{pods: {podSelector: {matchLabels: {app: stranger}}}}]}
"""
POLICIES = [NETWORK_POLICY, TRAFFIC_POLICY, AUDIT, ADMIN, BASELINE]
TABLE = [
    ("the port that the name has there", "client", "one", 8080, "TCP", True),
    ("the port that it has elsewhere", "client", "one", 9090, "TCP", False),
    ("another number on another pod", "client", "two", 9090, "TCP", True),
    ("that pod's own other port", "client", "two", 8080, "TCP", False),
    ("the range's first", "client", "one", 7000, "TCP", True),
    ("in the range, denied in audit mode only", "client", "two", 7001, "TCP", True),
    ("the range's last, a deny over the allow", "client", "one", 7002, "TCP", False),
    ("past the range", "client", "two", 7003, "TCP", False),
    ("another protocol", "client", "one", 5353, "UDP", False),
    ("Admin denies what developers allow", "banned", "one", 8080, "TCP", False),
    ("across nodes too", "banned", "two", 9090, "TCP", False),
    ("Admin accepts what nobody else does", "vip", "one", 7003, "TCP", True),
    ("and only that", "vip", "two", 7000, "TCP", False),
    ("nobody allows", "stranger", "one", 7000, "TCP", False),
    ("the Baseline denies where nobody isolates", "stranger", "quiet", 8080, "TCP", False),
    ("the Baseline is about others", "client", "quiet", 8080, "TCP", True),
    ("nobody isolates", "client", "quiet", 5353, "UDP", True),
]


@dataclass
class Town:
    run_dir: RunDir
    folder: Path
    addresses: dict[str, list[str]]

    def command(self, *argv: str) -> list[str]:
        return [sys.executable, "-m", "tidegate_cli", *argv]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"TIDEGATE_RUN_DIR": str(self.run_dir.path)}

    def tidegate(self, *argv: str, codes: tuple[int, ...] = (0,)) -> str:
        found = subprocess.run(
            self.command(*argv), capture_output=True, text=True, env=self.environment
        )
        assert found.returncode in codes, found.stdout + found.stderr
        return found.stdout

    def asks(self, who: str, wanted: list[tuple[str, int, str]]) -> dict[str, bool]:
        argv = [sys.executable, "-c", ASK, json.dumps(wanted)]
        answers: dict[str, bool] = json.loads(self.tidegate("exec", who, "--", *argv))
        return answers

    def pings(self, who: str, kind: int, address: str) -> bool:
        argv = self.command("exec", who, "--", sys.executable, "-c", PING, str(kind), address)
        return subprocess.run(argv, capture_output=True, env=self.environment).returncode == 0

    def write(self, policies: list[str]) -> None:
        temporary = self.folder / ".all.tmp"
        temporary.write_text("---".join([*PODS, *policies]))
        temporary.rename(self.folder / "all.yaml")


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    try:
        check()
    except PrerequisiteError as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("policies")
    found = Town(RunDir.at(base / "run"), base / "manifests", {})
    found.folder.mkdir()
    found.write(POLICIES)
    try:
        found.tidegate("up", str(found.folder), "--detach", "--nodes", "2")
        state = found.run_dir.read()
        assert state is not None
        found.addresses = {pod.name: list(pod.addresses) for pod in state.pods}
        yield found
    finally:
        teardown.down(found.run_dir)


def test_the_truth_table(town: Town) -> None:
    """Every row for both families; the model, the maps and the program say the same of it."""
    wanted: dict[str, list[tuple[str, int, str]]] = {}
    for _, source, target, port, protocol, _ in TABLE:
        for address in town.addresses[target]:
            wanted.setdefault(source, []).append((address, port, protocol))
    answers = {who: town.asks(who, questions) for who, questions in wanted.items()}
    wrong = [
        (why, source, address)
        for why, source, target, port, protocol, expected in TABLE
        for address in town.addresses[target]
        if answers[source][f"{address} {port} {protocol}"] != expected
    ]
    assert wrong == []
    for why, source, target, port, protocol, expected in TABLE[5:13]:
        argv = ["--from", source, "--to", target, "--port", f"{port}/{protocol}"]
        text = town.tidegate("explain", *argv, codes=(0 if expected else 1,))
        assert "the answers agree" in text, why


def test_icmp_by_type_and_what_audit_leaves_behind(town: Town) -> None:
    target = town.addresses["two"][0]
    assert town.pings("stranger", 8, target)
    assert not town.pings("stranger", 13, target)
    assert not town.pings("banned", 8, target)
    text = town.tidegate("explain", "--from", "client", "--to", "one", "--port", "7001")
    assert "would be denied by TrafficPolicy default/try-out spec.ingress[0]" in text
    assert "Policy denied in audit mode" in town.tidegate("metrics", "list")


def test_what_a_policy_stops_allowing_is_cut_and_the_rest_lives(town: Town) -> None:
    """7000 stays allowed, under a widened policy; 8080 is taken away, from the receiver's end."""
    argv = ["exec", "client", "--", sys.executable, "-c", HOLD, town.addresses["one"][0], "8"]
    command = town.command(*argv, "7000", "8080")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=town.environment
    ) as holding:
        assert holding.stdout is not None
        try:
            assert holding.stdout.readline() == "open\n"
            changed = NETWORK_POLICY.replace("{port: http}, ", "").replace("7000, end", "6000, end")
            town.write([changed, *POLICIES[1:]])
            assert holding.stdout.readline() == "cut 8080\n"
            assert holding.stdout.readline() == "alive 7000\n"
        finally:
            holding.kill()
            town.write(POLICIES)
    address = town.addresses["one"][0]
    until(lambda: town.asks("client", [(address, 8080, "TCP")]).popitem()[1], "it is allowed again")
