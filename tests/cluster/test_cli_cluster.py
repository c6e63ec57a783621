"""The command line over a real cluster: the three answers agree everywhere, the lists show what is
there, and asking changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tidegate_cli import explain, frame
from tidegate_cli.answer import Nodes
from tidegate_cli.live import NodeMaps
from tidegate_cli.main import main
from tidegate_cli.model import Model
from tidegate_cli.objects import RunObjects
from tidegate_loader import addresses
from tidegate_operator import manifests

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

UP_SECONDS = 90
READ_ONLY = (
    "control_v1",
    "node_v2",
    "rule_sets_v2",
    "cidrs_v1",
    "ipcache_v1",
    "ipcache_lpm_v1",
    "frontends_v1",
    "slots_v1",
    "backends_v1",
    "frags_v1",
    "socks_v1",
    "streams_v1",
)
"""Maps that nothing but the loader, or a pod's own traffic, may write."""
QUESTIONS = [(80, "TCP"), (8080, "TCP"), (53, "UDP"), (9, "SCTP"), (None, "ICMP")]
TARGETS = ["8.8.8.8", "10.244.77.7", "172.18.0.2", "172.18.0.3", "2001:db8::1"]

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}, release: {name}}}}}
spec:
  nodeName: {node}
  containers: [{{name: c, ports: [{{containerPort: 8080, name: http}}]}}]
"""
REST = """\
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: a}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: itself, namespace: a}
spec: {selector: {app: other}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: a}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: a}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: 8080}]
  - from: [{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.1.0/24]}}, {ipBlock: {cidr: "::/0"}}]
    ports: [{port: 53, protocol: UDP}, {port: 9, protocol: SCTP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client, namespace: a}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: web}}}]
  - to: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}]
    ports: [{port: 53, protocol: UDP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: b}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
"""
PODS = [
    ("a", "web-1", "web", "node-1"),
    ("a", "web-2", "web", "node-2"),
    ("a", "client", "client", "node-1"),
    ("a", "other", "other", "node-2"),
    ("b", "closed", "web", "node-2"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a cluster of five pods on two nodes."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    where = tmp_path_factory.mktemp("e")
    (where / "in").mkdir()
    names = ("namespace", "name", "app", "node")
    pods = [POD.format(**dict(zip(names, pod, strict=True))) for pod in PODS]
    (where / "in" / "all.yaml").write_text("".join(pods) + REST)
    command = [sys.executable, "-m", "tidegate_cli", "--run-dir", str(where / "run")]
    try:
        up = [*command, "up", str(where / "in"), "--detach"]
        done = subprocess.run(up, capture_output=True, text=True, timeout=UP_SECONDS)
        assert done.returncode == 0, done.stderr
        yield where / "run"
    finally:
        subprocess.run([*command, "down"], capture_output=True, timeout=UP_SECONDS)


def dump(run: RunObjects) -> dict[tuple[str, str], list[tuple[bytes, bytes]]]:
    found = {}
    for node in run.nodes():
        with NodeMaps(run.pin_dir(node)) as maps:
            for name in READ_ONLY:
                found[node, name] = sorted(maps.map(name).items())
    return found


def test_three_answers_agree_for_every_pair(cluster: Path) -> None:
    run = RunObjects(cluster)
    model = Model.from_objects(run.all())
    before = dump(run)
    seen: dict[tuple[str, bool | None], int] = {}
    with Nodes(run) as nodes:
        for source in model.pods:
            for target in [*model.pods, *TARGETS]:
                for port, protocol in QUESTIONS:
                    families = (4, 6) if target in model.pods else (0,)
                    for family in families:
                        expected = model.expected(source, target, port, protocol, family=family)
                        found = explain.ask(model, nodes, expected, protocol)
                        assert found.all_disagreements == []
                        assert found.expected.frontend is None
                        key = protocol, found.expected.allowed
                        seen[key] = seen.get(key, 0) + 1
            for service in model.services:
                expected = model.expected(source, f"svc/{service}", 80, "TCP")
                found = explain.ask(model, nodes, expected, "TCP")
                assert found.all_disagreements == []
                assert found.service is not None
                # A pod that is its own backend is sent to itself, whole.
                if service == "a/itself" and source == "a/other":
                    assert found.expected.allowed is True
    # Both answers came up with every protocol: nothing agreed for want of a question.
    assert {key for key, count in seen.items() if count > 1} >= {
        (protocol, allowed) for _, protocol in QUESTIONS for allowed in (True, False)
    }
    assert dump(run) == before
    for node in run.nodes():
        with NodeMaps(run.pin_dir(node)) as maps:
            ports = {end[1] for flow in maps.flows() for end in (flow.source, flow.destination)}
            assert frame.SOURCE_PORT not in ports


def test_a_disagreement_is_loud(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel is told behind the loader's back that a peer is somebody else."""
    argv = ["--run-dir", str(cluster), "explain", "--from", "a/client", "--to", "a/web-2"]
    assert main([*argv, "--port", "8080"]) == 0
    assert "the answers agree" in capsys.readouterr().out
    run = RunObjects(cluster)
    model = Model.from_objects(run.all())
    client = model.pod("a/client")
    address = client.address(4)
    assert address is not None
    key = addresses.pack(address)
    with NodeMaps(run.pin_dir("node-2")) as maps:
        opened = maps.map("ipcache_v1")
        right = opened.lookup(key)
        row = maps.layouts.ipcache.unpack(right)
        other = model.pod("a/other").endpoint.identity
        try:
            opened.update(key, maps.layouts.ipcache.pack(proof=row.proof, identity=other))
            assert main([*argv, "--port", "8080"]) == 2
        finally:
            opened.update(key, right)
    said = capsys.readouterr().out
    assert "DISAGREE  maps: ingress default deny" in said
    assert "DISAGREE  program: ingress default deny" in said
    assert main([*argv, "--port", "8081"]) == 1
    assert "default deny: no rule matches, and a/web-2 is isolated by NetworkPolicy a/web" in (
        capsys.readouterr().out
    )


def answer(capsys: pytest.CaptureFixture[str], cluster: Path, *argv: str) -> object:
    assert main(["--run-dir", str(cluster), *argv, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_lists_show_the_kernel(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoints = answer(capsys, cluster, "endpoint", "list")
    assert isinstance(endpoints, dict)
    pods = {(node, e["pod"]) for node, rows in endpoints.items() for e in rows}
    assert pods == {(node, f"{namespace}/{name}") for namespace, name, _, node in PODS}
    # Their own labels, also those that no selector asks for.
    own = {f"{space}/{name}": {"app": app, "release": name} for space, name, app, _ in PODS}
    assert {e["pod"]: e["labels"] for rows in endpoints.values() for e in rows} == own
    services = answer(capsys, cluster, "lb", "list", "--node", "node-1")
    assert isinstance(services, dict)
    texts = sorted(text for texts in services.values() for text in texts)
    assert [text for text in texts if text.endswith("(0) [ClusterIP, non-routable]")] == texts[:3]
    assert sorted(text.partition(" ")[0] for text in texts[3:]) == [
        "10.244.0.3:8080/TCP",
        "10.244.1.2:8080/TCP",
        "10.244.1.3:8080/TCP",
    ]
    rules = answer(capsys, cluster, "policy", "get", "a/client", "--node", "node-1")
    assert isinstance(rules, list)
    named = {rule["rule"] for rule in rules[0]["rules"] if rule["direction"] == "Egress"}
    assert named == {
        "NetworkPolicy a/client spec.egress[0]",
        "NetworkPolicy a/client spec.egress[1]",
        "default: NetworkPolicy a/client",
    }
    found = answer(capsys, cluster, "ipcache", "list", "--node", "node-1")
    assert isinstance(found, list)
    assert {entry["proof"] for entry in found} == {"ok"}
    words = {entry["cidr"]: entry["labels"] for entry in found}
    for rows in endpoints.values():
        for e in rows:
            for text in e["addresses"]:
                found = words[f"{text}/{128 if ':' in text else 32}"]
                assert f"k8s:release={own[e['pod']]['release']}" in found
    ledger = answer(capsys, cluster, "identity", "list")
    assert isinstance(ledger, list)
    used = [row for row in ledger if row["endpoints"]]
    assert not any("release" in row["labels"] for row in ledger)
    assert sum(row["labelSets"] for row in used) == len(PODS)
    report = answer(capsys, cluster, "status")
    assert isinstance(report, dict)
    saved = len(PODS) - len(used)
    assert saved > 0
    assert report["identities"] == {"numbers": len(used), "saved": saved}
    answer(capsys, cluster, "ct", "list")
    answer(capsys, cluster, "metrics", "list")


def test_one_node_alone(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, cluster, "matrix", "--node", "node-1")
    assert isinstance(found, dict)
    asking = {cell["source"] for cell in found["cells"]}
    assert asking == {f"{space}/{name}" for space, name, _, node in PODS if node == "node-1"}
    for words in (["matrix"], ["identity", "list"], ["endpoint", "list"], ["status"]):
        assert main(["--run-dir", str(cluster), *words, "--node", "nope"]) == 2
        assert "--node takes one of: node-1, node-2" in capsys.readouterr().err


def test_what_was_just_saved_is_waited_for(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cluster.parent / "in" / "all.yaml"
    path.write_text(f"{path.read_text()}# saved\n")
    wait = ["--run-dir", str(cluster), "policy", "wait", "--timeout=60"]
    for argv in (["netpol/a/web"], [], ["-f", str(path)]):
        assert main([*wait, *argv]) == 0
        assert "in force on 2 of 2 nodes" in capsys.readouterr().out
    assert RunObjects(cluster).followed().files == manifests.digests(cluster.parent / "in")
    assert main([*wait, "netpol/a/nobody"]) == 2


def test_status_is_in_force(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, cluster, "status")
    assert isinstance(report, dict)
    assert [node["inForce"] for node in report["nodes"]] == [True, True]
    assert all(node["hooks"]["missing"] == 0 for node in report["nodes"])
    assert all(sum(node["memory"].values()) > 0 for node in report["nodes"])
