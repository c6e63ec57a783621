"""The command line against the cluster, and at the end Tidegate taken out of it and put back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kind import cluster, settings
from rig import asking, install, pods

pytestmark = pytest.mark.kind
SPACE = "e2e-cli"
POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "server", "namespace": SPACE},
    "spec": {
        "podSelector": {"matchLabels": {"role": "server"}},
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"role": "friend"}}}],
                "ports": [{"port": 80}],
            }
        ],
    },
}


def tidegate(*argv: str | Path, code: int = 0) -> str:
    """Standard output of the command, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "tidegate_cli", "--kubeconfig", cluster.kubeconfig(), *argv],
        capture_output=True,
        text=True,
        # For kubectl, which builds kustomizations.
        env={**os.environ, "PATH": f"{settings.binaries()}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == code, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def declaring(manifest: pods.Manifest) -> pods.Manifest:
    """The pod with its TCP ports declared: a matrix asks for those."""
    ports = [{"containerPort": number} for number in (80, 8080)]
    manifest["spec"]["containers"][0]["ports"] = ports
    return manifest


@pytest.fixture(scope="module")
def town(tidegate: None) -> dict[str, pods.Pod]:
    """A server on one node, a friend and a stranger on it and on another."""
    first, second = cluster.nodes()[1:]
    places = {
        "server": first,
        "friend-near": first,
        "stranger-near": first,
        "friend-far": second,
        "stranger-far": second,
    }
    pods.remove_namespaces(SPACE)
    pods.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}},
        *(
            declaring(pods.manifest(name, SPACE, {"role": name.partition("-")[0]}, node))
            for name, node in places.items()
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "server", "namespace": SPACE},
            "spec": {"selector": {"role": "server"}, "ports": [{"port": 8000, "targetPort": 80}]},
        },
        POLICY,
    )
    found = pods.wait_ready(SPACE)
    install.wait_realised()
    return found


def test_status_and_doctor_find_nothing_wrong(town: dict[str, pods.Pod]) -> None:
    report = json.loads(tidegate("-o", "json", "status"))
    assert {node["name"] for node in report["nodes"]} == set(cluster.nodes())
    assert all(node["inForce"] for node in report["nodes"])
    assert all(node["hooks"]["missing"] == 0 for node in report["nodes"])
    assert all(sum(node["memory"].values()) > 0 for node in report["nodes"])
    assert report["operator"]["ready"] >= 1
    assert report["operator"]["leader"].startswith("tidegate-operator-")
    lines = json.loads(tidegate("-o", "json", "doctor"))
    assert [line for line in lines if line["grade"] == "FAIL"] == []
    assert {f"{node} verifier pod.o" for node in cluster.nodes()} <= {i["name"] for i in lines}


@pytest.mark.parametrize("who", ["friend-near", "friend-far", "stranger-near", "stranger-far"])
def test_explain_agrees_with_itself_and_with_packets(
    who: str, town: dict[str, pods.Pod], askers: asking.Askers
) -> None:
    friend = who.startswith("friend")
    address = json.loads(cluster.kubectl("get", "service", "-n", SPACE, "server", "-o", "json"))
    service, server = (
        address["spec"]["clusterIP"],
        next(pod for pod in town.values() if pod.name == "server"),
    )
    source = next(pod for pod in town.values() if pod.name == who)
    for target, place in (
        (f"{SPACE}/server", (server.address, 80)),
        (f"svc/{SPACE}/server", (service, 8000)),
    ):
        argv = ("explain", "--from", f"{SPACE}/{who}", "--to", target, "--port", str(place[1]))
        found = json.loads(tidegate("-o", "json", *argv, code=0 if friend else 1))
        assert found["agree"]
        (answer,) = found["answers"]
        assert {answer[w]["allowed"] for w in ("model", "maps", "program")} == {friend}
        assert answer["from"]["node"] == source.node
        assert len(answer["program"]["runs"]) == (1 if source.node == server.node else 2)
        (real,) = askers.of(source).ask([asking.Question(*place)])
        assert bool(real.pod) is friend, (target, real)


def test_the_lists_show_the_nodes_kernels(town: dict[str, pods.Pod], askers: asking.Askers) -> None:
    server = town[f"{SPACE}/server"]
    # A flow to list, and one that is counted as denied.
    friend, stranger = (askers.of(town[f"{SPACE}/{who}-far"]) for who in ("friend", "stranger"))
    stream = friend.begin_stream(asking.Question(server.address, 80))
    (denied,) = stranger.ask([asking.Question(server.address, 80)])
    assert not denied.pod
    endpoints = json.loads(tidegate("-o", "json", "endpoint", "list"))
    found = {(node, e["pod"]) for node, rows in endpoints.items() for e in rows}
    assert {(pod.node, pod.key) for pod in town.values()} <= found
    text = tidegate("policy", "get", f"{SPACE}/server")
    assert "k8s:role=friend" in text
    assert f"NetworkPolicy {SPACE}/server spec.ingress[0]" in text
    # A Service's endpoints follow its pods.
    backend = f"{server.address}:80/TCP"
    pods.eventually(lambda: backend in tidegate("lb", "list"), "the Service has its backend")
    assert f"{server.address}/32" in tidegate("ipcache", "list")
    assert server.key in tidegate("ct", "list")
    assert "Policy denied" in tidegate("metrics", "list")
    assert "role=friend" in tidegate("identity", "list")
    assert not friend.end_stream(stream).detail
    pods.eventually(counted, "every node's observer counts what flows to Services carry")


def counted() -> bool:
    nodes = json.loads(tidegate("-o", "json", "lb", "list", "--stats"))
    return all("packets" in row and "replyBytes" in row for rows in nodes.values() for row in rows)


def test_the_same_inside_the_loaders_pod(town: dict[str, pods.Pod]) -> None:
    town_keys = {pod.key for pod in town.values()}
    for node, loader in install.loaders().items():
        command = ["tidegate", "endpoint", "list", "-o", "json"]
        where = ["exec", "-n", loader.namespace, loader.name, "-c", "loader", "--"]
        own = json.loads(cluster.kubectl(*where, *command))
        assert list(own) == [node]
        told = json.loads(tidegate("-o", "json", "endpoint", "list", "--node", node))
        # Of labels only the API knows.
        assert own[node] == [{**row, "labels": {}} for row in told]
        assert all(row["labels"] for row in told if row["pod"] in town_keys)


def test_a_matrix_is_as_the_model_says_and_as_the_policy(town: dict[str, pods.Pod]) -> None:
    report = json.loads(tidegate("-o", "json", "matrix", "-n", SPACE))
    cells = {(cell["source"], cell["destination"], cell["port"]): cell for cell in report["cells"]}
    assert report["differences"] == 0
    # TCP 80 and 8080 of five pods, and the Service's port, from each of the five.
    assert len(cells) == 5 * (5 * 2 + 1)
    for who in ("friend-near", "friend-far", "stranger-near", "stranger-far"):
        friend, source = who.startswith("friend"), f"{SPACE}/{who}"
        assert cells[source, f"{SPACE}/server", 80]["reached"] is friend
        assert cells[source, f"svc {SPACE}/server", 8000]["reached"] is friend
        assert cells[source, f"{SPACE}/server", 8080]["reached"] is False
        assert cells[f"{SPACE}/server", source, 8080]["reached"] is True
    assert "errand" not in cluster.kubectl("get", "pods", "-n", install.NAMESPACE)


def test_a_sysdump_lacks_nothing(town: dict[str, pods.Pod], tmp_path: Path) -> None:
    target = tmp_path / "dump.tar.gz"
    tidegate("sysdump", "--output-file", target)
    with tarfile.open(target) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for node in cluster.nodes():
        assert {f"nodes/{node}/ct-list.json", f"nodes/{node}/realised.json"} <= names
    assert sum(name.startswith("logs/") for name in names) >= 7
    assert "errors.txt" not in names


LEFT = (
    "find /sys/fs/bpf -mindepth 1 ! -name '*.debug'; ls -d /var/lib/tidegate /run/tidegate "
    "/opt/cni/bin/tidegate-cni; grep -l tidegate /etc/cni/net.d/*"
)


def test_without_an_operator_the_cleanup_leaves_nothing_on_the_nodes(
    town: dict[str, pods.Pod], askers: asking.Askers
) -> None:
    server = next(pod for pod in town.values() if pod.name == "server")
    stranger = next(pod for pod in town.values() if pod.name == "stranger-far")
    question = asking.Question(server.address, 80)
    space = ("-n", install.NAMESPACE)
    ours = ("deployment/tidegate-operator", "daemonset/tidegate-loader")
    cluster.kubectl("delete", *space, *ours, "--cascade=foreground", "--timeout=60s")
    assert not askers.of(stranger).ask([question])[0].pod, "what was in force stays so"
    folder = str(install.ROOT / "manifests/cleanup")
    cluster.kubectl("apply", "-k", folder)
    cluster.kubectl("rollout", "status", *space, "daemonset/tidegate-cleanup", "--timeout=60s")
    for node in cluster.nodes():
        assert cluster.inside(node, "sh", "-c", f"{{ {LEFT}; }} 2>/dev/null || true") == ""
    assert askers.of(stranger).ask([question])[0].pod == server.key
    cluster.kubectl("delete", "-k", folder, "--timeout=60s")
    install.apply()
    install.wait_ready()
    pods.eventually(
        lambda: not askers.of(stranger).ask([question])[0].pod, "the policy is in force again", 30
    )


def test_uninstall_leaves_nothing_and_install_brings_it_back(
    town: dict[str, pods.Pod], askers: asking.Askers
) -> None:
    server = next(pod for pod in town.values() if pod.name == "server")
    stranger = next(pod for pod in town.values() if pod.name == "stranger-far")
    question = asking.Question(server.address, 80)
    said = tidegate("uninstall", "--yes")
    assert said.endswith("Tidegate is gone\n")
    for node in cluster.nodes():
        assert cluster.inside(node, "sh", "-c", f"{{ {LEFT}; }} 2>/dev/null || true") == ""
    assert "tidegate" not in cluster.kubectl("get", "crds,clusterroles,clusterrolebindings")
    assert install.NAMESPACE not in cluster.kubectl("get", "namespaces")
    taints = cluster.kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.taints[*].key}")
    assert "tidegate" not in taints
    (free,) = askers.of(stranger).ask([question])
    assert free.pod == server.key, "nothing is enforced any more"
    said = tidegate("install", "--kustomize", str(install.ROOT / "manifests/overlays/kind"))
    assert "every node enforces" in said
    pods.eventually(
        lambda: not askers.of(stranger).ask([question])[0].pod, "the policy is in force again", 30
    )
    install.wait_ready()
